import math

import pytest
import torch

from declip.supervision.simsiam import negative_cosine
from golden_cases import loss_cases


def loop_cosine(x, y):
    total = 0.0
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
        total += sum(v * w for v, w in zip(a, b, strict=True)) / lengths
    return total / len(x)


@pytest.mark.golden
@pytest.mark.parametrize("name", loss_cases("simsiam"))
def test_equals_the_authors_loss_and_gradients(golden, name):
    case = golden(name)
    p1, p2, z1, z2 = (case[k].requires_grad_() for k in ("p1", "p2", "z1", "z2"))
    loss = negative_cosine(p1, p2, z1, z2)
    loss.backward()
    torch.testing.assert_close(loss, case["loss"], rtol=1e-5, atol=1e-8)
    for p, key in ((p1, "grad_p1"), (p2, "grad_p2")):
        torch.testing.assert_close(p.grad, case[key], rtol=1e-5, atol=1e-7)


def test_equals_a_plain_loop(units):
    p1, p2, z1, z2 = (units(5, 6) * length for length in (0.5, 3.0, 7.0, 0.1))
    expected = -(loop_cosine(p1, z2) + loop_cosine(p2, z1)) / 2
    assert negative_cosine(p1, p2, z1, z2).item() == pytest.approx(expected, rel=1e-12)


def test_bounds(units):
    x = units(4, 6)
    assert negative_cosine(x, 2 * x, 3 * x, x).item() == pytest.approx(-1)
    assert negative_cosine(x, x, -x, -x).item() == pytest.approx(1)


def test_targets_get_no_gradient_and_predictions_the_right_one(units, check_gradients):
    p1, p2, z1, z2 = (units(3, 4).requires_grad_() for _ in range(4))
    negative_cosine(p1, p2, z1, z2).backward()
    assert z1.grad is None
    assert z2.grad is None
    check_gradients(lambda a, b: negative_cosine(a, b, z1.detach(), z2.detach()), p1, p2)


def test_precision(units, check_precision):
    check_precision(negative_cosine, *(units(5, 8) for _ in range(4)))


def test_a_collapsed_prediction_stays_finite(units):
    p = torch.zeros(3, 4, requires_grad=True)
    loss = negative_cosine(p, p, units(3, 4).float(), units(3, 4).float())
    loss.backward()
    assert loss.item() == 0
    assert p.grad.isfinite().all()
