"""Watch memory, open files and speed of a long run whose loader processes are restarted.

    python benchmarks/soak.py --steps 20000 --restart-every 2000 --out runs/soak

One process trains the demo's recipe, for so many steps or so many hours, whichever ends first. Every
`--restart-every` steps its loading processes are replaced by new ones. Linux only: numbers are read from /proc.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.training.assemble import assemble, build_loader
from declip.training.distributed import HostGroup, StepSync
from declip.training.trainer import Trainer

LOOK_EVERY = 50
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(process: int) -> int:
    """Return the resident memory of a process without shared memory, in bytes."""
    whole, shared = Path(f"/proc/{process}/statm").read_text().split()[1:3]
    return (int(whole) - int(shared)) * PAGE


def children() -> list[int]:
    """Return the ids of this process's living children."""
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(process) for process in found]


def looked(step: int, started: float) -> dict[str, float]:
    """Measure memory, open files and threads."""
    own = os.getpid()
    return {
        "step": step,
        "seconds": round(time.perf_counter() - started, 2),
        "MB": round(resident(own) / 1e6, 2),
        "MB of loaders": round(sum(map(resident, children())) / 1e6, 2),
        "files": len(list(Path(f"/proc/{own}/fd").iterdir())),
        "threads": len(list(Path(f"/proc/{own}/task").iterdir())),
    }


class Watch(HostGroup):
    """Looks at the process before steps of a run, replaces its loader, and ends the run when its time is over.

    The rows are saved as they come: a watch of hours that is cut off loses few of them.
    """

    def __init__(self, recipe: Recipe, folder: Path, kept: Path, restart_every: int, seconds: float) -> None:
        super().__init__()
        self.kept, self.restart_every, self.seconds, self.rows = kept, restart_every, seconds, list[dict[str, float]]()
        state = assemble(recipe, folder, quiet=True)
        state.hosts = self
        self.trainer = Trainer(state)
        self.started = time.perf_counter()

    def sync_step(self, step: int, rows: int, stop: bool, *rest: Any) -> StepSync:
        trainer, state = self.trainer, self.trainer.state
        if step % LOOK_EVERY == 0:
            self.rows.append(looked(step, self.started))
            self.kept.write_text(json.dumps(self.rows) + "\n", encoding="utf-8")
        if step and step % self.restart_every == 0:
            trainer.loader.close()
            loader = build_loader(state.recipe, state.source, state.model, state.workers)
            loader.step, loader.skipped = step, state.progress.skipped
            loader.seen = step * state.recipe.train.batch_size
            trainer.loader = loader
        trainer.stop.asked = trainer.stop.asked or time.perf_counter() - self.started > self.seconds
        return super().sync_step(step, rows, stop, *rest)


def summary(rows: list[dict[str, float]], restart_every: int) -> dict[str, Any]:
    """Compare the first with the last quarter of the rows, without those before the first restart, which warm up."""
    rest = [row for row in rows if row["step"] >= restart_every] or rows
    some = max(1, len(rest) // 4)
    first, last = rest[:some], rest[-some:]

    def change(name: str) -> dict[str, float]:
        before, after = (median(row[name] for row in part) for part in (first, last))
        return {"first": before, "last": after, "change %": round(100 * (after / before - 1), 2) if before else 0.0}

    def speed(part: list[dict[str, float]]) -> float:
        taken = part[-1]["seconds"] - part[0]["seconds"]
        return round((part[-1]["step"] - part[0]["step"]) / taken, 3) if taken else 0.0

    watched = {name: change(name) for name in ("MB", "MB of loaders", "files", "threads")}
    speeds = {"first": speed(first), "last": speed(last)}
    restarts = int(rows[-1]["step"]) // restart_every
    return {"steps": rows[-1]["step"], "restarts": restarts, **watched, "steps a second": speeds}


def main() -> None:
    """Train, measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--hours", type=float, default=float("inf"))
    parser.add_argument("--restart-every", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keys = {"train.steps": options.steps, "data.workers": 1, "train.evaluate_every": 1000}
    recipe = load_recipe("demo-few-declip", keys)
    options.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        kept = options.out / "rows.json"
        watch = Watch(recipe, Path(folder) / "run", kept, options.restart_every, 3600 * options.hours)
        watch.trainer.train()
    found = summary(watch.rows, options.restart_every)
    (options.out / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
