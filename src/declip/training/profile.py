"""Where the time of a step goes: a table of its parts, and a trace."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from declip.errors import UserError
from declip.io.progress import progress_bar
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.training import distributed
from declip.training.clock import Clock, Span, untimed
from declip.training.step import training_step
from declip.training.supply import STARVED, workers_needed
from declip.training.trainer import Trainer

WARM, TIMED, TRACED = 5, 20, 2
"""Steps: to fill caches and compile, to be timed, and to be traced (each of these is some MB in the file)."""

WORDS = {
    "data": "waiting for the loader",
    "meeting": "hearing from other processes",
    "views": "moving the batch, colors, blur, normalising",
    "image tower": "forward",
    "text tower": "forward",
    "terms": "heads, gathering, queue, losses",
    "terms and backward": "losses of the whole batch, and all gradients",
    "backward": "gradients of all of these",
    "optimizer": "clipping, AdamW, averaged weights",
}
"""The parts of a step in their order, and what each is."""


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Attributes:
        recipe: Its name.
        device: Where it ran, and in which precision.
        batch: Pairs a step of all processes.
        steps: How many were timed.
        seconds: A step's, by part; the median step's parts need not add up to a step that was.
        step_seconds: A whole step, on average.
        flops: Floating-point operations of a step's matrix products and convolutions on this process, forward and
            backward; None where they could not be counted.
        peak_bytes: The largest memory of the device, or of this process on a CPU.
        workers: Processes that made batches.
        workers_needed: How many would keep up; no more than there are where they do.
        free_cores: Processors that more workers could have.
        folder: Holds profile.json and trace.json.
        leads: Whether this process is the first of those that train together.
    """

    recipe: str
    device: str
    batch: int
    steps: int
    seconds: Mapping[str, float]
    step_seconds: float
    flops: int | None
    peak_bytes: int
    workers: int
    workers_needed: int
    free_cores: int
    folder: Path
    leads: bool = True

    @property
    def samples_per_second(self) -> float:
        """Of all processes together."""
        return self.batch / self.step_seconds

    @property
    def starved(self) -> bool:
        """Whether steps wait for the loader more than is right."""
        waits = self.seconds["data"] > STARVED * self.step_seconds
        return waits and self.workers_needed > self.workers and self.free_cores > 0

    def table(self) -> Table:
        """The parts, their time and share."""
        table = Table("part", "what", "ms a step", "share", title=f"{self.recipe}, a step of {self.batch:,} pairs")
        for column in table.columns[2:]:
            column.justify = "right"
        for name, seconds in self.seconds.items():
            table.add_row(name, WORDS[name], f"{1000 * seconds:,.1f}", f"{seconds / self.step_seconds:.1%}")
        rest = self.step_seconds - sum(self.seconds.values())
        table.add_row("rest", "", f"{1000 * rest:,.1f}", f"{rest / self.step_seconds:.1%}")
        table.add_section()
        table.add_row("step", f"{self.samples_per_second:,.1f} pairs/s", f"{1000 * self.step_seconds:,.1f}", "")
        table.caption = self.remarks()
        return table

    def remarks(self) -> str:
        """What the table has no column for."""
        words = [f"{self.device}; the mean of {self.steps} steps; {self.peak_bytes / 1e9:.2f} GB at most"]
        if self.flops is not None:
            speed = self.flops / self.step_seconds
            words.append(f"{self.flops / 1e9:,.1f} GFLOP a step here, {speed / 1e9:,.1f} GFLOP/s")
        if self.starved:
            words.append(
                f"the loader is too slow: data.workers={self.workers_needed} would keep up, {self.workers} now"
            )
        return "; ".join(words) + "."

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "folder": str(self.folder), "samples_per_second": self.samples_per_second}


def profile(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> Profile:
    """Take some steps of a recipe, and measure what their parts take. Nothing is kept of the training.

    Args:
        recipe, overrides: As `train` takes them.
        out: Folder for profile.json and for trace.json, which chrome://tracing and ui.perfetto.dev show; by default
            ``runs/NAME-profile``.
        quiet: Draw no progress.

    Returns:
        The measurement, of this process.

    Raises:
        UserError: as `train`, or the folder can't be written.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    folder = Path(out) if out is not None else Path("runs") / f"{recipe.name}-profile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.json").touch()
    except OSError as error:
        raise UserError(f"Cannot write into '{folder}': {error.strerror}. Choose another folder with --out.") from error
    with TemporaryDirectory() as run:
        trainer = Trainer(recipe, Path(run) / "run", quiet=True)
        with trainer.learning():
            found = _measured(trainer, folder, quiet or not trainer.leads)
        trainer.loader.close()
        trainer.council.collect(None)  # the first rank's folder stays until all are done
    if trainer.leads:
        (folder / "profile.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    distributed.leave()
    return found


def _measured(trainer: Trainer, folder: Path, quiet: bool) -> Profile:
    clock = Clock(trainer.device)
    _time_towers(trainer, clock.span)
    trainer.parts = replace(trainer.parts, span=clock.span)
    flops = _count(trainer) if not trainer.recipe.train.compile else None
    with progress_bar(*Progress.get_default_columns(), shown=not quiet) as progress:
        task = progress.add_task("profiling", total=WARM + TIMED + TRACED)
        started = time.perf_counter()
        for number in range(WARM + TIMED):
            if number == WARM:
                clock.forget()
                started = time.perf_counter()
            _step(trainer, clock.span)
            progress.advance(task)
        seconds = (time.perf_counter() - started) / TIMED
        parts = {name: clock.seconds[name] / TIMED for name in WORDS if name in clock.seconds}
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])]
        with torch.profiler.profile(activities=activities) as trace:
            for _ in range(TRACED):
                _step(trainer, clock.span)
                progress.advance(task)
    if trainer.leads:
        trace.export_chrome_trace(str(folder / "trace.json"))
    return Profile(
        recipe=trainer.recipe.name,
        device=_device(trainer),
        batch=trainer.recipe.train.batch_size,
        steps=TIMED,
        seconds=parts,
        step_seconds=seconds,
        flops=flops,
        peak_bytes=_peak(trainer.device),
        workers=trainer.workers,
        workers_needed=workers_needed(trainer.workers, parts["data"], seconds - parts["data"]),
        free_cores=trainer.supply.cores,
        folder=folder,
        leads=trainer.leads,
    )


def _step(trainer: Trainer, span: Span) -> None:
    """Take a step as the trainer does, but for logging and saving."""
    with span("data"):
        batch = next(trainer.loader)
    with span("meeting"):
        meeting = trainer.council.meet(trainer.step, len(batch), False)
    training_step(trainer.parts, batch, meeting)
    trainer.step += 1


def _time_towers(trainer: Trainer, span: Span) -> None:
    """Let the forward pass of each tower be a part of its own."""
    tower: Any
    for name, tower in (("image tower", trainer.model.image_tower), ("text tower", trainer.model.text_tower)):
        tower.forward = _timed(tower.forward, name, span)


def _timed(forward: Callable[..., Any], name: str, span: Span) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        with span(name):
            return forward(*inputs)

    return call


def _count(trainer: Trainer) -> int:
    """Floating-point operations of a step."""
    with FlopCounterMode(display=False) as counter:
        _step(trainer, untimed)
    return int(counter.get_total_flops())


def _device(trainer: Trainer) -> str:
    train, ranks = trainer.recipe.train, distributed.world_size()
    threads = torch.get_num_threads()
    name = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    if trainer.device.type == "cuda":
        name = torch.cuda.get_device_name(trainer.device)
    compiled = ", compiled" if train.compile else ""
    return f"{name}, {train.precision}{compiled}" + (f", process {distributed.rank()} of {ranks}" if ranks > 1 else "")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
