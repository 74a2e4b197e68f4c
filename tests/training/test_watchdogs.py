"""Warnings about a run: losses, gradients, and the loader."""

import math
import os

import pytest

from declip.training.watchdogs import FLAT_AFTER, LEAST_STEPS, STEEP, WARM, LossMonitor, ThroughputMonitor, auto_workers

CHANCE = math.log(64)


def healthy() -> LossMonitor:
    return LossMonitor(batch_size=64, warmup_steps=10)


def test_a_run_that_learns_hears_nothing() -> None:
    monitor = healthy()
    for step in range(1, 1000, 10):
        assert monitor.check(step, {"contrastive": CHANCE * 0.99**step, "grad_norm": 1 + 0.5 * math.sin(step)}) == []


def test_a_loss_at_chance_is_named_once_and_late() -> None:
    monitor = healthy()
    assert monitor.check(FLAT_AFTER - 1, {"contrastive": CHANCE, "grad_norm": 1.0}) == []
    (warning,) = monitor.check(FLAT_AFTER, {"contrastive": CHANCE + 0.01, "grad_norm": 1.0})
    assert "4.16" in warning
    assert "train.lr" in warning
    assert monitor.check(FLAT_AFTER + 10, {"contrastive": CHANCE, "grad_norm": 1.0}) == []


@pytest.mark.parametrize("term", ["contrastive", "late_interaction"])
def test_a_loss_worse_than_guessing_is_named_after_the_warmup(term: str) -> None:
    monitor = healthy()
    assert monitor.check(5, {term: CHANCE, "grad_norm": 1.0}) == []
    assert monitor.check(10, {term: CHANCE + 2, "grad_norm": 1.0}) == []
    (warning,) = monitor.check(11, {term: CHANCE + 2, "grad_norm": 1.0})
    assert "the run diverges" in warning


@pytest.mark.parametrize(("first", "last"), [(8.24, 6.98), (30.0, 8.0), (6.0, 0.1)])
def test_a_falling_loss_never_diverges(first: float, last: float) -> None:
    monitor = healthy()
    for step in range(1, 251):
        loss = first + (last - first) * step / 250 + 0.3 * math.sin(step)
        assert monitor.check(step, {"contrastive": loss, "grad_norm": 1.0}) == []


def test_a_loss_that_rises_above_a_high_start_diverges() -> None:
    monitor = healthy()
    assert monitor.check(1, {"contrastive": CHANCE + 3, "grad_norm": 1.0}) == []
    assert monitor.check(20, {"contrastive": CHANCE + 3.9, "grad_norm": 1.0}) == []
    assert len(monitor.check(30, {"contrastive": CHANCE + 4.1, "grad_norm": 1.0})) == 1


def test_a_spike_of_the_gradient_is_measured_against_the_usual_one() -> None:
    monitor = healthy()
    for step in range(1, 100):
        assert monitor.check(step, {"contrastive": 1.0, "grad_norm": 2.0}) == []
    assert monitor.check(100, {"contrastive": 1.0, "grad_norm": 0.9 * STEEP * 2}) == []
    (warning,) = healthy().check(5, {"grad_norm": 1.0}) or ([""] and monitor.check(101, {"grad_norm": 1e9}))
    assert "a spike" in warning


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_warnings_work_after_a_step_that_was_not_finite(bad: float) -> None:
    monitor = healthy()
    for step in range(1, 50):
        assert monitor.check(step, {"contrastive": 1.0, "grad_norm": 2.0}) == []
    assert monitor.check(50, {"contrastive": bad, "grad_norm": bad}) == []
    assert monitor.check(51, {"contrastive": 1.0, "grad_norm": 2.0}) == []
    assert len(monitor.check(52, {"contrastive": 1.0, "grad_norm": STEEP * 4})) == 1
    assert len(monitor.check(53, {"contrastive": CHANCE + 2, "grad_norm": 2.0})) == 1


def test_steps_that_wait_for_the_loader_are_named_once_and_not_before_enough_was_seen() -> None:
    monitor = ThroughputMonitor()
    for _ in range(WARM):
        assert monitor.check(100.0, 0.1, 1) is None
    assert [monitor.check(0.1, 0.9, 1) for _ in range(LEAST_STEPS)] == [None] * LEAST_STEPS, "a tenth is little"
    warnings = [monitor.check(0.4, 0.6, 1) for _ in range(3 * LEAST_STEPS)]
    (warning,) = [warning for warning in warnings if warning]
    assert warnings[LEAST_STEPS - 1] == warning
    assert "wait 40% of" in warning
    assert "data.workers=1 now" in warning


def test_automatic_workers_are_the_cores_of_a_rank_that_do_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [auto_workers(threads) for threads in (0, 1, 6, 8, 20)] == [8, 7, 2, 0, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert auto_workers(1) == 1
