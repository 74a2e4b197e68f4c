"""Profiling of a training step: a table of its parts, and a trace."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch.profiler import ProfilerActivity, record_function
from torch.utils.flop_counter import FlopCounterMode

from declip.errors import UserError
from declip.io.progress import progress_bar
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.training import distributed
from declip.training.step import Span, training_step, untimed
from declip.training.trainer import Trainer
from declip.training.watchdogs import STARVED, workers_needed

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
        try:
            with record_function(f"declip: {name}"):
                yield
        finally:
            taken = self._now() - start
            inner = self._inside.pop()
            self._inside[-1] += taken
            self.seconds[name] = self.seconds.get(name, 0.0) + taken - inner

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Profile:
    """The measurement of a step on this process.

    Attributes:
        device: Name and precision.
        batch: Pairs of a step of all processes.
        steps: Number of timed steps.
        seconds: Mean duration of a step's parts, by name.
        flops: Floating-point operations of a step's matrix products and convolutions, forward and backward; None for
            compiled towers.
        peak_bytes: The largest memory of the device, or of this process on a CPU.
        workers_needed: Number of workers that would keep up.
        free_cores: Processors that are free for more workers.
        folder: Holds profile.json and trace.json.
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
    is_rank_zero: bool = True

    @property
    def samples_per_second(self) -> float:
        """Samples per second of all processes together."""
        return self.batch / self.step_seconds

    @property
    def starved(self) -> bool:
        """Whether steps wait too long for the loader, and workers would help."""
        waits = self.seconds["data"] > STARVED * self.step_seconds
        return waits and self.workers_needed > self.workers and self.free_cores > 0

    def table(self) -> Table:
        """Tabulate the parts and their times."""
        table = Table("part", "work", "ms/step", "fraction", title=f"{self.recipe}, a step of {self.batch:,} pairs")
        for column in table.columns[2:]:
            column.justify = "right"
        for name, seconds in self.seconds.items():
            table.add_row(name, PARTS[name], f"{1000 * seconds:,.1f}", f"{seconds / self.step_seconds:.1%}")
        rest = self.step_seconds - sum(self.seconds.values())
        table.add_row("rest", "", f"{1000 * rest:,.1f}", f"{rest / self.step_seconds:.1%}")
        table.add_section()
        table.add_row("step", f"{self.samples_per_second:,.1f} samples/s", f"{1000 * self.step_seconds:,.1f}", "")
        table.caption = self.remarks()
        return table

    def remarks(self) -> str:
        """Word everything that the table has no column for."""
        words = [f"{self.device}; the mean of {self.steps} steps; peak memory {self.peak_bytes / 1e9:.2f} GB"]
        if self.flops is not None:
            speed = self.flops / self.step_seconds
            words.append(f"{self.flops / 1e9:,.1f} GFLOP per step here, {speed / 1e9:,.1f} GFLOP/s")
        if self.starved:
            words.append(
                f"the loader is too slow: data.workers={self.workers_needed} would keep up, {self.workers} now"
            )
        return "; ".join(words) + "."

    def to_dict(self) -> dict[str, Any]:
        """Give plain data, for JSON."""
        return {**asdict(self), "folder": str(self.folder), "samples_per_second": self.samples_per_second}


def profile(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> Profile:
    """Take some steps of a recipe and time their parts. Nothing is kept of the training.

    Args:
        recipe, overrides: See `declip.train`.
        out: Folder for profile.json and for trace.json, which chrome://tracing and ui.perfetto.dev show; by default
            ``runs/NAME-profile``.
        quiet: Show no progress.
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
            found = _measured(trainer, folder, quiet or not trainer.is_rank_zero)
        trainer.loader.close()
        trainer.hosts.gather_objects(None)  # rank 0's folder stays until all are done
    if trainer.is_rank_zero:
        (folder / "profile.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    distributed.leave()
    return found


def _measured(trainer: Trainer, folder: Path, quiet: bool) -> Profile:
    clock = Clock(trainer.device)
    tower: Any
    for name, tower in (("image tower", trainer.model.image_tower), ("text tower", trainer.model.text_tower)):
        tower.forward = _timed(tower.forward, name, clock.span)
    trainer.parts = replace(trainer.parts, span=clock.span)
    with nullcontext() if trainer.recipe.train.compile else FlopCounterMode(display=False) as counter:
        _step(trainer, untimed)
    with progress_bar(*Progress.get_default_columns(), shown=not quiet) as progress:
        task = progress.add_task("profiling", total=WARM + TIMED + TRACED)
        started = time.perf_counter()
        for number in range(WARM + TIMED):
            if number == WARM:
                clock.seconds.clear()
                started = time.perf_counter()
            _step(trainer, clock.span)
            progress.advance(task)
        seconds = (time.perf_counter() - started) / TIMED
        parts = {name: clock.seconds[name] / TIMED for name in PARTS if name in clock.seconds}
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])]
        with torch.profiler.profile(activities=activities) as trace:
            for _ in range(TRACED):
                _step(trainer, clock.span)
                progress.advance(task)
    if trainer.is_rank_zero:
        trace.export_chrome_trace(str(folder / "trace.json"))
    return Profile(
        recipe=trainer.recipe.name,
        device=_device(trainer),
        batch=trainer.recipe.train.batch_size,
        steps=TIMED,
        seconds=parts,
        step_seconds=seconds,
        flops=int(counter.get_total_flops()) if counter is not None else None,
        peak_bytes=_peak(trainer.device),
        workers=trainer.workers,
        workers_needed=workers_needed(trainer.workers, parts["data"], seconds - parts["data"]),
        free_cores=trainer.throughput.cores,
        folder=folder,
        is_rank_zero=trainer.is_rank_zero,
    )


def _step(trainer: Trainer, span: Span) -> None:
    """Take a step as the trainer does, but for logging and saving."""
    with span("data"):
        batch = next(trainer.loader)
    with span("sync"):
        sync = trainer.hosts.sync_step(trainer.step, len(batch), stop=False)
    training_step(trainer.parts, batch, sync)
    trainer.step += 1


def _timed(forward: Callable[..., Any], name: str, span: Span) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        with span(name):
            return forward(*inputs)

    return call


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
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
