"""Profiling of a training step: a table of its parts, and a trace."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from torch.profiler import record_function

from declip.errors import UserError
from declip.io.progress import status
from declip.recipe.schema import Recipe
from declip.training import distributed
from declip.training.step import training_step
from declip.training.trainer import Trainer

WARM, TIMED, TRACED = 5, 20, 2
"""Numbers of steps to fill caches and compile, to time, and to trace (each of these is some MB in the file)."""

PARTS = {
    "data": "waiting for the loader",
    "sync": "exchange with other processes",
    "views": "moving the batch, colors, blur, normalizing",
    "image tower": "forward",
    "text tower": "forward",
    "terms": "heads, gathering, queue, losses",
    "terms and backward": "losses of the whole batch, and all gradients",
    "backward": "gradients of all of these",
    "optimizer": "clipping, AdamW, averaged weights",
    "rest": "",
}
"""The parts of a step in their order, and their descriptions."""


class Clock:
    """Adds up the time of named parts; a part inside another one counts for itself alone.

    Args:
        device: Waited for at both ends of a part, so that its work counts where it was launched.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a part, and name it in a trace."""
        start = self._now()
        self._inside.append(0.0)
        with record_function(f"declip: {name}"):
            yield
        taken = self._now() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + taken - self._inside.pop()
        self._inside[-1] += taken

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function in a span."""

        def call(*inputs: Any) -> Any:
            with self.span(name):
                return function(*inputs)

        return call

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def profile(recipe: Recipe, folder: Path, quiet: bool = False) -> Table | None:
    """Take some steps of a recipe and tabulate the times of their parts, on rank 0. Nothing is kept of the training.

    The folder gets profile.json, and trace.json for chrome://tracing and ui.perfetto.dev.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.json").touch()
    except OSError as error:
        raise UserError(f"Cannot write into '{folder}': {error.strerror}. Choose another folder with --out.") from error
    with TemporaryDirectory() as run:
        trainer = Trainer(recipe, Path(run) / "run", quiet=True)
        with status("profiling", shown=not quiet and trainer.is_rank_zero):
            seconds = _measure(trainer, folder / "trace.json")
        trainer.loader.close()
        trainer.hosts.gather_objects(None)  # rank 0's folder stays until all are done
    distributed.leave()
    if not trainer.is_rank_zero:
        return None
    on_gpu, train = trainer.device.type == "cuda", recipe.train
    about = {
        "recipe": recipe.name,
        "device": torch.cuda.get_device_name(trainer.device) if on_gpu else f"CPU, threads: {torch.get_num_threads()}",
        "precision": trainer.recipe.train.precision,
        "batch": train.batch_size,
    }
    row = {**about, "seconds": seconds, "step_seconds": sum(seconds.values())}
    (folder / "profile.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return _table(about, seconds)


def _table(about: Mapping[str, Any], seconds: Mapping[str, float]) -> Table:
    step = sum(seconds.values())
    table = Table("part", "work", "ms/step", "fraction", title=f"{about['recipe']}, a step of {about['batch']:,} pairs")
    for name, taken in seconds.items():
        table.add_row(name, PARTS[name], f"{1000 * taken:,.1f}", f"{taken / step:.1%}")
    table.add_section()
    table.add_row("step", f"{about['batch'] / step:,.1f} samples/s", f"{1000 * step:,.1f}", "")
    table.caption = f"{about['device']}, {about['precision']}; the mean of {TIMED} steps"
    return table


def _measure(trainer: Trainer, trace_file: Path) -> dict[str, float]:
    """Mean duration of a step's parts, by name."""
    trainer.learner.train()
    clock = Clock(trainer.device)
    tower: Any
    for name, tower in (("image tower", trainer.model.image_tower), ("text tower", trainer.model.text_tower)):
        tower.forward = clock.timed(name, tower.forward)
    trainer.parts = replace(trainer.parts, span=clock.span)

    def take_steps(count: int) -> None:
        """Take steps as the trainer does, but for logging and saving."""
        for _ in range(count):
            with clock.span("data"):
                batch = next(trainer.loader)
            with clock.span("sync"):
                sync = trainer.hosts.sync_step(trainer.step, len(batch), stop=False)
            training_step(trainer.parts, batch, sync)
            trainer.step += 1

    take_steps(WARM)
    clock.seconds.clear()
    started = time.perf_counter()
    take_steps(TIMED)
    taken = time.perf_counter() - started
    clock.seconds["rest"] = taken - sum(clock.seconds.values())
    seconds = {name: clock.seconds[name] / TIMED for name in PARTS if name in clock.seconds}
    with torch.profiler.profile() as trace:
        take_steps(TRACED)
    if trainer.is_rank_zero:
        trace.export_chrome_trace(str(trace_file))
    return seconds
