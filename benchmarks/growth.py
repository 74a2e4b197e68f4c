"""How cost grows: a step of demo-size DeCLIP by batch, text length, image size and queue; a table's opening by rows.

    python benchmarks/growth.py                                   a short run, a few minutes
    python benchmarks/growth.py --batch-size 32 64 128 256 512 1024 --text 8 16 32 48 77 --image 32 48 64 96 128 \\
        --queue 1024 4096 16384 65536 262144 --rows 1e3 1e4 1e5 1e6 1e7 --repeats 5 --out benchmarks/results/growth

Every point is a process of its own, so that its memory is its own: the largest resident size (VmHWM) less what was
resident before the first step, or before the opening. A table was just written, so its opening does not wait for the
disk. An option without numbers leaves its part out. Linux only. The last line is JSON; --out writes it as growth.json
with two figures.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from declip.data.sources.open import open_source
from declip.recipe.load import load_recipe
from declip.training.step import training_step
from machine import forget_peak, machine, memory
from pairs import InMemory, open_pairs, texts_of
from parts import build
from timing import row, time_turns

SHORT = {"batch": [32, 64, 128], "text": [16, 32, 64], "image": [32, 48, 64], "queue": [1024, 4096, 16384]}
SHORT_ROWS = [1e3, 1e4, 1e5]
KEYS = {
    "batch": "train.batch_size",
    "text": "text.context_length",
    "image": "image.size",
    "queue": "nearest_neighbor.queue_size",
}
"""What the step is varied by, and the recipe's key for it."""

KINDS = ("jsonl", "csv", "parquet")
CHUNK = 100_000
"""Rows written at a time."""

READ = 1000
"""Rows read, at random, to time one."""

COLOURS = ("#0072B2", "#D55E00", "#009E73")


def step_cost(part: str, value: int, repeats: int) -> dict[str, Any]:
    """Seconds and memory of a step in this process; all else is the demo's."""
    texts = texts_of(open_pairs(), "full" if part == "text" else "emoji")
    recipe = load_recipe("demo-declip-official", {KEYS[part]: value, "data.workers": 0})
    built = build(recipe, InMemory(texts, max(96, recipe.image.size)))
    batch = next(built.loader)
    forget_peak()
    before = memory("VmRSS")
    seconds = time_turns(repeats, {"step": lambda: training_step(built.step, batch)})["step"]
    return {
        "seconds": median(seconds),
        "raw_seconds": seconds,
        "added_mb": round(memory("VmHWM") - before, 1),
        "before_mb": round(before, 1),
        "pairs": len(batch),
        "text_length": batch.texts.shape[-1],
    }


def table_cost(path: str) -> dict[str, Any]:
    """Seconds and memory of opening a table in this process, and of reading a row's captions."""
    forget_peak()
    private, resident, start = memory("RssAnon"), memory("VmRSS"), time.perf_counter()
    source = open_source(path)
    opened = time.perf_counter() - start
    kept, most = memory("RssAnon") - private, memory("VmHWM") - resident
    places = np.random.default_rng(0).integers(0, len(source), READ).tolist()
    start = time.perf_counter()
    for place in places:
        source.captions(place)
    read = (time.perf_counter() - start) / READ
    return {
        "rows": len(source),
        "seconds": opened,
        "private_mb": round(kept, 2),
        "most_mb": round(most, 1),
        "microseconds_a_row": round(1e6 * read, 2),
    }


def in_a_process(call: str, *arguments: Any, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What a function of this file returns in a fresh interpreter."""
    command = [sys.executable, __file__, "--one", json.dumps([call, *arguments])]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


CALLS: dict[str, Callable[..., dict[str, Any]]] = {"step": step_cost, "table": table_cost}


def of_steps(part: str, values: Sequence[int], repeats: int, threads: int) -> list[dict[str, Any]]:
    """A row for each value."""
    environment = {"OMP_NUM_THREADS": str(threads)}
    return [
        {"part": part, "value": value, **in_a_process("step", part, value, repeats, environment=environment)}
        for value in values
    ]


def of_tables(kinds: Sequence[str], sizes: Sequence[float], repeats: int) -> list[dict[str, Any]]:
    """A row for each kind and number of rows: first opening, then later ones with what the first one wrote."""
    rows = []
    for size in map(int, sizes):
        for kind in kinds:
            with TemporaryDirectory() as folder:
                path = Path(folder) / f"pairs.{kind}"
                write_table(path, size)
                cache = {"DECLIP_CACHE": str(Path(folder) / "cache")}
                first = in_a_process("table", str(path), environment=cache)
                later = [in_a_process("table", str(path), environment=cache) for _ in range(repeats)]
                rows.append(
                    {
                        "part": kind,
                        "value": size,
                        "file_mb": round(path.stat().st_size / 1e6, 1),
                        "first_seconds": first["seconds"],
                        "first_most_mb": first["most_mb"],
                        "later_seconds": median(found["seconds"] for found in later),
                        "later_private_mb": median(found["private_mb"] for found in later),
                        "microseconds_a_row": median(found["microseconds_a_row"] for found in later),
                    }
                )
    return rows


def write_table(path: Path, rows: int) -> None:
    """A path, a caption of twelve words and an address a row."""
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            for chunk in chunks(rows):
                file.writelines(json.dumps(row) + "\n" for row in chunk.to_pylist())
        return
    schema = pa.schema({"image": pa.string(), "caption": pa.string(), "url": pa.string()})
    writer = pq.ParquetWriter(path, schema) if path.suffix == ".parquet" else pacsv.CSVWriter(path, schema)
    with writer:
        for chunk in chunks(rows):
            writer.write_table(chunk)


def chunks(rows: int) -> Iterator[pa.Table]:
    """The rows, some at a time."""
    generator = np.random.default_rng(0)
    words = np.array(sorted({word for text in texts_of(open_pairs(), "joined", 512) for word in text.split()}))
    for start in range(0, rows, CHUNK):
        numbers = range(start, min(start + CHUNK, rows))
        drawn = words[generator.integers(0, len(words), (len(numbers), 12))]
        yield pa.table(
            {
                "image": [f"{number % 997:03d}/{number:09d}.jpg" for number in numbers],
                "caption": [" ".join(caption) for caption in drawn],
                "url": [f"https://example.org/photos/{number:09d}.jpg" for number in numbers],
            }
        )


def exponents(rows: Sequence[dict[str, Any]], key: str) -> list[float | None]:
    """Between neighboring points, the power of the size that the cost grows with: 1 is in proportion."""
    found: list[float | None] = []
    for a, b in pairwise(rows):
        known = a[key] > 0 and b[key] > 0
        found.append(round(math.log(b[key] / a[key]) / math.log(b["value"] / a["value"]), 2) if known else None)
    return found


STEP_COSTS = {"seconds": "seconds a step", "added_mb": "memory of the step, MB"}
TABLE_COSTS = {
    "first_seconds": "first opening, s",
    "later_seconds": "later openings, s",
    "later_private_mb": "a process's own memory, MB",
    "microseconds_a_row": "reading a row, µs",
}


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Two figures with logarithmic axes: the step's costs, the tables' costs."""
    from matplotlib.figure import Figure

    steps = [part for part in KEYS if any(found["part"] == part for found in rows)]
    if steps:
        figure = Figure(figsize=(3.2 * len(steps), 5.4), layout="constrained")
        grid = figure.subplots(len(STEP_COSTS), len(steps), squeeze=False, sharex="col", sharey="row")
        for column, part in enumerate(steps):
            own = [found for found in rows if found["part"] == part]
            for line, (key, label) in enumerate(STEP_COSTS.items()):
                _curve(grid[line][column], own, key, part, COLOURS[line])
                grid[line][column].set_ylabel(label if column == 0 else "")
                _plain_numbers(grid[line][column], [found["value"] for found in own])
            grid[-1][column].set_xlabel({"text": "tokens a text", "image": "pixels a side"}.get(part, part))
        figure.savefig(folder / "growth-step.png", dpi=130)
    kinds = [kind for kind in KINDS if any(found["part"] == kind for found in rows)]
    if kinds:
        figure = Figure(figsize=(3.2 * len(TABLE_COSTS), 3), layout="constrained")
        for axes, (key, label) in zip(figure.subplots(1, len(TABLE_COSTS)), TABLE_COSTS.items(), strict=True):
            for kind in kinds:
                own = [found for found in rows if found["part"] == kind]
                _curve(axes, own, key, kind, COLOURS[KINDS.index(kind)], "osD"[KINDS.index(kind)])
            axes.set_xlabel("rows")
            axes.set_title(label, fontsize=10)
        figure.axes[0].legend(frameon=False)
        figure.savefig(folder / "growth-tables.png", dpi=130)


def _curve(axes: Any, rows: Sequence[dict[str, Any]], key: str, label: str, color: str, marker: str = "o") -> None:
    axes.loglog(
        [found["value"] for found in rows], [found[key] for found in rows], color=color, marker=marker, label=label
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _plain_numbers(axes: Any, values: Sequence[int]) -> None:
    """Ticks where something was measured, and at 1, 2 and 5 upwards, in digits."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set(major_locator=FixedLocator(values), minor_locator=NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every point."""
    about, rows = machine(), []
    for part in KEYS:
        rows += of_steps(part, getattr(options, part), options.repeats, options.threads)
    rows += of_tables(options.kinds, options.rows, options.repeats)
    parts = {part: [found for found in rows if found["part"] == part] for part in (*KEYS, *KINDS)}
    grown = {
        part: {key: exponents(own, key) for key in (STEP_COSTS if part in KEYS else TABLE_COSTS)}
        for part, own in parts.items()
        if len(own) > 1
    }
    return {
        "part": "growth", "machine": about, "threads": options.threads, "repeats": options.repeats,
        "rows": rows, "exponents": grown,
    }  # fmt: skip


def measure(repeats: int) -> list[dict[str, object]]:
    """The short run, for `run.py`: rows by batch, text length, image size, queue and rows of a table."""
    options = parser().parse_args(["--repeats", str(repeats), "--threads", str(torch.get_num_threads())])
    found = []
    for point in compare(options)["rows"]:
        part, value = point["part"], point["value"]
        if part in KEYS:
            more = {key: point[key] for key in ("added_mb", "text_length")}
            found.append(row("growth", f"declip, {part} {value:,}", point["seconds"], point["pairs"], "pairs", **more))
        else:
            more = {key: point[key] for key in TABLE_COSTS}
            found.append(row("growth", f"open {part} anew", point["first_seconds"], value, "rows", **more))
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """A table of the steps, and one of the tables."""
    steps = Table("by", "value", "s a step", "added, MB", "tokens", title="A step of the recipe demo-declip")
    tables = Table("kind", "rows", "file, MB", *TABLE_COSTS.values(), title="A table")
    for found in result["rows"]:
        name, value = found["part"], f"{found['value']:,}"
        if name in KEYS:
            numbers = (f"{found['seconds']:.4f}", f"{found['added_mb']:.0f}", str(found["text_length"]))
            steps.add_row(name, value, *numbers)
        else:
            tables.add_row(name, value, f"{found['file_mb']}", *(f"{found[key]:.3f}" for key in TABLE_COSTS))
    console.print(*(table for table in (steps, tables) if table.row_count), sep="\n")


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part, values in SHORT.items():
        found.add_argument(f"--{part}", type=int, nargs="*", default=values, help=f"default {values}")
    found.add_argument("--rows", type=float, nargs="*", default=SHORT_ROWS, help="of a table; 1e7 takes 3 GB of disk")
    found.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    found.add_argument("--repeats", type=int, default=3, help="steps, and later openings, 1 or more (default 3)")
    found.add_argument("--threads", type=int, default=1, help="of a step (default 1)")
    found.add_argument("--out", type=Path, help="a folder for growth.json and the figures")
    found.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    return found


def main() -> None:
    """Measure, draw, and print the JSON last."""
    options = (command := parser()).parse_args()
    if options.one:
        call, *arguments = options.one
        print(json.dumps(CALLS[call](*arguments)))
        return
    if options.repeats < 1:
        command.error(f"--repeats is {options.repeats}; give 1 or more")
    result = compare(options)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "growth.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(result["rows"], options.out)
    show(result, Console(stderr=True))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
