"""Losses in blocks: the values and gradients of the plain form, and nothing of the matrix's size."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from declip.supervision import chunked
from declip.supervision.contrastive import cross_entropy_to_keys


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
