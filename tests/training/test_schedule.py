import numpy as np
import pytest

from declip.recipe.schema import Train
from declip.training.schedule import learning_rate
from golden_cases import require_file


@pytest.mark.golden
def test_equals_the_authors_schedule() -> None:
    """Their iterations count from 1 and their configuration runs 128,001 of them."""
    cases = np.load(require_file("loss_cases.npz"))
    train = Train(steps=128001, warmup_lr=1e-4, lr=1e-3, warmup_steps=2500)
    ours = [learning_rate(int(iteration) - 1, train) for iteration in cases["lr_schedule/iter"]]
    np.testing.assert_allclose(ours, cases["lr_schedule/lr"], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 2, 10, 50])
def test_rises_to_the_peak_and_falls_to_the_end(warmup: int) -> None:
    train = Train(steps=50, warmup_lr=1e-4, lr=1e-3, min_lr=1e-5, warmup_steps=warmup)
    rates = [learning_rate(step, train) for step in range(50)]
    top = max(warmup - 1, 0)
    assert np.all(np.diff(rates[: top + 1]) > 0)
    assert np.all(np.diff(rates[top:]) < 0)
    assert max(rates) <= 1e-3
    if warmup:
        assert rates[warmup - 1] == pytest.approx(1e-3)
    if warmup < 50:
        assert rates[-1] == pytest.approx(1e-5)


def test_a_run_shorter_than_its_warm_up_stays_in_it() -> None:
    train = Train(steps=5, warmup_lr=0.0, lr=1e-3, warmup_steps=100)
    assert learning_rate(4, train) == pytest.approx(1e-3)
    assert learning_rate(0, train) == 0.0
