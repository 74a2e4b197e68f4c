"""Warnings about a run: losses, gradients, and the loader."""

import math
import os

import pytest

from declip.training.watchdogs import (
    FLAT_AFTER,
    STEEP,
    WARM,
    LossMonitor,
    ThroughputMonitor,
    free_cores,
    workers_needed,
)

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


@pytest.mark.parametrize(
    ("workers", "waited", "took", "needed"),
    [
        (0, 0.1, 1.0, 1),  # made in this process: one worker makes a batch while a step is taken
        (0, 2.5, 1.0, 3),  # 2.5 s a batch, 1 s a step
        (2, 1.0, 1.0, 4),  # two workers give a batch in 2 s, so 4 s each
        (3, 0.0, 1.0, 3),
        (4, 0.5, 1.0, 6),
    ],
)
def test_workers_that_would_do(workers: int, waited: float, took: float, needed: int) -> None:
    assert workers_needed(workers, waited, took) == needed


def test_says_nothing_before_it_has_seen_enough_and_nothing_about_the_first_steps() -> None:
    throughput = ThroughputMonitor(1, 7)
    for _ in range(WARM):
        throughput.step(100.0, 0.1)
    assert not throughput.starved()
    for _ in range(19):
        throughput.step(0.4, 0.6)
        assert not throughput.starved()
    throughput.step(0.4, 0.6)
    assert throughput.starved()
    assert throughput.fraction == pytest.approx(0.4)
    assert throughput.needed == 2
    assert "data.workers=2 would keep up (now 1" in throughput.advice()
    assert "processors are free" not in throughput.advice()
    assert not throughput.starved()  # begins anew


@pytest.mark.parametrize(
    ("workers", "cores", "waited", "needed"),
    [(1, 7, 0.25, None), (0, 1, 3.0, 3), (0, 0, 3.0, None)],
    ids=["keeps up", "too few processors", "no processor is free"],
)
def test_workers_are_advised_only_where_they_help(workers: int, cores: int, waited: float, needed: int | None) -> None:
    throughput = ThroughputMonitor(workers, cores)
    for _ in range(40):
        throughput.step(waited, 1.0)
    assert throughput.starved() == (needed is not None)
    if needed is not None:
        assert throughput.needed == needed
        assert "but 1 processor is free" in throughput.advice()


def test_free_cores_are_those_of_the_rank_that_do_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [free_cores(threads) for threads in (1, 6, 8, 20)] == [7, 2, 0, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_cores(1) == 1
