"""Runs of losses that prepare themselves from the training pairs: training, resuming, and cached features."""

import json
from pathlib import Path

import torch

from conftest import TINY
from declip.api import train
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import load_checkpoint
from training.starts import same_end, stop_at

WEIGHTS = {"contrastive": 1.0, "word_classification": 0.5, "ema_distillation": 0.5}


def test_a_resumed_run_equals_one_never_interrupted(table: Path, tmp_path: Path) -> None:
    rows = [{**json.loads(line), "thing": n // 2} for n, line in enumerate(table.read_text().splitlines())]
    given = table.with_name("groups.jsonl")
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {**TINY, "loss_weights": WEIGHTS, "data": {"source": str(given), "group_column": "thing", "workers": 0}}
    tree["contrastive"] = {"duplicates": "positives", "label_smoothing": 0.1, "self_distillation": 0.5}
    recipe = Recipe.model_validate(tree)
    run = train(recipe, out=tmp_path / "whole", quiet=True, report=False)
    stop_at(recipe, tmp_path / "parts", 4)
    assert train(recipe, out=tmp_path / "parts", resume=True, quiet=True, report=False).finished
    same_end(tmp_path / "whole", tmp_path / "parts")
    assert set(run.metrics[0]["losses"]) == set(WEIGHTS)
    checkpoint = load_checkpoint(tmp_path / "whole" / "checkpoints" / "last")
    saved = checkpoint.training
    teacher = saved["objective.terms.ema_distillation.image_tower.proj.weight"]
    assert saved["objective.terms.word_classification.idf"].max() > 0
    assert not torch.equal(teacher, checkpoint.weights["model.image_tower.proj.weight"])
