"""The sigmoid loss against a plain loop, in blocks, on two ranks, and with the model's bias."""

import math

import pytest
import torch

from declip.supervision import chunked
from declip.supervision.sigmoid import Sigmoid, sigmoid_loss


def loop(image, text, scale, bias):
    total = 0.0
    for b, row in enumerate(image.tolist()):
        for n, key in enumerate(text.tolist()):
            logit = scale * sum(x * y for x, y in zip(row, key, strict=True)) + bias
            total += math.log1p(math.exp(-logit if n == b else logit))
    return total / len(image)


@pytest.mark.parametrize("limit", [None, 0], ids=["whole", "blocks"])
def test_equals_a_plain_loop_with_its_gradients(units, monkeypatch, limit):
    """Two ranks' mean too; the gradient of the loop by central differences."""
    monkeypatch.setattr(chunked, "BLOCK_BYTES", 2 * 6 * 8)
    image, text = units(6, 5).requires_grad_(), units(6, 5).requires_grad_()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (9.0, -4.0))
    loss = sigmoid_loss(image, text, scale, bias, 0, limit)
    assert loss.item() == pytest.approx(loop(image, text, 9.0, -4.0), rel=1e-12)
    ranks = [sigmoid_loss(image[start : start + 3], text, scale, bias, start, limit) for start in (0, 3)]
    assert abs(ranks[0] - ranks[1]) > 1e-6
    leaves = (image, text, scale, bias)
    expected = torch.autograd.grad(loss, leaves)
    for found, value in zip(torch.autograd.grad(sum(ranks) / 2, leaves), expected, strict=True):
        torch.testing.assert_close(found, value)
    step = 1e-6
    for index, arguments in ((2, lambda x: (9.0 + x, -4.0)), (3, lambda x: (9.0, -4.0 + x))):
        slope = (loop(image, text, *arguments(step)) - loop(image, text, *arguments(-step))) / (2 * step)
        assert expected[index].item() == pytest.approx(slope, rel=1e-6)
    assert torch.autograd.gradcheck(lambda *x: sigmoid_loss(*x, 0, limit), leaves)


def test_chance_is_the_loss_of_equal_logits_with_the_best_bias():
    alike = torch.ones(7, 1, dtype=torch.float64)
    losses = [sigmoid_loss(alike, alike, 0.0, -math.log(6) + shift).item() for shift in (-0.1, 0.0, 0.1)]
    assert Sigmoid.chance(None, 7) == pytest.approx(losses[1], rel=1e-12)  # type: ignore[arg-type]
    assert losses[1] < min(losses[0], losses[2])
