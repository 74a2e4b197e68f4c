import math

import pytest
import torch

from declip.supervision.masked_language import chosen_rows, cross_entropy


def loop(logits, targets):
    losses = [
        math.log(sum(math.exp(v) for v in row)) - row[target]
        for row, target in zip(logits.tolist(), targets.tolist(), strict=True)
        if target != -100
    ]
    return sum(losses) / len(losses)


def test_equals_a_plain_loop(units):
    logits, targets = 5 * units(6, 9), torch.tensor([3, 0, 8, 8, 1, 2])
    assert cross_entropy(logits, targets).item() == pytest.approx(loop(logits, targets), rel=1e-12)


def test_chosen_rows_equal_a_plain_loop(units):
    words = units(3, 4, 5).requires_grad_()
    labels = torch.tensor([[-100, 7, -100, 3], [-100] * 4, [0, -100, -100, -100]])
    rows, targets = chosen_rows(words, labels)
    expected = [words[b, position] for b in range(3) for position in range(4) if labels[b, position] != -100]
    assert torch.equal(rows, torch.stack(expected))
    assert targets.tolist() == [7, 3, 0]
    rows.sum().backward()
    assert torch.equal(words.grad[..., 0], (labels != -100).double())


def test_no_chosen_rows_lead_to_a_loss_of_zero(units):
    words, head = units(2, 3, 4).float().requires_grad_(), torch.nn.Linear(4, 6)
    rows, targets = chosen_rows(words, torch.full((2, 3), -100))
    loss = cross_entropy(head(rows), targets)
    loss.backward()
    assert rows.shape == (0, 4)
    assert loss.item() == 0
    assert torch.equal(head.weight.grad, torch.zeros(6, 4))


def test_the_loss_of_chosen_rows_equals_all_rows_with_the_others_ignored(units):
    logits, targets = units(6, 9), torch.tensor([3, -100, 8, -100, -100, 2])
    chosen = targets != -100
    assert cross_entropy(logits, targets).item() == pytest.approx(loop(logits, targets), rel=1e-12)
    assert cross_entropy(logits[chosen], targets[chosen]).item() == pytest.approx(loop(logits, targets), rel=1e-12)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_predict_costs_zero_within_the_graph(rows):
    logits = torch.randn(rows, 7, requires_grad=True)
    loss = cross_entropy(logits, torch.full((rows,), -100))
    loss.backward()
    assert loss.item() == 0
    assert loss.dtype == torch.float32
    assert torch.equal(logits.grad, torch.zeros(rows, 7))


def test_a_shared_count_makes_unequal_ranks_equal_the_whole(units):
    logits, targets = units(5, 9), torch.tensor([3, 0, 8, 1, 2])
    ranks = [cross_entropy(logits[part], targets[part], count=5 / 2) for part in (slice(0, 1), slice(1, 5))]
    assert (sum(ranks) / 2).item() == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-12)


def test_gradients(units, check_gradients):
    targets = torch.tensor([2, -100, 0])
    check_gradients(lambda logits: cross_entropy(logits, targets), units(3, 4))


def test_precision(units, check_precision):
    check_precision(lambda logits: cross_entropy(logits, torch.arange(5)), 10 * units(5, 8))


def test_never_waits_for_the_device(units, no_device_reads):
    with no_device_reads():
        cross_entropy(units(5, 8), torch.tensor([1, 2, -100, 3, 0]))


def test_large_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == 1e4
    assert logits.grad.isfinite().all()
