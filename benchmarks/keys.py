"""What each recipe key that changes no result, or hardly any, does to the speed of a step.

    python benchmarks/keys.py --repeats 5 --json keys.json
    python benchmarks/keys.py --recipe demo-clip --only train.compile=true,train.length_buckets=4

For each key two trainers of a demo-size recipe, with the key and without it, take turns of some steps, loading
included (A B A B …). The numbers are medians of the turns; nothing is asserted about them.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from declip.recipe.load import load_recipe, parse_overrides
from declip.training.step import training_step
from declip.training.trainer import Trainer
from machine import machine

STEPS, WARM = 12, 2
"""Steps of a turn, and turns of each that do not count: they compile, and fill caches."""

NOTHING_ELSE = {
    "evaluation.zero_shot": [],
    "evaluation.retrieval": [],
    "evaluation.final_zero_shot": [],
    "evaluation.final_retrieval": [],
}
CONV, VIT = "declip_conv_tiny", "declip_vit_tiny"
KEYS = {
    "train.precision=fp32": (CONV, VIT),
    "train.channels_last=false": (CONV,),
    "train.length_buckets=4": (CONV, VIT),
    "image.shared_bn_views=true": (CONV,),
    "data.workers=1": (CONV, VIT),
    "train.grad_checkpointing=true": (VIT,),
    "train.grad_cache_chunk=32": (VIT,),
    "train.compile=true": (CONV, VIT),
}
"""Keys, each against the demo recipes' own value, and the image towers on which it is looked at."""


def turn(trainer: Trainer) -> float:
    """Seconds of a step."""
    with trainer.learning():
        start = time.perf_counter()
        for _ in range(STEPS):
            training_step(trainer.parts, next(trainer.loader))
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return (time.perf_counter() - start) / STEPS


def compare(recipe: str, key: str, tower: str, repeats: int) -> dict[str, Any]:
    """A key against the recipe without it."""
    common = {**NOTHING_ELSE, "image.model": tower, "data.workers": 0}
    with TemporaryDirectory() as folder:
        trainers = {
            name: Trainer(load_recipe(recipe, common | more), Path(folder) / name, quiet=True)
            for name, more in (("without", {}), ("with", parse_overrides([key])))
        }
        taken: dict[str, list[float]] = {name: [] for name in trainers}
        for number in range(WARM + repeats):
            for name, trainer in trainers.items():
                seconds = turn(trainer)
                if number >= WARM:
                    taken[name].append(seconds)
        for trainer in trainers.values():
            trainer.loader.close()
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    ratios = [a / b for a, b in zip(taken["with"], taken["without"], strict=True)]
    return {
        "part": "keys",
        "recipe": recipe,
        "key": key,
        "image": tower,
        "seconds": seconds,
        "ratio": seconds["with"] / seconds["without"],
        "ratio_range": [min(ratios), max(ratios)],
    }


def main() -> None:
    """Measure, show a table, and print the JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo-declip")
    parser.add_argument("--only", help=f"keys, with commas between; default: {', '.join(KEYS)}")
    parser.add_argument("--image", help="one image tower; default: those on which the key makes a difference")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    about, rows, console = machine(), [], Console(stderr=True)
    table = Table("key", "image tower", "without, s a step", "with", "ratio", "of single turns")
    for key in options.only.split(",") if options.only else KEYS:
        for tower in (options.image,) if options.image else KEYS.get(key, (CONV, VIT)):
            rows.append(found := compare(options.recipe, key, tower, options.repeats))
            seconds, (low, high) = found["seconds"], found["ratio_range"]
            numbers = (f"{seconds['without']:.3f}", f"{seconds['with']:.3f}", f"{found['ratio']:.2f}")
            table.add_row(key, tower, *numbers, f"{low:.2f} to {high:.2f}")
            console.print(f"{key}, {tower}: {found['ratio']:.2f}")  # a run takes minutes: what is done is shown
    console.print(table)
    result = json.dumps({"machine": about, "repeats": options.repeats, "rows": rows})
    if options.json:
        options.json.write_text(result + "\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
