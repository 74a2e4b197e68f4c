"""Full-size training on one GPU, measured part by part: time, memory, utilization, and what must hold on CUDA.

    python benchmarks/gpu.py --out runs/gpu                      on one GPU; again: the parts that are missing
    python benchmarks/gpu.py --out runs/gpu --only ViT-B-32,resume
    python benchmarks/gpu.py --out runs/try --device cpu --tiny  toy towers, to try this script

Each part writes OUT/PART.json when it is done, and a later call takes it from there: first come the parts that are
missing, then those of which something failed. Parts that would begin after --minutes are left to the next call, and the
status is 1 while something fails. The towers' parts train `clip` and `declip` as in `*-yfcc15m-*`, and
`declip-keywords`, at the largest batch that fits, found by doubling, next to open_clip's CLIP step on the same pairs.
The part grad-cache takes one large batch in chunks, next to sentence-transformers' loss for that on open_clip's towers.
"""

import argparse
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode needs it before CUDA starts

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from declip.data.assembly import Assembler
from declip.data.batch import PairBatch, View
from declip.data.images.crops import apply_photometric
from declip.data.loader import PairLoader
from declip.data.text.tokenizer import Tokenizer
from declip.errors import UserError
from declip.io.atomic import atomic_write
from declip.models.device import pick_device
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.training.compilation import compile_towers
from declip.training.setup import plan_of
from declip.training.step import training_step
from gpu_checks import resume, two_processes
from machine import machine
from pairs import InMemory, Shapes, open_pairs, texts_of
from parts import build
from peers import Shape, open_clip_side
from step import TOWERS, batch_of, device_name, recipe_of, tiny

PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A10G": 70e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 operations per second that the makers state, by a part of the card's name; the first match counts."""

RECIPES = ("clip", "declip", "declip-keywords")
BASE = 64
"""Pairs of the loader's batch, which larger ones repeat."""


def peak_of(card: str) -> float | None:
    """Operations per second of a card; None for one that is not listed."""
    return next((peak for name, peak in PEAKS.items() if name in card), None)


def tiled(batch: PairBatch, count: int) -> PairBatch:
    """The pairs of a batch on the host, again and again until there are `count`."""
    rows = torch.arange(count) % len(batch)

    def view(one: View) -> View:
        photometric = one.photometric
        columns = {name: column[rows] for name, column in vars(photometric).items()}
        return View(one.pixels[rows], replace(photometric, **columns))

    fields = {name: getattr(batch, name) for name in ("masked", "labels", "sample_ids")}
    return replace(
        batch,
        views={name: view(one) for name, one in batch.views.items()},
        texts=batch.texts[:, rows],
        lengths=batch.lengths[:, rows],
        **{name: None if tensor is None else tensor[rows] for name, tensor in fields.items()},
    )


class Bench:
    """What all parts share: the device, the sizes and the folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tiny, self.device = options.tiny, pick_device(options.device)
        self.cuda = self.device.type == "cuda"
        self.repeats = 1 if self.tiny else 8
        self.precision = "bf16" if self.cuda else "fp32"
        self.card = device_name(self.device)
        self.out: Path = options.out

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, task: Callable[[], object]) -> float:
        """The median time of a task, after a warm-up round."""
        taken = []
        for _ in range(1 + self.repeats):
            begun = time.perf_counter()
            task()
            self.wait()
            taken.append(time.perf_counter() - begun)
        return median(taken[1:])

    def known(self, part: str) -> dict[str, Any]:
        """The result of a part from an earlier call on the same card; empty where it is missing."""
        path = self.out / f"{part}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found if (found.get("card"), found.get("tiny")) == (self.card, self.tiny) else {}

    def free(self) -> None:
        """Give back the memory of what is no longer used."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def largest(self, run: "Run") -> int:
        """The largest batch that fits, by doubling; 0 where none does."""
        count, limit, fits = (4, 8, 0) if self.tiny else (BASE, 1 << 14, 0)
        while count <= limit and self.attempt(run, count) is not None:
            fits, count = count, 2 * count
        self.free()
        return fits

    def attempt(self, run: "Run", count: int) -> Callable[[], object] | None:
        """Take two steps of `count` pairs; give what takes another one, or None where they do not fit the memory."""
        try:
            (task := run(count))()
            self.wait()
        except RuntimeError as error:  # cuBLAS and cuDNN have errors of their own
            if not re.search("out of memory|ALLOC_FAILED", str(error)):
                raise
            return None
        return task


Run = Callable[[int], Callable[[], object]]
"""Takes a step of so many pairs, and gives what takes it again."""


def our_side(bench: Bench, recipe: Recipe, source: InMemory, compiled: bool = False) -> Run:
    """`training_step` of a recipe; a compiled one is for one size of the batch."""
    built = build(recipe, source, bench.device)
    host = batch_of(recipe, source)

    def run(count: int) -> Callable[[], object]:
        batch = tiled(host, count).to(bench.device)
        if compiled:
            whole = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": count})})
            compile_towers(whole, built.model, plan_of(recipe))
        training_step(built.step, batch)
        return lambda: training_step(built.step, batch)

    return run


def open_clips_side(
    bench: Bench, name: str, recipe: Recipe, source: InMemory, shape: Shape, chunk: int | None = None
) -> Run:
    """open_clip's CLIP step, on images that are finished and 77-token captions; for `chunk` see `open_clip_side`."""
    import open_clip

    host, plan = batch_of(recipe, source), plan_of(recipe)
    mean, std = (torch.tensor(values) for values in (plan.mean, plan.std))
    pixels = apply_photometric(host.views, mean, std)["first"].pixels.to(bench.device)
    captions = [source.texts[int(number) % len(source)] for number in host.sample_ids]
    texts = open_clip.get_tokenizer(f"{name}-quickgelu")(captions).to(bench.device)
    side = open_clip_side(f"{name}-quickgelu", shape, pixels[:2], captions[:2], chunk)
    step: Any = side.step

    def run(count: int) -> Callable[[], object]:
        rows = torch.arange(count, device=bench.device) % len(pixels)
        images, ids = pixels[rows], texts[rows]
        step(images, ids)
        return lambda: step(images, ids)

    return run


def sizes(bench: Bench, name: str) -> tuple[Shape, InMemory]:
    """Sizes of an image tower and the text tower that goes with it, and pairs for them."""
    import open_clip

    config = open_clip.get_model_config(f"{name}-quickgelu")
    config = tiny(config) if bench.tiny else config
    source = InMemory(texts_of(open_pairs(), "joined", 256), config["vision_cfg"]["image_size"])
    return Shape(config, bench.tiny, bench.device, bench.precision), source


def grad_cache(bench: Bench) -> list[dict[str, Any]]:
    """A large batch in chunks: `clip` with `train.grad_cache_chunk`, and sentence-transformers' loss on open_clip's."""
    (shape, source), name = sizes(bench, "ViT-B-32"), "ViT-B-32"
    count, chunk = (8, 4) if bench.tiny else (4096, 256)
    recipe = recipe_of("clip-yfcc15m-vitb32", name, shape, 4 if bench.tiny else BASE)
    train = recipe.train.model_copy(update={"grad_cache_chunk": chunk})
    sides: dict[str, Callable[[], Run]] = {
        "clip": lambda: our_side(bench, recipe.model_copy(update={"train": train}), source),
        "sentence-transformers": lambda: open_clips_side(bench, name, recipe, source, shape, chunk),
    }
    rows = []
    for what, side in sides.items():
        row = {"tower": name, "what": what, "batch": count, "chunk": chunk, "precision": bench.precision}
        try:
            rows.append(row | measured(bench, side()(count), count))
        except Exception as error:  # the other side is measured
            rows.append(row | {"failed": worded(error)})
        bench.free()
    return rows


def worded(error: Exception) -> str:
    """An error in a line."""
    remedy = ": pip install 'declip[bench]'" if isinstance(error, ImportError) else ""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}{remedy}"


def tower(bench: Bench, name: str, compiled: bool = False) -> list[dict[str, Any]]:
    """Steps of three recipes and of open_clip with an image tower; compiled ones at the batch that fits without."""
    (shape, source), rows = sizes(bench, name), []
    before = {row["what"]: row.get("batch") for row in bench.known(name).get("rows", [])} if compiled else {}
    for arm in (*RECIPES, "open_clip"):
        row = {"tower": name, "what": arm, "compiled": compiled, "precision": bench.precision}
        try:
            rows.append(row | steps(bench, name, arm, replace(shape, compiled=compiled), source, before.get(arm)))
        except Exception as error:  # of CUDA, the compiler or the peer: the others are measured
            rows.append(row | {"failed": worded(error)})
        if compiled:
            torch.compiler.reset()
        bench.free()
    return rows


def steps(
    bench: Bench, name: str, arm: str, shape: Shape, source: InMemory, batch: int | None = None
) -> dict[str, Any]:
    """Steps of one recipe, or of open_clip, at a size of the batch or the largest one that fits."""
    shipped = {"open_clip": "clip-yfcc15m-vitb32", "clip": "clip-yfcc15m-vitb32", "declip": "declip-yfcc15m-vitb32"}
    base = 4 if bench.tiny else BASE
    recipe = recipe_of(shipped.get(arm, arm), name, shape, base)

    def side(compiled: bool) -> Run:
        if arm == "open_clip":
            return open_clips_side(bench, name, recipe, source, replace(shape, compiled=compiled))
        return our_side(bench, recipe, source, compiled)

    def anew(count: int) -> Callable[[], object]:
        return side(compiled=True)(count)

    run = side(compiled=False)
    with FlopCounterMode(display=False) as counter:
        run(base)
    count = batch or bench.largest(run)
    if shape.compiled:
        run = anew  # compiled for one size of the batch; the other side is freed
        bench.free()
    while (task := bench.attempt(run, count)) is None:  # compiled, or in memory that is in pieces, it may need more
        bench.free()
        count //= 2
    return {"batch": count} | measured(bench, task, count, counter.get_total_flops() / base)


def measured(bench: Bench, task: Callable[[], object], count: int, flops: float | None = None) -> dict[str, Any]:
    """Time, rate, memory and, with the operations of a pair, utilization of a step."""
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    seconds, peak = bench.seconds(task), peak_of(bench.card)
    rate = count / seconds
    return {
        "ms": round(1e3 * seconds, 2),
        "samples_per_second": round(rate, 1),
        "gb": round(torch.cuda.max_memory_allocated(bench.device) / 1e9, 2) if bench.cuda else None,
        "gflop_per_pair": round(flops / 1e9, 2) if flops else None,
        "utilization": round(flops * rate / peak, 3) if flops and peak else None,
    }


def views(bench: Bench) -> list[dict[str, Any]]:
    """Colors and blur of two views on the device against one CPU thread, and how far the results differ."""
    recipe = load_recipe("demo-declip" if bench.tiny else "declip", {"train.batch_size": 8 if bench.tiny else 128})
    source = InMemory(texts_of(Shapes(), "joined", 256), recipe.image.size)
    built = build(recipe, source)
    batch, mean, std = next(built.loader), built.step.mean, built.step.std
    there, m, s = batch.to(bench.device), mean.to(bench.device), std.to(bench.device)
    on_device = apply_photometric(there.views, m, s)["first"].pixels.cpu()
    difference = (on_device - apply_photometric(batch.views, mean, std)["first"].pixels).abs().max().item()
    threads = torch.get_num_threads()
    device = bench.seconds(lambda: apply_photometric(there.views, m, s))
    torch.set_num_threads(1)
    host = bench.seconds(lambda: apply_photometric(batch.views, mean, std))
    torch.set_num_threads(threads)
    count = len(batch)
    return [
        {"what": name, "batch": count, "ms": round(1e3 * seconds, 2), "samples_per_second": round(count / seconds, 1)}
        for name, seconds in ((bench.card, device), ("one CPU thread", host))
    ] + [{"what": "largest difference", "value": difference}]


def loading(bench: Bench) -> list[dict[str, Any]]:
    """Pairs per second of one loader process, and how many keep up with each measured step."""
    from loader import PAIRS, SIZES, photographs

    recipe = load_recipe("declip", {"image.size": 32 if bench.tiny else 224})
    source = photographs(*SIZES[0])
    loader = PairLoader(
        Assembler(source, Tokenizer(), plan_of(recipe), batch_size=PAIRS, seed=0), pin_memory=bench.cuda
    )
    rate = PAIRS / bench.seconds(lambda: next(loader))
    rows = [{"what": "one loader process", "samples_per_second": round(rate, 1), "cores": os.cpu_count()}]
    for name in TOWERS:
        rows += [
            {"what": f"processes for {name}, {row['what']}", "value": round(row["samples_per_second"] / rate, 1)}
            for row in bench.known(name).get("rows", [])
            if row["what"] in RECIPES and "failed" not in row
        ]
    return rows


PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "ViT-B-32": lambda bench: tower(bench, "ViT-B-32"),
    "resume": resume,
    "two-processes": two_processes,
    "views": views,
    "grad-cache": grad_cache,
    "ViT-B-32-compiled": lambda bench: tower(bench, "ViT-B-32", compiled=True),
    "ViT-B-16": lambda bench: tower(bench, "ViT-B-16"),
    "RN50": lambda bench: tower(bench, "RN50"),
    "loading": loading,
    "ViT-B-16-compiled": lambda bench: tower(bench, "ViT-B-16", compiled=True),
    "RN50-compiled": lambda bench: tower(bench, "RN50", compiled=True),
}
"""In the order in which they are measured."""


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """One table of all parts, without columns that are empty."""
    rows = [(part, row) for part, result in results.items() for row in result["rows"]]
    columns = ("batch", "ms", "samples_per_second", "gb", "gflop_per_pair", "utilization", "value", "note", "failed")
    columns = tuple(name for name in columns if any(row.get(name) is not None for _, row in rows))
    table = Table("part", "what", *columns, title=f"{next(iter(results.values()))['card']}, medians")
    for part, row in rows:
        compiled = ", compiled" if row.get("compiled") else ""
        cells = ("" if row.get(name) is None else str(row[name]) for name in columns)
        table.add_row(part, row["what"] + compiled, *cells)
    console.print(table)


def main() -> None:
    """Measure the missing parts, show all, and print the JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default runs/gpu)")
    parser.add_argument("--only", help=f"parts, separated by commas: {', '.join(PARTS)}. Default: all")
    parser.add_argument("--minutes", type=float, default=8, help="no part begins later than this (default 8)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="toy towers")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only names '{unknown[0]}'; give {', '.join(PARTS)}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        bench = Bench(options)
        if not (bench.cuda or bench.tiny):
            parser.error(f"This needs a CUDA GPU, and the device is {bench.card}. Toy towers: --device cpu --tiny")
        results, left = run_parts(bench, names, options.minutes)
    except (UserError, OSError) as error:
        parser.error(str(error))
    console = Console(stderr=True)
    if results:
        show(results, console if console.is_terminal else Console(stderr=True, width=160))
    if left:
        console.print(f"Left to the next call: {', '.join(left)}")
    print(json.dumps(results))
    sys.exit(1 if any(failures(result) for result in results.values()) else 0)


def run_parts(bench: Bench, names: list[str], minutes: float) -> tuple[dict[str, Any], list[str]]:
    """The results of parts, known ones and those measured now, and the parts for which the time did not last."""
    begun, results, left = time.perf_counter(), {name: bench.known(name) for name in names}, []
    for name in sorted(names, key=lambda name: bool(results[name])):
        if results[name] and not failures(results[name]):
            continue
        if time.perf_counter() - begun > 60 * minutes:
            left.append(name)
            continue
        started = time.perf_counter()
        try:
            rows = PARTS[name](bench)
        except Exception as error:  # of CUDA, a peer or a part: the others are measured
            rows = [{"what": "all", "failed": worded(error)}]
        bench.free()
        took = round(time.perf_counter() - started, 1)
        found = {"card": bench.card, "tiny": bench.tiny, "seconds": took, "machine": machine(), "rows": rows}
        results[name] = found
        with atomic_write(bench.out / f"{name}.json", "give another folder as --out") as path:
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return {name: result for name, result in results.items() if result}, left


def failures(result: dict[str, Any]) -> bool:
    """Whether something of a part failed."""
    return any("failed" in row for row in result.get("rows", []))


if __name__ == "__main__":
    main()
