"""Send SIGKILL at chosen moments of a run, and compare the resumed run with an uninterrupted one.

    python benchmarks/kills.py --kills 50 --seed 0 --out runs/kills.jsonl

Every kill uses a recipe, one or two processes, zero or one loader process, a moment (before or after a call of the
functions below) and a step. The killed run is restarted until it ends; weights, optimizer state, queue, generators,
metrics and the order of pairs must then equal those of the uninterrupted run to the last bit.
"""

import argparse
import json
import logging
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.progress import track

from declip.data.loader import Assembler
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.runs import checkpoint
from declip.runs.checkpoint import list_checkpoints, load_checkpoint
from declip.runs.folder import METRICS, read_rows
from declip.supervision.objective import Objective
from declip.training import sinks, trainer
from declip.training.assemble import assemble
from declip.training.trainer import Trainer

RECIPES = tuple(
    f"demo-{name}" for name in ("few-clip", "slip", "few-declip", "declip", "multi-view")
)
STEPS = 24
SMALL = {
    "train.steps": STEPS, "train.batch_size": 16, "train.checkpoint_every": 5, "train.log_every": 2,
    "train.keep_checkpoints": 2,
    "train.evaluate_every": 0, "train.warmup_steps": 4, "data.max_pairs": 100,
    "image.model": "declip_vit_tiny", "image.model_kwargs": {"depth": 1, "embed_dim": 64}, "text.width": 32,
    "text.bpe_merges": 300, "text.heads": 2, "embed_dim": 32, "nearest_neighbor.queue_size": 64,
    "evaluation.zero_shot": [], "evaluation.retrieval": [], "evaluation.final_zero_shot": [],
    "evaluation.final_retrieval": [],
}  # fmt: skip

CLOCK = ("seconds", "samples_per_second")
"""Fields of metrics that depend on the time."""

MOMENTS: dict[str, tuple[Any, str]] = {
    "data": (Assembler, "__getitem__"),
    "forward": (Objective, "forward"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (torch.optim.AdamW, "step"),
    "logging": (sinks, "append_row"),
    "flushing the log": (sinks.Monitor, "flush"),
    "taking the state": (trainer, "collect"),
    "writing the checkpoint's tensors": (checkpoint, "save_tensors"),
    "hashing the checkpoint": (checkpoint, "sha256"),
    "flushing the checkpoint": (checkpoint, "flush"),
    "removing an old checkpoint": (checkpoint, "remove"),
}
"""Moment of the kill → the function that is called then."""


def run(
    rank: int, ranks: int, meeting: str, recipe: Recipe, folder: str, kill: dict[str, Any] | None
) -> None:
    """Run one process of a run until it ends or is killed."""
    warnings.simplefilter("ignore")
    logging.getLogger("declip").setLevel(logging.CRITICAL)
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the survivor of a killed pair prints errors
    if ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks
        )
    if kill is not None and rank == kill["rank"]:
        _arm(kill)
    try:
        Trainer(assemble(recipe, Path(folder), resume=True), progress=False).train()
    except BaseException:
        os._exit(1)
    os._exit(0)


def _arm(kill: dict[str, Any]) -> None:
    """Make a function kill this process at one of its calls."""
    owner, name = MOMENTS[kill["moment"]]
    original: Callable[..., Any] = getattr(owner, name)
    left = [kill["call"]]

    def deadly(*arguments: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and kill["before"]:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **keywords)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def start(
    ranks: int, recipe: Recipe, folder: Path, kill: dict[str, Any] | None = None
) -> list[int]:
    """Run to the end or to the kill, and return exit codes by rank."""
    fork = mp.get_context("fork")
    meeting = f"{folder}.meet{time.monotonic_ns()}"
    processes = [
        fork.Process(target=run, args=(rank, ranks, meeting, recipe, str(folder), kill))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [int(process.exitcode or 0) for process in processes]


def difference(one: Path, other: Path) -> str | None:
    """Return the first difference of two finished runs, or None if they are equal to the last bit."""
    first, second = (load_checkpoint(list_checkpoints(folder)[-1]) for folder in (one, other))
    if first.step != second.step or first.step != STEPS:
        return f"steps {first.step} and {second.step}"
    for mine, theirs in ((first.weights, second.weights), (first.training, second.training)):
        for name in mine.keys() | theirs.keys():
            if name not in mine or name not in theirs or not torch.equal(mine[name], theirs[name]):
                return name
    rows = [
        [{k: v for k, v in row.items() if k not in CLOCK} for row in read_rows(f / METRICS)]
        for f in (one, other)
    ]
    if rows[0] != rows[1]:
        return "metrics.jsonl"
    return (
        None
        if (one / "skipped.json").read_text() == (other / "skipped.json").read_text()
        else "skipped.json"
    )


def main() -> None:
    """Kill, resume and compare runs, and write the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert all(hasattr(owner, name) for owner, name in MOMENTS.values())
    choose = random.Random(options.seed)
    done: list[dict[str, Any]] = []
    with TemporaryDirectory() as place:
        whole: dict[tuple[str, int], Path] = {}
        for number in track(range(options.kills), "killing"):
            name, ranks = RECIPES[number % len(RECIPES)], 1 + number % 2
            moment = list(MOMENTS)[number % len(MOMENTS)]
            recipe = load_recipe(name, {**SMALL, "data.workers": choose.randrange(2)})
            if (name, ranks) not in whole:
                whole[name, ranks] = Path(place) / f"{name}-{ranks}"
                assert start(ranks, recipe, whole[name, ranks]) == [0] * ranks
            calls = STEPS - 2 if moment in ("data", "forward", "backward", "optimizer") else 4
            kill = {
                "moment": moment, "call": choose.randint(1, calls), "before": choose.random() < 0.5,
                "rank": choose.randrange(ranks) if calls > 4 else 0,
            }  # fmt: skip
            folder = Path(place) / f"killed-{number}"
            codes = start(ranks, recipe, folder, kill)
            starts = 1
            while start(ranks, recipe, folder) != [0] * ranks and starts < 5:
                starts += 1
            row = {
                "recipe": name,
                "processes": ranks,
                "loader processes": recipe.data.workers,
                **kill,
            }
            row["killed"] = codes != [0] * ranks  # a killed loader process ends its run too
            row["differs in"] = difference(whole[name, ranks], folder)
            done.append(row)
    killed = [row for row in done if row["killed"]]
    survived = [row for row in killed if row["differs in"] is None]
    summary = {
        "kills": len(killed), "survived": len(survived), "runs that ended before their kill": len(done) - len(killed),
        "by moment": Counter(row["moment"] for row in killed), "torch": torch.__version__, "seed": options.seed,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        "".join(f"{json.dumps(row)}\n" for row in (summary, *done)), encoding="utf-8"
    )
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")
    sys.exit(0 if len(survived) == len(killed) else 1)


if __name__ == "__main__":
    main()
