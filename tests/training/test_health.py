import math

import pytest

from declip.training.health import FLAT_AFTER, STEEP, LossMonitor

CHANCE = math.log(64)


def healthy() -> LossMonitor:
    return LossMonitor(batch=64, warmup=10)


def test_a_run_that_learns_hears_nothing() -> None:
    health = healthy()
    for step in range(1, 1000, 10):
        assert health.look(step, {"contrastive": CHANCE * 0.99**step, "grad_norm": 1 + 0.5 * math.sin(step)}) == []


def test_a_loss_at_chance_is_named_once_and_late() -> None:
    health = healthy()
    assert health.look(FLAT_AFTER - 1, {"contrastive": CHANCE, "grad_norm": 1.0}) == []
    (said,) = health.look(FLAT_AFTER, {"contrastive": CHANCE + 0.01, "grad_norm": 1.0})
    assert "ln(64) = 4.16: nothing is learnt" in said
    assert "train.lr" in said
    assert health.look(FLAT_AFTER + 10, {"contrastive": CHANCE, "grad_norm": 1.0}) == []


@pytest.mark.parametrize("term", ["contrastive", "late_interaction"])
def test_a_loss_worse_than_guessing_is_named_after_the_warmup(term: str) -> None:
    health = healthy()
    assert health.look(5, {term: CHANCE, "grad_norm": 1.0}) == []
    assert health.look(10, {term: CHANCE + 2, "grad_norm": 1.0}) == []
    (said,) = health.look(11, {term: CHANCE + 2, "grad_norm": 1.0})
    assert "the run diverges" in said


@pytest.mark.parametrize(("first", "last"), [(8.24, 6.98), (30.0, 8.0), (6.0, 0.1)])
def test_a_falling_loss_never_diverges(first: float, last: float) -> None:
    health = healthy()
    for step in range(1, 251):
        loss = first + (last - first) * step / 250 + 0.3 * math.sin(step)
        assert health.look(step, {"contrastive": loss, "grad_norm": 1.0}) == []


def test_a_loss_that_rises_above_a_high_start_diverges() -> None:
    health = healthy()
    assert health.look(1, {"contrastive": CHANCE + 3, "grad_norm": 1.0}) == []
    assert health.look(20, {"contrastive": CHANCE + 3.9, "grad_norm": 1.0}) == []
    assert len(health.look(30, {"contrastive": CHANCE + 4.1, "grad_norm": 1.0})) == 1


def test_a_spike_of_the_gradient_is_measured_against_the_usual_one() -> None:
    health = healthy()
    for step in range(1, 100):
        assert health.look(step, {"contrastive": 1.0, "grad_norm": 2.0}) == []
    assert health.look(100, {"contrastive": 1.0, "grad_norm": 0.9 * STEEP * 2}) == []
    (said,) = healthy().look(5, {"grad_norm": 1.0}) or ([""] and health.look(101, {"grad_norm": 1e9}))
    assert "a spike" in said


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_warnings_work_after_a_step_that_was_not_finite(bad: float) -> None:
    health = healthy()
    for step in range(1, 50):
        assert health.look(step, {"contrastive": 1.0, "grad_norm": 2.0}) == []
    assert health.look(50, {"contrastive": bad, "grad_norm": bad}) == []
    assert health.look(51, {"contrastive": 1.0, "grad_norm": 2.0}) == []
    assert len(health.look(52, {"contrastive": 1.0, "grad_norm": STEEP * 4})) == 1
    assert len(health.look(53, {"contrastive": CHANCE + 2, "grad_norm": 2.0})) == 1
