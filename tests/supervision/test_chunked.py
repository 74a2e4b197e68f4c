"""Losses in blocks: the values and gradients of the plain form, and nothing of the matrix's size."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from declip.supervision import chunked
from declip.supervision.contrastive import cross_entropy_to_keys, info_nce
from declip.supervision.late_interaction import late_interaction
from declip.supervision.multi_view import multi_view
from declip.supervision.nearest_neighbor import neighbor_contrast
from declip.supervision.simclr import nt_xent


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x.numel() for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *made])
        return result


def loop(rows: Tensor, keys: Tensor, offset: int, excluded: int | None) -> float:
    total = 0.0
    for b, row in enumerate(rows.tolist()):
        logits = [sum(x * y for x, y in zip(row, key, strict=True)) for key in keys.tolist()]
        own = logits[offset + b]
        if excluded is not None:
            del logits[excluded + b]
        total += math.log(sum(math.exp(logit) for logit in logits)) - own
    return total / len(rows)


def plain(rows: Tensor, keys: Tensor, offset: int, excluded: int | None) -> Tensor:
    logits = rows @ keys.mT
    if excluded is not None:
        itself = torch.arange(len(rows)).unsqueeze(1) + excluded == torch.arange(len(keys))
        logits = logits.masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(offset, offset + len(rows)))


def values(function: Any, *inputs: Tensor) -> list[Tensor]:
    """The loss and its gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


def assert_equal(found: list[Tensor], expected: list[Tensor], relative: float) -> None:
    """Relative to each tensor's largest entry."""
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=relative * float(y.abs().max()))


@pytest.mark.parametrize(("offset", "excluded"), [(0, None), (4, None), (0, 6), (5, 0), (2, 6)])
@pytest.mark.parametrize("block", [1, 2, 5, 7, 100])
def test_equals_a_plain_loop(units: Any, monkeypatch: Any, offset: int, excluded: int | None, block: int) -> None:
    rows, keys = 9 * units(7, 5), units(13, 5)
    monkeypatch.setattr(chunked, "BLOCK_BYTES", block * len(keys) * 8)
    found = values(lambda *x: chunked.cross_entropy(*x, offset, excluded), rows, keys)
    assert found[0].item() == pytest.approx(loop(rows, keys, offset, excluded), rel=1e-13)
    assert_equal(found, values(lambda *x: plain(*x, offset, excluded), rows, keys), 1e-14)
    monkeypatch.setattr(chunked, "BLOCK_BYTES", block * len(keys) * 4)
    single = values(lambda *x: chunked.cross_entropy(*x, offset, excluded), rows.float(), keys.float())
    assert all(x.dtype == torch.float32 for x in single)
    assert_equal([x.double() for x in single], found, 1e-6)


@pytest.fixture
def small_blocks(monkeypatch: Any) -> None:
    monkeypatch.setattr(chunked, "BLOCK_BYTES", 3 * 8 * 8)


TERMS = {
    "cross_entropy_to_keys": (lambda a, b, s, **k: cross_entropy_to_keys(a[0], b[0], s, 2, **k), 1),
    "info_nce": (lambda a, b, s, **k: info_nce(a[0], a[1], b[0], b[1], s, 2, **k), 2),
    "multi_view": (lambda a, b, s, **k: multi_view(a, a.flip(0), b, b.flip(0), s, 2, **k), 6),
    "neighbor": (lambda a, b, s, **k: neighbor_contrast(a, b[:, 2:7], b.flip(0), s, 2, True, b, **k), 8),
    "nt_xent": (lambda a, b, s, **k: nt_xent(a[0], a[1], b[0], b[1], 0.1, 2, **k) * s, 2),
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", TERMS)
def test_every_term_is_the_same_above_the_limit_as_below(units: Any, name: str, monkeypatch: Any) -> None:
    term, matrices = TERMS[name]
    inputs = units(2, 5, 6), units(2, 8, 6), torch.tensor(14.3, dtype=torch.float64)
    calls = []
    inner = chunked.cross_entropy
    monkeypatch.setattr(chunked, "cross_entropy", lambda *x: calls.append(1) or inner(*x))
    elements = 5 * 8 * (2 if name == "nt_xent" else 1)
    expected = values(term, *inputs)
    below = values(lambda *x: term(*x, max_logit_bytes=elements * 8), *inputs)
    assert calls == []
    assert all(torch.equal(x, y) for x, y in zip(below, expected, strict=True))
    above = values(lambda *x: term(*x, max_logit_bytes=elements * 8 - 1), *inputs)
    assert len(calls) == matrices
    assert_equal(above, expected, 1e-13)
    a, b, _ = inputs
    for scale in (14.3, 1.0):
        torch.testing.assert_close(term(a, b, scale, max_logit_bytes=0), term(a, b, scale), rtol=1e-13, atol=0)


def test_precision(units: Any, check_precision: Any) -> None:
    check_precision(lambda *x: info_nce(*x, 100.0, max_logit_bytes=0), *(units(6, 8) for _ in range(4)))
    check_precision(lambda *x: nt_xent(*x, 0.01, max_logit_bytes=0), *(units(5, 8) for _ in range(4)))


def test_backward_is_deaf_to_autocast(units: Any) -> None:
    inputs = [units(6, 8).float(), units(9, 8).float()]
    expected = values(lambda *x: cross_entropy_to_keys(*x, 50.0, max_logit_bytes=0), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = values(lambda *x: cross_entropy_to_keys(*x, 50.0, max_logit_bytes=0), *inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_ranks_together_equal_the_whole_batch(units: Any, check_ranks: Any) -> None:
    check_ranks(lambda *x: info_nce(*x[:4], 10.0, x[4], max_logit_bytes=0), units(6, 5), units(6, 5))
    check_ranks(lambda *x: nt_xent(*x[:4], 0.1, x[4], max_logit_bytes=0), units(6, 5), units(6, 5))


def test_finite_for_the_hardest_pairs_and_nothing_for_one_alone() -> None:
    image = torch.eye(4)
    loss, rows, _ = values(lambda a, b: cross_entropy_to_keys(a, b, 100.0, max_logit_bytes=0), image, -image)
    assert loss.item() == pytest.approx(100 + math.log(3 + math.exp(-100)), rel=1e-6)
    assert rows.isfinite().all()
    assert cross_entropy_to_keys(image[:1], image[:1], 100.0, max_logit_bytes=0).item() == 0
    assert nt_xent(image[:1], image[1:2], image[:1], image[1:2], max_logit_bytes=0).item() == 0


@pytest.mark.usefixtures("small_blocks")
def test_never_waits_for_the_device(units: Any, no_device_reads: Any) -> None:
    a, b = units(2, 5, 6).requires_grad_(), units(2, 8, 6).requires_grad_()
    with no_device_reads():
        for term, _ in TERMS.values():
            term(a, b, torch.tensor(14.3), max_logit_bytes=0).backward()


@pytest.mark.parametrize("name", TERMS)
def test_nothing_of_the_matrix_s_size_is_made_or_kept(units: Any, monkeypatch: Any, name: str) -> None:
    term, _ = TERMS[name]
    a, b = units(2, 90, 6).requires_grad_(), units(2, 95, 6).requires_grad_()
    largest, kept = {}, {}
    monkeypatch.setattr(chunked, "BLOCK_BYTES", 10 * 95 * 8)
    for limit in (None, 0):
        sizes: list[int] = []

        def keep(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with Largest() as mode:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                loss = term(a, b, 14.3, max_logit_bytes=limit)
            loss.backward()
        largest[limit], kept[limit] = mode.elements, max(sizes)
    assert min(largest[None], kept[None]) >= 90 * 95, "the plain form is seen"
    assert largest[0] <= 2 * 95 * 6, "two views' features, 10 rows of logits"
    assert kept[0] <= 2 * 95 * 6


@pytest.mark.usefixtures("small_blocks")
def test_no_work_that_nobody_asked_for(units: Any) -> None:
    rows, keys = units(5, 6), units(8, 6)
    products: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm_"):
                products.append(name)
            return func(*args, **(kwargs or {}))

    def counted(rows: Tensor, keys: Tensor) -> int:
        products.clear()
        with Products():
            loss = cross_entropy_to_keys(rows, keys, 9.0, max_logit_bytes=0)
            if loss.requires_grad:
                loss.backward()
        return len(products)

    blocks = 2
    assert counted(rows, keys) == blocks, "logits once"
    with torch.no_grad():
        assert not cross_entropy_to_keys(rows.requires_grad_(), keys, 9.0, max_logit_bytes=0).requires_grad
    assert counted(rows, keys) == 3 * blocks, "logits twice, and the rows' gradient"
    assert counted(rows, keys.requires_grad_()) == 4 * blocks
    assert counted(rows.detach(), keys) == 3 * blocks


@pytest.mark.usefixtures("small_blocks")
def test_the_compiler_takes_it(units: Any) -> None:
    inputs = units(5, 6), units(8, 6), torch.tensor(14.3, dtype=torch.float64)
    term = torch.compile(lambda *x: cross_entropy_to_keys(*x, max_logit_bytes=0), backend="eager", fullgraph=True)
    assert_equal(values(term, *inputs), values(cross_entropy_to_keys, *inputs), 1e-13)


def late(images: Tensor, words: Tensor, scale: Tensor | float, limit: float | None = None) -> Tensor:
    """FILIP's term of the five middle pairs among all."""
    mask = torch.arange(words.shape[1]) < torch.arange(len(words))[:, None] % 4 + 1
    own = slice(2, 7)
    return late_interaction(images[own], words[own], mask[own], images, words, mask, scale, 2, max_logit_bytes=limit)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4])
def test_late_interaction_is_the_same_in_blocks(units: Any, rows: int) -> None:
    inputs = units(9, 3, 6), units(9, 4, 6), torch.tensor(7.0, dtype=torch.float64)
    expected = values(late, *inputs)
    assert_equal(values(lambda *x: late(*x, rows * 9 * 4 * 8), *inputs), expected, 1e-13)
    fits = values(lambda *x: late(*x, 5 * 9 * 4 * 8), *inputs)
    assert all(torch.equal(x, y) for x, y in zip(fits, expected, strict=True))


def test_late_interaction_in_blocks_keeps_no_positions(units: Any) -> None:
    images, words = units(40, 3, 6).requires_grad_(), units(40, 4, 6).requires_grad_()
    mask = torch.ones(40, 4, dtype=torch.bool)
    kept = {}
    for limit in (None, 5 * 40 * 4 * 8):
        sizes: list[int] = []

        def keep(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            late_interaction(images, words, mask, images, words, mask, 7.0, max_logit_bytes=limit)
        kept[limit] = max([0, *sizes])
    assert kept[None] == 40 * 4 * 40, "the positions of the maxima"
    assert kept[5 * 40 * 4 * 8] < 40 * 40
