"""Seconds of a demo-size training step and the fraction spent on loading, each part alone and in a real run."""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

from declip.data.batch import PairBatch
from declip.data.loader import PairLoader
from declip.data.pair import PairSource
from declip.errors import UserError
from declip.recipe.load import load_recipe
from declip.training.step import training_step
from declip.training.trainer import Trainer
from pairs import open_pairs
from parts import build
from timing import row, take_turns

RECIPES = ("demo-clip", "demo-declip")
STEPS, WARM = 25, 5
"""Steps of a real run, and those before the clock counts."""

NOTHING_ELSE = {
    "train.steps": STEPS, "train.log_every": STEPS, "train.checkpoint_every": STEPS, "train.evaluate_every": 0,
    "train.warmup_steps": 2, "evaluation.zero_shot": [], "evaluation.retrieval": [],
    "evaluation.final_zero_shot": [], "evaluation.final_retrieval": [],
}  # fmt: skip


def tasks_of(name: str, source: PairSource) -> tuple[int, dict[str, Callable[[], object]]]:
    """Batch size of a recipe and its two tasks: load the next batch in this process, and train on it."""
    recipe = load_recipe(name, {"data.workers": 0})
    built = build(recipe, source)
    batch = [next(built.loader)]

    def load() -> None:
        batch[0] = next(built.loader)

    return recipe.train.batch_size, {
        f"{name}: load": load,
        f"{name}: train": lambda: training_step(built.step, batch[0]),
    }


def measure(repeats: int) -> list[dict[str, object]]:
    """Load and train take turns, and the recipes too: clip, declip, clip, declip …; then a run of each.

    Loading is reading, cropping and tokenizing; color changes are applied to the batch and belong to the step.
    """
    source, batches = open_pairs(), {}
    tasks: dict[str, Callable[[], object]] = {}
    for name in RECIPES:
        batches[name], of_this = tasks_of(name, source)
        tasks |= of_this
    seconds = take_turns(repeats, tasks)
    whole = {name: seconds[f"{name}: load"] + seconds[f"{name}: train"] for name in RECIPES}
    rows = []
    for name in RECIPES:
        fraction = round(seconds[f"{name}: load"] / whole[name], 3)
        more = {"pairs": source.name, "threads": torch.get_num_threads(), "loading_fraction": fraction}
        rows.append(row("demo", f"recipe {name}", whole[name], batches[name], "pairs", **more))
        rows[-1]["seconds_a_step"] = round(whole[name], 4)
    rows[-1]["times_clip"] = round(whole["demo-declip"] / whole["demo-clip"], 2)
    try:
        return rows + [in_a_run(name, workers) for name in RECIPES for workers in (0, 1)]
    except UserError as error:
        return [*rows, {"part": "demo", "note": f"no real run: {error}"}]


def in_a_run(name: str, workers: int) -> dict[str, object]:
    """Train for some steps with the trainer, and time how long it waits for batches."""
    recipe = load_recipe(name, {**NOTHING_ELSE, "data.workers": workers})
    asked: list[float] = []
    waited: list[float] = []
    following = PairLoader.__next__

    def clocked(loader: PairLoader) -> PairBatch:
        asked.append(time.perf_counter())
        batch = following(loader)
        waited.append(time.perf_counter() - asked[-1])
        return batch

    with TemporaryDirectory() as folder, patch.object(PairLoader, "__next__", clocked):
        Trainer(recipe, Path(folder) / "run", quiet=True).train()
    steps = [after - before for before, after in pairwise(asked)][WARM:]
    waits = waited[WARM : WARM + len(steps)]
    more = {"steps": len(steps), "threads": torch.get_num_threads(), "seconds_a_step": round(median(steps), 4)}
    fraction = round(sum(waits) / sum(steps), 3)
    what = f"recipe {name}, a run, {workers} loading processes"
    return row(
        "demo", what, sum(steps), len(steps) * recipe.train.batch_size, "pairs", loading_fraction=fraction, **more
    )
