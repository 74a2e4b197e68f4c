import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from declip.supervision import nearest_neighbor as module
from declip.supervision.nearest_neighbor import Queue

WIDTH = 4


def ordered(queue):
    """The features, oldest first."""
    return queue.features.roll(-queue.pointer, dims=0)[queue.size - len(queue) :]


pushes = st.lists(st.integers(0, 17), max_size=6)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 8), counts=pushes, seed=st.integers(0, 999))
def test_equals_a_plain_list_under_any_pushes(size, counts, seed):
    generator = torch.Generator().manual_seed(seed)
    queue, items = Queue(size, WIDTH), []
    for count in counts:
        features = torch.randn(count, WIDTH, generator=generator)
        queue.push(features)
        items = [*items, *(feature / feature.norm() for feature in features)][-size:]
        assert len(queue) == len(items)
        if items:
            expected = torch.stack(items)
            torch.testing.assert_close(ordered(queue), expected, rtol=0, atol=1e-6)
            queries = torch.randn(5, WIDTH, generator=generator)
            scores = (queries * queue.features[queue.nearest(queries)]).sum(dim=1)
            torch.testing.assert_close(scores, (queries @ expected.T).amax(dim=1), rtol=0, atol=1e-5)


def test_written_in_float32_at_length_1_and_without_gradient():
    queue = Queue(6, WIDTH)
    features = (100 * torch.randn(4, WIDTH)).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        queue.push(features)
    assert (queue.features.dtype, queue.features.requires_grad) == (torch.float32, False)
    expected = F.normalize(features.detach().float(), dim=1)
    torch.testing.assert_close(queue.features[:4], expected, rtol=0, atol=1e-7)


def test_searching_is_in_float32_even_inside_autocast():
    near = torch.tensor([[1.0, 0.001, 0, 0], [1.0, 0, 0, 0]])
    queue = Queue(2, WIDTH)
    queue.push(near)
    with torch.autocast("cpu", torch.bfloat16):
        slots = queue.nearest(torch.tensor([[1.0, 0.003, 0, 0], [1.0, -0.003, 0, 0]]))
    assert slots.tolist() == [0, 1]


@pytest.mark.parametrize("held", [64 * 300, 65 * 300 + 7, 300])
def test_searching_in_blocks_finds_the_same(monkeypatch, held):
    generator = torch.Generator().manual_seed(5)
    queue = Queue(400, 32)
    queue.push(torch.randn(300, 32, generator=generator))
    queries = torch.randn(200, 32, generator=generator)
    expected = queue.nearest(queries)
    sizes, argmax = [], torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda x, **k: sizes.append(x.numel()) or argmax(x, **k))
    monkeypatch.setattr(module, "SIMILARITIES_AT_ONCE", held)
    assert torch.equal(queue.nearest(queries), expected)
    assert max(sizes) <= held
    assert queue.nearest(queries[:0]).shape == (0,)
