"""Shared parts of gpu.py: the device, the largest batch that fits, and steps of declip and open_clip."""

import argparse
import gc
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from declip.data.batch import PairBatch, View
from declip.data.images.views import apply_photometric
from declip.data.plan import plan_views
from declip.models.device import pick_device
from declip.recipe.schema import Recipe
from declip.supervision.objective import needs_of
from pairs import InMemory, build
from peers import Shape, open_clip_side
from step import batch_of
from timing import device_name

PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A10G": 70e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip
"""Card, by part of its name (first match) → dense bfloat16 operations per second, as stated by its maker."""

BASE = 64
"""Pairs of the loaded batch; larger batches repeat it."""

Run = Callable[[int], Callable[[], object]]
"""Number of pairs → a function that takes a step of as many pairs; the first is taken at once."""


def tiled(batch: PairBatch, count: int) -> PairBatch:
    """Repeat the pairs of a batch until there are `count`."""
    rows = torch.arange(count) % len(batch)

    def view(one: View) -> View:
        params = None if one.photometric is None else one.photometric[rows]
        return View(one.pixels[rows], params)

    assert batch.lengths is not None, "the loader gives them"
    assert batch.sample_ids is not None, "the loader gives them"
    return replace(
        batch,
        views={name: view(one) for name, one in batch.views.items()},
        texts=batch.texts[:, rows],
        lengths=batch.lengths[:, rows],
        masked=None if batch.masked is None else batch.masked[rows],
        labels=None if batch.labels is None else batch.labels[rows],
        sample_ids=batch.sample_ids[rows],
    )


class Bench:
    """The device, the sizes and the output folder of all parts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tiny, self.device = options.tiny, pick_device(options.device)
        self.cuda = self.device.type == "cuda"
        self.repeats = 1 if self.tiny else 8
        self.base = 4 if self.tiny else BASE
        self.precision = "bf16" if self.cuda else "fp32"
        self.card = device_name(self.device)
        self.out: Path = options.out

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, task: Callable[[], object]) -> float:
        """Return the median time of a task, after a warm-up round."""
        taken = []
        for _ in range(1 + self.repeats):
            begun = time.perf_counter()
            task()
            self.wait()
            taken.append(time.perf_counter() - begun)
        return median(taken[1:])

    def known(self, part: str) -> dict[str, Any]:
        """Return the result of a part from an earlier call on the same card, or an empty dict."""
        path = self.out / f"{part}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found if (found.get("card"), found.get("tiny")) == (self.card, self.tiny) else {}

    def free(self) -> None:
        """Free unused memory."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def largest(self, run: Run) -> int:
        """Return the largest batch that fits, found by doubling, or 0."""
        count, limit, fits = self.base, 8 if self.tiny else 1 << 14, 0
        while count <= limit and self.attempt(run, count) is not None:
            fits, count = count, 2 * count
        self.free()
        return fits

    def attempt(self, run: Run, count: int) -> Callable[[], object] | None:
        """Take a step of `count` pairs twice; return the step, or None if it is out of memory."""
        try:
            (task := run(count))()
            self.wait()
        except RuntimeError as error:  # cuBLAS and cuDNN raise errors of other types
            if not re.search("out of memory|ALLOC_FAILED", str(error)):
                raise
            return None
        return task

    def measure(
        self, task: Callable[[], object], count: int, flops: float | None = None
    ) -> dict[str, Any]:
        """Measure time, rate, memory and, given the operations per pair, utilization of a step."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self.seconds(task)
        peak = next((peak for name, peak in PEAKS.items() if name in self.card), None)
        rate = count / seconds
        return {
            "ms": round(1e3 * seconds, 2),
            "samples_per_second": round(rate, 1),
            "gb": round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)
            if self.cuda
            else None,
            "gflop_per_pair": round(flops / 1e9, 2) if flops else None,
            "utilization": round(flops * rate / peak, 3) if flops and peak else None,
        }


def our_side(bench: Bench, recipe: Recipe, source: InMemory) -> Run:
    """Build `training_step` of a recipe."""
    built = build(recipe, source, bench.device)
    host = batch_of(recipe, source)

    def run(count: int) -> Callable[[], object]:
        batch = tiled(host, count).to(bench.device)
        built.step(batch)
        return lambda: built.step(batch)

    return run


def open_clips_side(
    name: str, recipe: Recipe, source: InMemory, shape: Shape, chunk: int | None = None
) -> Run:
    """Build open_clip's CLIP step on preprocessed images and 77-token captions; for `chunk` see `open_clip_side`."""
    import open_clip

    host, plan = batch_of(recipe, source), plan_views(recipe, needs_of(recipe))
    mean, std = (torch.tensor(values) for values in (plan.mean, plan.std))
    pixels = apply_photometric(host.views, mean, std)["first"].pixels.to(shape.device)
    assert host.sample_ids is not None, "the loader gives them"
    captions = [source.texts[int(number) % len(source)] for number in host.sample_ids]
    texts = open_clip.get_tokenizer(f"{name}-quickgelu")(captions).to(shape.device)
    step = open_clip_side(f"{name}-quickgelu", shape, pixels[:2], captions[:2], chunk).parts[""]

    def run(count: int) -> Callable[[], object]:
        rows = torch.arange(count, device=shape.device) % len(pixels)
        images, ids = pixels[rows], texts[rows]
        step(images, ids)
        return lambda: step(images, ids)

    return run
