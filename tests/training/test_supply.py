import os

import pytest

from declip.training.supply import WARM, ThroughputMonitor, free_cores, workers_needed


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
    supply = ThroughputMonitor(1, 7)
    for _ in range(WARM):
        supply.step(100.0, 0.1)
    assert not supply.starved()
    for _ in range(19):
        supply.step(0.4, 0.6)
        assert not supply.starved()
    supply.step(0.4, 0.6)
    assert supply.starved()
    assert supply.share == pytest.approx(0.4)
    assert supply.needed == 2
    assert "data.workers=2 would keep up (now 1" in supply.advice()
    assert "processors are free" not in supply.advice()
    assert not supply.starved()  # begins anew


def test_a_loader_that_keeps_up_is_left_alone() -> None:
    supply = ThroughputMonitor(1, 7)
    for _ in range(40):
        supply.step(0.2, 0.8)
    assert not supply.starved()


def test_says_when_the_processors_do_not_suffice() -> None:
    supply = ThroughputMonitor(0, 1)
    for _ in range(40):
        supply.step(3.0, 1.0)
    assert supply.starved()
    assert supply.needed == 3
    assert "but 1 processor is free" in supply.advice()
    assert "prepare" in supply.advice()


def test_with_all_processors_training_there_is_nothing_to_advise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [free_cores(threads) for threads in (1, 6, 8, 20)] == [7, 2, 0, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_cores(1) == 1
    supply = ThroughputMonitor(0, 0)
    for _ in range(40):
        supply.step(3.0, 1.0)
    assert not supply.starved()
