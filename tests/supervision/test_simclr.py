import math

import pytest
import torch

from declip.supervision.simclr import nt_xent
from golden_cases import loss_cases


def loop_view(own, own_keys, other_keys, temperature, offset):
    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    total = 0.0
    for b, row in enumerate(own.tolist()):
        positive = cosine(row, other_keys.tolist()[offset + b]) / temperature
        candidates = [cosine(row, key) / temperature for key in other_keys.tolist()]
        candidates += [cosine(row, key) / temperature for n, key in enumerate(own_keys.tolist()) if n != offset + b]
        total += math.log(sum(math.exp(c) for c in candidates)) - positive
    return total / len(own)


@pytest.mark.golden
@pytest.mark.parametrize("name", loss_cases("nt_xent"))
def test_equals_the_authors_loss_and_gradients(golden, name):
    case = golden(name)
    z1, z2 = case["z_i"].requires_grad_(), case["z_j"].requires_grad_()
    loss = nt_xent(z1, z2, z1, z2, case["temperature"].item())
    loss.backward()
    torch.testing.assert_close(loss, case["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(z1.grad, case["grad_i"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z2.grad, case["grad_j"], rtol=1e-5, atol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize("name", loss_cases("nt_xent_gather"))
def test_gathered_form_equals_the_authors_loss_and_gradients(golden, name):
    case = golden(name)
    inputs = [case[f"z_{name}"].requires_grad_() for name in ("i", "j", "ib", "jb")]
    offset = int(case["rank"]) * len(inputs[0])
    loss = nt_xent(*inputs, case["temperature"].item(), offset)
    loss.backward()
    torch.testing.assert_close(loss, case["loss"], rtol=1e-5, atol=0)
    for x, name in zip(inputs, ("i", "j", "ib", "jb"), strict=True):
        torch.testing.assert_close(x.grad, case[f"grad_{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0, 3])
def test_equals_a_plain_loop(units, offset):
    z1, z2, keys1, keys2 = 0.3 * units(3, 5), 4 * units(3, 5), 2 * units(6, 5), units(6, 5)
    one, two = loop_view(z1, keys1, keys2, 0.2, offset), loop_view(z2, keys2, keys1, 0.2, offset)
    assert nt_xent(z1, z2, keys1, keys2, 0.2, offset).item() == pytest.approx((one + two) / 2, rel=1e-12)


def test_the_temperature_is_the_papers_by_default(units):
    z1, z2 = units(4, 5), units(4, 5)
    assert nt_xent(z1, z2, z1, z2).item() == nt_xent(z1, z2, z1, z2, temperature=0.1).item()


def test_gradients(units, check_gradients):
    check_gradients(lambda *x: nt_xent(*x, 0.5, 1), units(2, 3), units(2, 3), units(4, 3), units(4, 3))


def test_ranks_together_equal_the_whole_batch(units, check_ranks):
    check_ranks(lambda *x: nt_xent(*x[:4], 0.1, x[4]), units(6, 5), units(6, 5))


def test_precision(units, check_precision):
    check_precision(lambda *x: nt_xent(*x, 0.01), *(units(5, 8) for _ in range(4)))


def test_never_waits_for_the_device(units, no_device_reads):
    z1, z2 = units(4, 5), units(4, 5)
    with no_device_reads():
        nt_xent(z1, z2, z1, z2)


def test_a_single_image_costs_nothing_and_stays_finite(units):
    z1, z2 = units(1, 4).float().requires_grad_(), units(1, 4).float()
    loss = nt_xent(z1, z2, z1, z2)
    loss.backward()
    assert loss.item() == 0
    assert z1.grad.isfinite().all()
