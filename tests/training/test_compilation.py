"""Blocks and augmentation, compiled: the same numbers, few graphs. The backend needs no compiler of C++."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import Lazy
from data.images.test_crops import MEAN, STD, applied, colors, sampled, transform
from declip.data.batch import unpack_photometric
from declip.data.images import fused_views
from declip.models import device
from declip.models.dual_encoder import DualEncoder
from declip.models.layers import blocks_of
from declip.training.assemble import assemble
from declip.training.parallel import compile_blocks
from training.starts import CONV, VIT, recipe_for, trainer_of

testing = Lazy("torch._dynamo.testing")
TWO_BLOCKS = {**VIT, "model_kwargs": {**VIT["model_kwargs"], "depth": 2}}
# the tracer looks at the gradient of every tensor
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("image", "keys", "backend"),
    [
        (TWO_BLOCKS, {"grad_checkpointing": True}, "aot_eager"),
        (CONV, {"grad_cache_chunk": 4}, "eager"),
    ],
)
def test_a_compiled_run_learns_what_a_plain_one_does(table, tmp_path, image, keys, backend):
    ends, counter = [], testing.CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    for name in ("plain", "compiled"):
        recipe = recipe_for(table, "clip", {"image": image}, steps=2, **keys)
        trainer = trainer_of(recipe, tmp_path / name)
        if name == "compiled":
            assert compile_blocks(trainer.state.model, counter) > 1
        run = trainer.train()
        ends.append((run.metrics[-1]["loss"], trainer.state.model.state_dict()))
    assert counter.frame_count > 0
    (loss, plain), (compiled_loss, compiled) = ends
    assert compiled_loss == pytest.approx(loss, rel=1e-4)
    assert plain.keys() == compiled.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-3, atol=1e-5, msg=name)


def test_a_block_that_cannot_be_compiled_is_an_error(table):
    def broken(graph, inputs):
        raise ValueError("no compiler")

    torch._dynamo.reset()
    model = DualEncoder(recipe_for(table, sections={"image": VIT}))
    compile_blocks(model, broken)
    with pytest.raises(Exception, match="no compiler"):
        model.image_tower(torch.zeros(2, 3, 32, 32))
    torch._dynamo.reset()


def test_blocks_share_three_graphs_for_all_sizes(table, counter):
    model = DualEncoder(
        recipe_for(table, sections={"text": {"width": 32, "layers": 4, "heads": 2}})
    )
    compile_blocks(model, counter)
    graphs = []
    for rows, length in [(16, 16), (15, 16), (9, 16), (16, 32), (7, 32)]:
        model.text_tower(torch.full((rows, length), model.tokenizer.end)).pooled.sum().backward()
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 3, 3]
    model.eval()
    model.text_tower(torch.full((4, 48), model.tokenizer.end))
    assert counter.frame_count == 3


@pytest.mark.parametrize("size", [8, 24])
def test_views_in_one_pass_equal_those_in_groups(size):
    maker, mean, std = transform(size), torch.tensor(MEAN), torch.tensor(STD)
    images, params = colors(300, size), sampled(maker, 300, np.random.default_rng(0))
    found = fused_views.apply(images, params, mean, std)
    torch.testing.assert_close(found, applied(images, params), rtol=0, atol=1e-5)


def test_color_changes_are_one_graph_for_any_number_of_images(counter):
    maker, mean, std = transform(), torch.tensor(MEAN), torch.tensor(STD)
    finish = fused_views.compiled(counter)
    for count in (12, 11, 7):
        images, params = colors(count), sampled(maker, count, np.random.default_rng(count))
        torch.testing.assert_close(
            finish(images, params, mean, std), applied(images, params), rtol=0, atol=1e-5
        )
    assert counter.frame_count == 1


class Copied(TorchDispatchMode):
    """Counts the numbers that are copied from the host to the device "meta"."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].is_cpu and out.is_meta:
            self.numbers += out.numel()
        return out


def test_views_copy_few_numbers_to_the_device():
    """Nine of each image; of a blurred one its row and the 13 weights of its blur, not their matrix."""
    params = sampled(transform(24), 100, np.random.default_rng(0))
    blurred = int(unpack_photometric(params).sigma.count_nonzero())
    images = torch.empty(100, 3, 24, 24, dtype=torch.uint8, device="meta")
    mean, std = (torch.tensor(values, device="meta") for values in (MEAN, STD))
    with Copied() as copied:
        fused_views.apply(images, params, mean, std)
    assert blurred > 10
    assert copied.numbers == 9 * 100 + 14 * blurred


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_compiles_blocks_and_views_if_asked(table, tmp_path, monkeypatch, asked):
    compiled = []
    monkeypatch.setattr(device, "COMPILED_ON", ("cpu",))
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compiled.append(function) or function
    )
    recipe = recipe_for(table, "clip", {"image": VIT}, steps=1, compile=asked)
    state = assemble(recipe, tmp_path)
    state.lock.close()
    blocks = [*blocks_of(state.model.image_tower), *blocks_of(state.model.text_tower)]
    assert len(compiled) == (len(blocks) + 1 if asked else 0)
    assert (fused_views.change_colors in compiled) == asked
