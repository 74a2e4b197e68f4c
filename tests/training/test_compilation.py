"""The towers compiled: which batches are, and that nothing else changes. Backends that need no compiler of C++."""

import functools
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from declip.api import train
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.supervision.objective import Objective
from declip.training import compilation
from declip.training.assemble import assemble, plan_of
from declip.training.compilation import compile_towers
from declip.training.trainer import Trainer
from training.starts import CONV, recipe_for


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """torch.compile as it is, but for what turns a graph into machine code; counts the graphs."""
    counted = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    monkeypatch.setattr(compilation.torch, "compile", functools.partial(torch.compile, backend=counted))
    return counted


def tokens(model: DualEncoder, rows: int, length: int) -> torch.Tensor:
    ids = torch.ones(rows, length, dtype=torch.int64)
    ids[:, -1] = model.tokenizer.end
    return ids


@pytest.mark.parametrize("keys", [{"grad_checkpointing": True}, {"grad_cache_chunk": 4, "ema_decay": 0.9}])
def test_a_compiled_run_learns_what_a_plain_one_does(
    table: Path, tmp_path: Path, counter: CompileCounterWithBackend, keys: dict[str, object]
) -> None:
    plain = train(recipe_for(table, steps=4, **keys), out=tmp_path / "plain", quiet=True, report=False)
    assert counter.frame_count == 0
    recipe = recipe_for(table, steps=4, compile=True, **keys)
    compiled = train(recipe, out=tmp_path / "compiled", quiet=True, report=False)
    assert counter.frame_count >= 2
    for given, expected in zip(compiled.metrics, plain.metrics, strict=True):
        assert given["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert given["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_compiled_are_whole_batches_in_training_with_few_lengths(
    table: Path, counter: CompileCounterWithBackend
) -> None:
    recipe = recipe_for(table, sections={"views": {"image_second": {"size": 16, "start": 0.5}}})
    torch.manual_seed(0)
    model = DualEncoder.from_recipe(recipe)
    objective = Objective(recipe, model)
    compile_towers(recipe, model, objective, plan_of(recipe))
    image_tower, text_tower = objective.compiled["image_tower"], objective.compiled["text_tower"]

    graphs = []
    for rows, length in [(16, 9), (16, 12), (16, 16), (16, 10), (14, 12), (16, 3)]:
        ids = tokens(model, rows, length)
        found, expected = text_tower(ids), model.text_tower(ids)
        torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.text_tokens, expected.text_tokens, rtol=1e-5, atol=1e-6)
        assert found.lengths.tolist() == [length] * rows
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1, 1, 1, 1]  # the context is 16: one length; 14 captions are no whole batch

    for rows, size, count in ((8, 32, 2), (8, 16, 3), (16, 32, 3), (7, 32, 3)):  # alone until the second view starts
        image_tower(torch.randn(rows, 3, size, size))
        assert counter.frame_count == count
    model.eval()
    image_tower(torch.randn(8, 3, 32, 32))
    text_tower(tokens(model, 16, 9))
    assert counter.frame_count == 3


def test_recomputing_a_tower_with_batch_norm_is_refused(table: Path, tmp_path: Path) -> None:
    recipe = recipe_for(table, sections={"image": CONV}, compile=True, grad_checkpointing=True)
    with pytest.raises(UserError, match="'declip_conv_tiny'"):
        Trainer(assemble(recipe, tmp_path / "run", quiet=True))


def test_of_frozen_towers_that_are_read_from_a_cache_nothing_is_compiled(
    table: Path, start: Path, tmp_path: Path, counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    tune = {"pretrained": str(start), "freeze_image_blocks": "all", "freeze_text_blocks": "all", "cached_views": 2}
    recipe = recipe_for(table, "clip", {"finetune": tune}, compile=True)
    assert train(recipe, out=tmp_path / "run", quiet=True, report=False).finished
    assert counter.frame_count == 0
