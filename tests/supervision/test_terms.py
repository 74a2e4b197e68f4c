"""What every loss must do, in one pass and in blocks: gradients, precision, and no wait for the device."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from declip.supervision import contrastive
from supervision.conftest import BATCH, TERMS, WITHOUT_MATRIX, NoDeviceReads, batch_axis

every_term = pytest.mark.parametrize("name", TERMS)
in_blocks_too = pytest.mark.parametrize("limit", [None, 0], ids=["whole", "blocks"])


@pytest.fixture
def features(units, name):
    """A batch's features, which need gradients."""
    return [units(*shape).requires_grad_() for shape in TERMS[name][1]]


def part(features, start, size):
    """The features of some of the pairs."""
    return [x.narrow(batch_axis(tuple(x.shape)), start, size) for x in features]


@every_term
@in_blocks_too
def test_gradients_are_finite_differences(features, name, limit):
    term = TERMS[name][0]
    count = len(features)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    rows = [x.detach().clone().requires_grad_() for x in part(features, 1, 2)]
    inputs, quick = (*rows, *features, scale), name == "late_interaction"
    assert torch.autograd.gradcheck(
        lambda *x: term(*x[: 2 * count], x[-1], 1, limit), inputs, fast_mode=quick
    )


@every_term
@in_blocks_too
def test_precision_is_float32_for_halves_and_deaf_to_autocast(features, name, limit):
    term = TERMS[name][0]
    halves = [x.detach().bfloat16() for x in features]
    singles = [x.float().requires_grad_() for x in halves]
    expected = term(*singles, *singles, 100.0, 0, limit)
    assert expected.dtype == torch.float32
    gradients = torch.autograd.grad(expected, singles)
    with torch.autocast("cpu", torch.bfloat16):
        found = term(*singles, *singles, 100.0, 0, limit)
        assert found == expected == term(*halves, *halves, 100.0, 0, limit)
    assert all(map(torch.equal, torch.autograd.grad(found, singles), gradients))
    assert term(*halves, *halves, 100.0, 0, limit) == expected
    assert term(*features, *features, 100.0, 0, limit).dtype == torch.float64


@every_term
@in_blocks_too
def test_nothing_waits_for_the_device(features, name, limit):
    with NoDeviceReads():
        TERMS[name][0](*features, *features, torch.tensor(14.3), 0, limit).backward()


@pytest.mark.parametrize(
    ("name", "shape", "negatives"),
    [
        ("info_nce", (4, 4), 3),
        ("multi_view", (2, 4, 4), 3),
        ("nt_xent", (4, 4), 6),
        ("late_interaction", (4, 1, 4), 3),
    ],
)
@in_blocks_too
def test_the_hardest_pairs_at_scale_100_stay_finite(name, shape, negatives, limit):
    rows = torch.eye(4).repeat(2, 1)[: math.prod(shape) // 4].reshape(shape).requires_grad_()
    log_scale = torch.tensor(100.0).log().requires_grad_()
    opposite = -rows.detach()
    loss = TERMS[name][0](rows, opposite, rows, opposite, log_scale.exp(), 0, limit)
    loss.backward()
    assert loss.item() == pytest.approx(100 + math.log(negatives + math.exp(-100)), rel=1e-6)
    assert log_scale.grad.item() == pytest.approx(100, rel=1e-5)
    assert rows.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [
            x.numel()
            for x in (result if isinstance(result, tuple | list) else [result])
            if isinstance(x, Tensor)
        ]
        self.elements = max([self.elements, *made])
        return result


@pytest.mark.parametrize("name", [name for name in TERMS if name not in WITHOUT_MATRIX])
def test_blocks_neither_make_nor_keep_anything_of_the_matrixs_size(units, monkeypatch, name):
    pairs, term = 90, TERMS[name][0]
    monkeypatch.setattr("supervision.conftest.LENGTHS", torch.full((pairs,), 5))
    monkeypatch.setattr(contrastive, "BLOCK_BYTES", 10 * pairs * 8)
    rows = [
        units(*(pairs if n == BATCH else n for n in shape)).requires_grad_()
        for shape in TERMS[name][1]
    ]
    largest, kept = {}, {}
    for limit in (None, 0):
        sizes = [0]

        def keep(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with Largest() as mode:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                loss = term(*rows, *rows, 14.3, 0, limit)
            loss.backward()
        largest[limit], kept[limit] = mode.elements, max(sizes)
    assert min(largest[None], kept[None]) >= pairs * pairs, "the plain form is seen"
    assert kept[0] < pairs * pairs / 2
    assert largest[0] < pairs * pairs / 2 or name == "late_interaction"
