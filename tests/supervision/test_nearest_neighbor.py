import copy
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from safetensors.torch import load, save

from declip.supervision import nearest_neighbor as module
from declip.supervision.nearest_neighbor import Queue
from golden_cases import loss_cases

WIDTH = 4


def ordered(queue):
    """The features, oldest first."""
    return queue.features.roll(-queue.pointer, dims=0)[queue.size - len(queue) :]


def rows(generator, n):
    return torch.randn(n, WIDTH, generator=generator)


class ListQueue:
    """The queue as a plain list of features, oldest first."""

    def __init__(self, size):
        self.size = size
        self.items = []

    def push(self, features):
        for feature in features.tolist():
            length = math.hypot(*feature)
            self.items.append([x / length for x in feature])
            self.items = self.items[-self.size :]

    def best(self, query):
        """The largest similarity to a query."""
        return max(sum(x * y for x, y in zip(query, f, strict=True)) for f in self.items)


pushes = st.lists(st.integers(0, 17), max_size=6)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 8), counts=pushes, seed=st.integers(0, 999))
def test_equals_a_plain_list_under_any_pushes(size, counts, seed):
    generator = torch.Generator().manual_seed(seed)
    queue, model = Queue(size, WIDTH), ListQueue(size)
    for count in counts:
        features = rows(generator, count)
        queue.push(features)
        model.push(features)
        assert len(queue) == len(model.items)
        expected = torch.tensor(model.items).reshape(-1, WIDTH)
        torch.testing.assert_close(ordered(queue), expected, rtol=0, atol=1e-6)
        if len(queue):
            queries = rows(generator, 5)
            scores = (queries * queue.features[queue.nearest(queries)]).sum(dim=1)
            assert scores.tolist() == pytest.approx([model.best(query) for query in queries.tolist()], abs=1e-5)


def assert_same(queue, other):
    state, expected = queue.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert (len(queue), queue.pointer) == (len(other), other.pointer)


@pytest.mark.golden
@pytest.mark.parametrize("bank", loss_cases("nn_bank"))
def test_against_the_authors_bank(golden, bank):
    """Same slots, pointer and neighbors, but the rows that they drop at the end go on at the front.

    Theirs starts from random vectors and stores what it is given; ours stores rows of length 1. So each of their
    states is put in, and where they fill the end exactly or not at all the outcomes are the same.
    """
    case = golden(bank)
    size = int(case["size"])
    for op in range(int(case["n_ops"])):
        step = {k.removeprefix(f"op{op}/"): v for k, v in case.items() if k.startswith(f"op{op}/")}
        before, query = step["bank_before"].T, step["query"]
        queue = Queue(size, before.shape[1])
        queue.push(before)
        queue.pointer = start = int(step["ptr_before"])
        assert torch.allclose(queue.features.norm(dim=1), torch.ones(size))
        slots = queue.nearest(query)
        if torch.allclose(before.norm(dim=1), torch.ones(size)):
            torch.testing.assert_close(queue.features[slots], step["output"][0], rtol=0, atol=1e-6)
        else:
            assert torch.equal(slots, (query @ queue.features.T).argmax(dim=1))
        if not step["update"]:
            continue
        queue.push(query)
        tail = len(query) - (size - start)
        if tail <= 0:
            assert queue.pointer == int(step["ptr_after"])
            expected = F.normalize(step["bank_after"].T, dim=1)
            torch.testing.assert_close(queue.features, expected, rtol=0, atol=1e-6)
        else:
            assert int(step["ptr_after"]) == 0
            assert queue.pointer == tail % size
            torch.testing.assert_close(queue.features[:tail], F.normalize(query[-tail:], dim=1))


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


@pytest.mark.parametrize("count", [0, 3, 8])
def test_a_saved_queue_continues_as_if_never_stopped(count):
    generator = torch.Generator().manual_seed(3)
    queue = Queue(5, WIDTH)
    queue.push(rows(generator, count))
    more, other = rows(generator, 3), Queue(5, WIDTH)
    other.load_state_dict(load(save(queue.state_dict())))
    for each in (other, copy.deepcopy(queue)):
        assert_same(each, queue)
        reference = copy.deepcopy(queue)
        for pushed in (each, reference):
            pushed.push(more)
        assert_same(each, reference)
