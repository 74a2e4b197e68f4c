"""Warnings about a run: losses, and the loader."""

import math
import os

import pytest

from declip.training.monitor import FLAT_AFTER, LEAST_STEPS, WARM, LossMonitor, ThroughputMonitor, auto_workers

CHANCE = math.log(64)


@pytest.fixture
def monitor():
    return LossMonitor(batch_size=64, warmup_steps=10, watched="contrastive")


@pytest.mark.parametrize(("first", "last"), [(CHANCE, 0.1), (8.24, 6.98), (30.0, 8.0)])
def test_a_falling_loss_hears_nothing(monitor, first, last):
    for step in range(1, 251):
        loss = first + (last - first) * step / 250 + 0.3 * math.sin(step)
        assert monitor.check(step, {"contrastive": loss}) is None


def test_a_loss_at_chance_is_named_once_and_late(monitor):
    assert monitor.check(FLAT_AFTER - 1, {"contrastive": CHANCE}) is None
    warning = monitor.check(FLAT_AFTER, {"contrastive": CHANCE + 0.01})
    assert warning is not None
    assert "4.16" in warning
    assert "train.lr" in warning
    assert monitor.check(FLAT_AFTER + 10, {"contrastive": CHANCE}) is None


@pytest.mark.parametrize("term", ["contrastive", "late_interaction"])
def test_a_loss_worse_than_guessing_is_named_after_the_warmup(term):
    monitor = LossMonitor(batch_size=64, warmup_steps=10, watched=term)
    assert monitor.check(5, {term: CHANCE}) is None
    assert monitor.check(10, {term: CHANCE + 2}) is None
    assert "the run diverges" in str(monitor.check(11, {term: CHANCE + 2}))


@pytest.mark.parametrize("between", [3.9, math.nan, math.inf])
def test_a_loss_that_rises_above_a_high_start_diverges(monitor, between):
    for step, above in ((1, 3.0), (20, between)):
        assert monitor.check(step, {"contrastive": CHANCE + above}) is None
    assert monitor.check(30, {"contrastive": CHANCE + 4.1}) is not None


def test_steps_that_wait_for_the_loader_are_named_once_and_not_before_enough_was_seen():
    monitor = ThroughputMonitor()
    for _ in range(WARM):
        assert monitor.check(100.0, 0.1, 1) is None
    assert [monitor.check(0.1, 0.9, 1) for _ in range(LEAST_STEPS)] == [None] * LEAST_STEPS, "a tenth is little"
    warnings = [monitor.check(0.4, 0.6, 1) for _ in range(3 * LEAST_STEPS)]
    (warning,) = [warning for warning in warnings if warning]
    assert warnings[LEAST_STEPS - 1] == warning
    assert "wait 40% of" in warning
    assert "data.workers=1 now" in warning


def test_automatic_workers_are_the_cores_of_a_rank_that_do_not_train(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [auto_workers(threads) for threads in (0, 1, 6, 8, 20)] == [8, 7, 2, 0, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert auto_workers(1) == 1
