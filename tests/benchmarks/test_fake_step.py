"""A step on a pretended GPU: its memory against a measured step, and that no step waits for the device."""

import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import profile

from conftest import TINY, WEIGHTS
from declip.errors import UserError
from declip.recipe.schema import Recipe
from declip.training.setup import plan_of
from declip.training.step import training_step

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from fake_step import FakeStep, _batch, fake_step, main

from pairs import InMemory
from parts import build

EVERY_LOSS = {**WEIGHTS["defilip"], "simclr": 0.2}
VIEW = {"scale": (0.5, 1.0)}


def recipe_of(losses: dict[str, float], train: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    train = {**TINY["train"], "batch_size": 4, "precision": "bf16", **(train or {})}
    return Recipe.model_validate({**TINY, "name": "tiny", "loss_weights": losses, **sections, "train": train})


@pytest.mark.parametrize(
    ("train", "sections"),
    [
        ({"length_buckets": 2, "grad_clip_norm": 1.0}, {"views": {"contrastive_view": VIEW}}),
        (
            {"grad_cache_chunk": 3, "optimizer": "muon", "ema_decay": 0.9},
            {"masked_language": {"mask_contrastive_text": False}},
        ),
    ],
)
def test_no_step_waits_for_the_device(train: dict[str, Any], sections: dict[str, Any]) -> None:
    losses = EVERY_LOSS if "views" in sections else WEIGHTS["declip"]
    found = fake_step(recipe_of(losses, train, **sections))
    assert found.waits == ()
    assert found.peak_bytes > found.state_bytes > 0


def test_what_waits_is_named() -> None:
    found = fake_step(recipe_of(WEIGHTS["clip"], {"max_nonfinite_steps": 1}))
    assert [wait.partition(".py")[0] for wait in found.waits] == ["step", "watchdogs"]
    assert all(wait.endswith(("is_nonzero", "_local_scalar_dense")) for wait in found.waits)


@pytest.mark.parametrize(
    ("model", "size", "options"),
    [
        ("declip_vit_tiny", 32, {"patch_size": 4, "embed_dim": 64, "depth": 2}),
        ("resnet50_clip", 64, {"depths": [1, 1, 1, 1]}),
    ],
)
def test_memory_and_operations_are_those_of_a_measured_step(model: str, size: int, options: dict[str, Any]) -> None:
    image = {"model": model, "size": size, "model_kwargs": options}
    recipe = recipe_of(WEIGHTS["declip"], {"batch_size": 16, "precision": "fp32"}, image=image)
    found = fake_step(recipe)
    built = build(recipe, InMemory(["a red circle"] * 16, size))
    parts, batch = built.step, _batch(16, plan_of(recipe), built.model.tokenizer.end, 16)
    training_step(parts, batch)
    parts.optimizer.zero_grad()
    with profile(profile_memory=True) as trace:
        training_step(parts, batch)
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    growth = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    state = sum(t.numel() * t.element_size() for t in parts.learner.state_dict().values() if t.ndim)
    moments = sum(t.numel() * 4 for values in parts.optimizer.state.values() for t in values.values())
    assert found.peak_bytes == pytest.approx(growth + state + moments, rel=0.1)
    assert found.parameters == sum(p.numel() for p in parts.learner.parameters())


def test_pretrained_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"finetune\.pretrained"):
        fake_step(recipe_of(WEIGHTS["clip"], finetune={"pretrained": "runs/demo"}))


def test_the_command_words_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fake_step", "demo-clip", "train.batch_size=2"])
    found = FakeStep("demo-clip", 2, 3_000_000, 10**12, 10**8, 2 * 10**9, ())
    monkeypatch.setattr("fake_step.fake_step", lambda recipe: replace(found, batch_size=recipe.train.batch_size))
    main()
    said = "A step of 2 pairs: 3.0 M parameters, 2.00 GB, of which 0.10 GB stay, 1.00 TFLOP, 0 waits of the host"
    assert said in capsys.readouterr().out
