import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from conftest import TINY, in_processes
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision import nearest_neighbor as module
from declip.supervision.nearest_neighbor import NearestNeighbor, Queue
from declip.supervision.term import Encodings, Rows, Similarity
from declip.training import distributed

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
            torch.testing.assert_close(
                scores, (queries @ expected.T).amax(dim=1), rtol=0, atol=1e-5
            )


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
    monkeypatch.setattr(
        torch.Tensor, "argmax", lambda x, **k: sizes.append(x.numel()) or argmax(x, **k)
    )
    monkeypatch.setattr(module, "SIMILARITIES_AT_ONCE", held)
    assert torch.equal(queue.nearest(queries), expected)
    assert max(sizes) <= held
    assert queue.nearest(queries[:0]).shape == (0,)


ROWS, STEPS, SIZE = 3, 4, 10


def drawn(rank, step, what):
    """Features (2, ROWS, d) of length 1 of two views, of a process at a step."""
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + what)
    width = TINY["embed_dim"]
    return F.normalize(
        torch.randn(2, ROWS, width, generator=generator, dtype=torch.float64), dim=-1
    )


def losses_with_own_queues():
    """The loss of this process at each step."""
    queue = {"queue_size": SIZE, "queue_per_process": True}
    tree = {**TINY, "loss_weights": {"nearest_neighbor": 1.0}, "nearest_neighbor": queue}
    recipe = Recipe.model_validate(tree)
    model = DualEncoder(recipe)
    term = NearestNeighbor(recipe, model).double()
    gather = distributed.gather([ROWS, ROWS])
    scale = Similarity(torch.tensor(5.0))
    found = []
    for step in range(STEPS):
        images, texts = drawn(distributed.rank(), step, 0), drawn(distributed.rank(), step, 1)
        features = term.features(Encodings(images, texts, None, None))
        own = Rows(("first", "second"), images, texts, features)
        everyone = {name: gather(rows) for name, rows in features.items()}
        all_texts = gather(texts.transpose(0, 1)).transpose(0, 1)  # (2, 2 · ROWS, d)
        keys = Rows(own.views, images, all_texts, everyone)
        found.append(term.loss(own, keys, scale, ROWS * distributed.rank()).item())
        term.after_step(model)
    return found


def looped():
    """The same by plain loops: (processes, steps)."""
    queues, found = [[], []], [[], []]
    for step in range(STEPS):
        neighbors = [[], []]  # of each text view, of all processes
        for rank in range(2):
            for view in range(2):
                for text in drawn(rank, step, 1)[view]:
                    if queues[rank]:
                        cosines = [float(text @ key) for key in queues[rank]]
                        neighbors[view].append(queues[rank][cosines.index(max(cosines))])
        for rank in range(2):
            terms = []
            for image_view in drawn(rank, step, 0):
                for keys in neighbors:
                    for row, image in enumerate(image_view):
                        if keys:
                            logits = torch.stack([5.0 * image @ key for key in keys])
                            terms.append(logits.logsumexp(0) - logits[ROWS * rank + row])
            found[rank].append(float(torch.stack(terms).mean()) if terms else 0.0)
            for view in (1, 0):
                queues[rank] += list(drawn(rank, step, 1)[view])
            queues[rank] = queues[rank][-SIZE:]
    return found


def test_a_queue_per_process_holds_and_finds_its_own_captions(tmp_path):
    found = in_processes(losses_with_own_queues, 2, tmp_path)
    assert found == [pytest.approx(losses, abs=1e-6) for losses in looped()]
    assert found[0][1] > 0
