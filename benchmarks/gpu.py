"""Measure full-size training on one GPU: time, memory, utilization, and exactness on CUDA.

    python benchmarks/gpu.py --out runs/gpu                      on one GPU; repeat it for the missing parts
    python benchmarks/gpu.py --out runs/gpu --only ViT-B-32,resume
    python benchmarks/gpu.py --out runs/try --device cpu --tiny  small towers, to try this script

Each part writes OUT/PART.json when it is done, and a later call reads it from there: missing parts run first, then
those in which something failed. Parts that would start after --minutes are left to the next call; the status is 1
while something fails. The parts named after a tower train `clip`, `declip` and `declip-yfcc15m-vitb32` at the largest
batch that fits, compared with open_clip's CLIP step on the same pairs. The part grad-cache takes one large batch in
chunks, compared with sentence-transformers' loss on open_clip's towers. The parts named budget divide a step of
DeCLIP; those named options switch on `train.compile` and others. The gather and waiting for data need several GPUs.
"""

import argparse
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Deterministic mode needs it before CUDA starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.flop_counter import FlopCounterMode

from declip.data.images import fused_views
from declip.data.images.views import apply_photometric
from declip.errors import UserError
from declip.io.atomic import atomic_write
from declip.recipe.load import load_recipe
from declip.runs.checkpoint import list_checkpoints, load_checkpoint
from declip.training.assemble import assemble
from declip.training.distributed import StepSync
from declip.training.step import training_step
from declip.training.trainer import Trainer
from gpu_steps import Bench, open_clips_side, our_side, tiled
from pairs import InMemory, Shapes, build, texts_of
from step import TOWERS, batch_of, recipe_of, sizes
from timing import machine, show

RECIPES = ("clip", "declip", "declip-yfcc15m-vitb32")
PUBLISHED = {
    "open_clip": "clip-yfcc15m-vitb32",
    "clip": "clip-yfcc15m-vitb32",
    "declip": "declip-yfcc15m-vitb32",
}
"""Side → the recipe whose sizes it has, where that is another."""

Rows = list[dict[str, Any]]


def sides(
    bench: Bench, name: str, arms: tuple[str, ...], steps: Callable[..., dict[str, Any]]
) -> Rows:
    """Measure `steps` of each side; an error of one must not stop the others."""
    shape, source = sizes(name, bench.tiny, bench.device, bench.precision, "joined")
    rows = []
    for arm in arms:
        recipe = recipe_of(PUBLISHED.get(arm, arm), name, shape, bench.base)
        row = {"tower": name, "what": arm, "precision": bench.precision}
        try:
            rows.append(row | steps(bench, name, arm, recipe, shape, source))
        except Exception as error:
            rows.append(row | {"failed": repr(error)[:300]})
        bench.free()
    return rows


def tower(bench: Bench, name: str) -> Rows:
    """Measure steps of three recipes and of open_clip, each at the largest batch size that fits."""

    def steps(
        bench: Bench, name: str, arm: str, recipe: Any, shape: Any, source: InMemory
    ) -> dict[str, Any]:
        theirs = arm == "open_clip"
        run = (
            open_clips_side(name, recipe, source, shape)
            if theirs
            else our_side(bench, recipe, source)
        )
        with FlopCounterMode(display=False) as counter:
            run(bench.base)
        count = bench.largest(run)
        while (task := bench.attempt(run, count)) is None:  # in fragmented memory it may need more
            bench.free()
            count //= 2
        return {"batch": count} | bench.measure(task, count, counter.get_total_flops() / bench.base)

    return sides(bench, name, (*RECIPES, "open_clip"), steps)


OPTIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "compile": {"compile": True},
    "matmul_precision high": {"matmul_precision": "high"},
    "channels_last": {"channels_last": True},
    "length_buckets 2": {"length_buckets": 2},
    "all": {
        "compile": True,
        "matmul_precision": "high",
        "channels_last": True,
        "length_buckets": 2,
    },
}
"""Keys of `train`, each switched on alone and then together."""


def switched(bench: Bench, name: str, keys: dict[str, Any]) -> tuple[Any, InMemory]:
    """Return the published recipe of DeCLIP with a tower and some keys of `train`, and pairs for it."""
    shape, source = sizes(name, bench.tiny, bench.device, bench.precision, "joined")
    recipe = recipe_of("declip-yfcc15m-vitb32", name, shape, bench.base)
    train = recipe.train.model_copy(update=keys)
    torch.set_float32_matmul_precision(train.matmul_precision)
    return recipe.model_copy(update={"train": train}), source


def options(bench: Bench, name: str) -> Rows:
    """Measure DeCLIP's step with each option of speed on and off, at one batch size."""
    rows, count = [], 4 if bench.tiny else 256
    for what, keys in OPTIONS.items():
        if name.startswith("ViT") and what == "channels_last":
            continue
        row = {"tower": name, "what": what}
        try:
            rows.append(
                row | bench.measure(our_side(bench, *switched(bench, name, keys))(count), count)
            )
        except Exception as error:  # one option must not stop the others
            rows.append(row | {"failed": repr(error)[:300]})
        bench.free()
    torch.set_float32_matmul_precision("highest")
    return rows


def budget(bench: Bench, name: str) -> Rows:
    """Divide DeCLIP's step into its parts: time, share of the step and, for the towers, utilization."""
    rows, count = [], 4 if bench.tiny else 256
    for what in ("as published", "all"):
        recipe, source = switched(bench, name, OPTIONS[what])
        built = build(recipe, source, bench.device)
        batch = tiled(batch_of(recipe, source), count).to(bench.device)
        ready, inner = built.learner.prepare(batch), built.learner

        def towers(built: Any = built, ready: Any = ready) -> dict[str, torch.Tensor]:
            with built.learner.autocast():
                return built.objective.run_towers(built.model, ready).tensors()

        def backward(towers: Any = towers) -> None:
            outputs = [t for t in towers().values() if t.requires_grad]
            torch.autograd.backward(outputs, [torch.zeros_like(t) for t in outputs])

        def losses(built: Any = built, ready: Any = ready) -> None:
            with built.learner.autocast():
                outputs = built.objective.run_towers(built.model, ready)
                built.objective.losses(outputs, built.model, ready, None, 0)["loss"].backward()

        with FlopCounterMode(display=False) as counter:
            backward()
        parts = {
            "step": (partial(built.step, batch), None),
            "views": (partial(inner.prepare, batch), None),
            "towers": (backward, counter.get_total_flops() / count),
            "towers and losses": (losses, None),
            "optimizer": (built.optimizer.step, None),
            "loading, this process": (partial(next, built.loader), None),
        }
        found = {part: bench.measure(task, count, flops) for part, (task, flops) in parts.items()}
        whole = found["step"]["ms"]
        rows += [
            {
                "tower": name,
                "what": f"{part}, {what}",
                "percent": round(100 * row["ms"] / whole, 1),
                **row,
            }
            for part, row in found.items()
        ]
        bench.free()
    torch.set_float32_matmul_precision("highest")
    return rows


def grad_cache(bench: Bench) -> Rows:
    """Measure a large batch in chunks: `clip` with `train.grad_cache_chunk`, and sentence-transformers' loss."""
    count, chunk = (8, 4) if bench.tiny else (4096, 256)

    def steps(
        bench: Bench, name: str, arm: str, recipe: Any, shape: Any, source: InMemory
    ) -> dict[str, Any]:
        if arm == "open_clip":
            run = open_clips_side(name, recipe, source, shape, chunk)
        else:
            train = recipe.train.model_copy(update={"grad_cache_chunk": chunk})
            run = our_side(bench, recipe.model_copy(update={"train": train}), source)
        return {"batch": count, "chunk": chunk} | bench.measure(run(count), count)

    rows = sides(bench, "ViT-B-32", ("clip", "open_clip"), steps)
    return [
        row | {"what": row["what"].replace("open_clip", "sentence-transformers")} for row in rows
    ]


def views(bench: Bench) -> Rows:
    """Compare color changes and blur on the device with one CPU thread: time and largest difference."""
    recipe = load_recipe(
        "demo-declip" if bench.tiny else "declip", {"train.batch_size": 8 if bench.tiny else 128}
    )
    built = build(recipe, InMemory(texts_of(Shapes(), "joined", 256), recipe.image.size))
    batch, threads = next(built.loader), torch.get_num_threads()
    finish: dict[Any, Any] = {
        device: partial(
            apply_photometric,
            batch.to(device).views,
            built.learner.mean.to(device),
            built.learner.std.to(device),
        )
        for device in (bench.device, torch.device("cpu"))
    }
    if bench.cuda:  # what train.compile uses
        finish["compiled"] = partial(finish[bench.device], finish=fused_views.compiled())
    host = finish[torch.device("cpu")]()["first"].pixels
    torch.set_num_threads(1)
    rows = [
        {"what": f"{name}, one CPU thread"} | bench.measure(task, len(batch))
        for name, task in finish.items()
    ]
    torch.set_num_threads(threads)
    far = {
        name: (task()["first"].pixels.cpu() - host).abs().max().item()
        for name, task in finish.items()
    }
    return [*rows, {"what": "largest difference", "value": max(far.values())}]


def run_keys(bench: Bench, source: Path, **train: Any) -> dict[str, Any]:
    """Return overrides for a short run on drawn shapes."""
    keys: dict[str, Any] = {
        "data.source": str(source), "data.workers": 0, "train.steps": 6, "train.batch_size": 16, "train.log_every": 1,
        "train.checkpoint_every": 3, "train.keep_checkpoints": 9, "train.device": str(bench.device),
        "train.precision": bench.precision, "evaluation.zero_shot": [], "evaluation.retrieval": [],
        "evaluation.final_zero_shot": [], "evaluation.final_retrieval": [], "nearest_neighbor.queue_size": 64,
    }  # fmt: skip
    if bench.tiny:
        keys |= {
            "image.size": 32,
            "text.layers": 1,
            "text.width": 64,
            "text.heads": 2,
            "simsiam.widths": [64, 64, 32],
        }
    else:
        keys |= {"image.model": TOWERS["ViT-B-32"], "image.size": 224, "train.batch_size": 128}
    return keys | {f"train.{name}": value for name, value in train.items()}


def draw_pairs(folder: Path, count: int = 128) -> Path:
    """Write a table of drawn shapes."""
    shapes, lines = Shapes(), []
    for number in range(count):
        pair = shapes[number]
        pair.open().decoded().save(folder / f"{number}.png")
        (caption,) = pair.captions()
        lines.append(json.dumps({"image": f"{number}.png", "caption": caption}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def train(recipe: str, keys: dict[str, Any], folder: Path, resume: bool = False) -> list[float]:
    """Train a run and return the loss of each step."""
    run = Trainer(
        assemble(load_recipe(recipe, keys), folder, resume=resume), progress=False
    ).train()
    return [row["loss"] for row in run.metrics]


def end_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a run's last checkpoint."""
    last = load_checkpoint(list_checkpoints(folder)[-1])
    return {**last.weights, **last.training}


def resume(bench: Bench) -> Rows:
    """Check that a resumed run equals an uninterrupted one bit for bit, and measure the cost of deterministic mode."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        keys = run_keys(bench, draw_pairs(folder))
        torch.use_deterministic_algorithms(True)
        try:
            train("demo-declip", keys, folder / "whole")
            shutil.copytree(folder / "whole", folder / "resumed")
            shutil.rmtree(list_checkpoints(folder / "resumed")[-1])
            train("demo-declip", keys, folder / "resumed", resume=True)
            whole, resumed = end_of(folder / "whole"), end_of(folder / "resumed")
            equal = whole.keys() == resumed.keys() and all(
                torch.equal(whole[n], resumed[n]) for n in whole
            )
            rows: Rows = [{"what": "resumed = uninterrupted, deterministic mode", "value": equal}]
            built = build(
                load_recipe("demo-declip", keys),
                InMemory(texts_of(Shapes(), "joined", 256), 64),
                bench.device,
            )
            batch = next(built.loader).to(bench.device)
            slow = bench.seconds(lambda: built.step(batch))
        finally:
            torch.use_deterministic_algorithms(False)
        fast = bench.seconds(lambda: built.step(batch))
    return [*rows, {"what": "time of deterministic mode", "value": round(slow / fast, 3)}]


def _rank(rank: int, backend: str, folder: str, keys: dict[str, Any], cuda: bool) -> None:
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        keys = {**keys, "train.device": f"cuda:{rank % torch.cuda.device_count()}"}
    where = f"file://{folder}/meet"
    dist.init_process_group(backend, init_method=where, rank=rank, world_size=2)
    losses = train("demo-declip", keys, Path(folder) / "run")
    if rank == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def two_processes(bench: Bench) -> Rows:
    """Compare two processes with one, for DDP with synchronized batch norm and FSDP2: largest difference of the loss.

    NCCL may refuse two processes on one GPU; gloo, through host memory, is tried next.
    """
    rows: Rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = draw_pairs(folder)
        for strategy, tower in (
            ("ddp", {"image.model": "declip_conv_tiny", "image.size": 32}),
            ("fsdp", {"image.model": "declip_vit_tiny", "image.size": 32}),
        ):
            keys = run_keys(bench, source, strategy=strategy, precision="fp32", steps=2) | tower
            one = train("demo-declip", keys, folder / f"{strategy}-one")
            for backend in ("nccl", "gloo") if bench.cuda else ("gloo",):
                place = folder / f"{strategy}-{backend}"
                place.mkdir()
                row = {"what": f"{strategy} on two processes, {backend}"}
                try:
                    method = "spawn" if bench.cuda else "fork"
                    mp.start_processes(
                        _rank,
                        (backend, str(place), keys, bench.cuda),
                        nprocs=2,
                        start_method=method,
                    )
                except Exception as error:  # of NCCL, of a rank
                    rows.append(row | {"note": str(error).strip().splitlines()[-1][:200]})
                    continue
                two = json.loads((place / "losses.json").read_text())
                rows.append(row | {"value": max(abs(a - b) for a, b in zip(one, two, strict=True))})
                break
    return rows


def waits(bench: Bench) -> Rows:
    """Count the host's waits for the device within a step, with CUDA's own check."""
    row = {"what": "waits of the host in a step", "value": None}
    if not bench.cuda:
        return [row]
    source = InMemory(texts_of(Shapes(), "joined", 256), 32)
    built = build(
        load_recipe("demo-declip", {"train.precision": bench.precision}), source, bench.device
    )
    batch = next(built.loader).to(bench.device)
    places = waits_of(partial(built.step, batch), bench.cuda)
    return [row | {"value": len(places), "note": ", ".join(sorted(set(places))) or None}]


def waits_of(step: Callable[[], object], cuda: bool) -> list[str]:
    """Return the places in a step at which the host waits for the device; none without one."""
    step()  # creates the optimizer state
    if not cuda:
        step()
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(found.filename).name}:{found.lineno}" for found in caught]


def _rank_waits(rank: int, backend: str, folder: str, cuda: bool) -> None:
    """Write the waits of a step with synchronized batch norm on one of two processes."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    source = InMemory(texts_of(Shapes(), "joined", 256), 32)
    built = build(load_recipe("demo-declip", {"train.precision": "fp32"}), source, device)
    batch = next(built.loader).to(device)
    sync = StepSync((len(batch), len(batch)), stop=False)
    step = partial(training_step, built.learner, built.optimizer, batch, sync)
    places = waits_of(step, cuda)
    if rank == 0:
        (Path(folder) / "waits.json").write_text(json.dumps(places))
    dist.destroy_process_group()


def waits_of_two(bench: Bench) -> Rows:
    """Count the host's waits within a step of two processes; those of gloo, which copies to the host, are its own."""
    rows: Rows = []
    with TemporaryDirectory() as name:
        for backend in ("nccl", "gloo") if bench.cuda else ("gloo",):
            place = Path(name) / backend
            place.mkdir()
            row = {"what": f"waits of the host in a step of two processes, {backend}"}
            try:
                method = "spawn" if bench.cuda else "fork"
                mp.start_processes(
                    _rank_waits, (backend, str(place), bench.cuda), nprocs=2, start_method=method
                )
            except Exception as error:  # of NCCL, which may refuse two processes on one GPU
                rows.append(row | {"note": str(error).strip().splitlines()[-1][:200]})
                continue
            places = json.loads((place / "waits.json").read_text())
            rows.append(
                row
                | {"value": len(places)}
                | ({"note": ", ".join(sorted(set(places)))} if places else {})
            )
            break
    return rows


PARTS: dict[str, Callable[[Bench], Rows]] = {
    "ViT-B-32": lambda bench: tower(bench, "ViT-B-32"),
    "resume": resume,
    "two-processes": two_processes,
    "views": views,
    "waits": waits,
    "waits-of-two": waits_of_two,
    "grad-cache": grad_cache,
    "budget": lambda bench: budget(bench, "ViT-B-32"),
    "options": lambda bench: options(bench, "ViT-B-32"),
    "ViT-B-16": lambda bench: tower(bench, "ViT-B-16"),
    "budget-ViT-B-16": lambda bench: budget(bench, "ViT-B-16"),
    "RN50": lambda bench: tower(bench, "RN50"),
    "options-RN50": lambda bench: options(bench, "RN50"),
}
"""Measured in this order."""


def main() -> None:
    """Measure the missing parts, print all as a table, and as JSON in the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu"),
        help="folder of the results (default runs/gpu)",
    )
    parser.add_argument(
        "--only", help=f"parts, separated by commas: {', '.join(PARTS)}. Default: all"
    )
    parser.add_argument(
        "--minutes", type=float, default=8, help="no part starts later than this (default 8)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="small towers")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only names '{unknown[0]}'; give {', '.join(PARTS)}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        bench = Bench(options)
        if not (bench.cuda or bench.tiny):
            parser.error(
                f"A CUDA GPU is required; the device is {bench.card}. For small towers: --device cpu --tiny"
            )
        results, left = run_parts(bench, names, options.minutes)
    except (UserError, OSError) as error:
        parser.error(str(error))
    show(
        [{"part": name, **row} for name, result in results.items() for row in result["rows"]],
        ("tower",),
    )
    if left:
        print(f"Left for the next call: {', '.join(left)}", file=sys.stderr)
    print(json.dumps(results))
    sys.exit(1 if any(failures(result) for result in results.values()) else 0)


def run_parts(bench: Bench, names: list[str], minutes: float) -> tuple[dict[str, Any], list[str]]:
    """Return the results of parts, earlier and new ones, and the parts that were left out for lack of time."""
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
        except Exception as error:  # one part must not stop the others
            rows = [{"what": "all", "failed": repr(error)[:300]}]
        bench.free()
        took = round(time.perf_counter() - started, 1)
        found = {
            "card": bench.card,
            "tiny": bench.tiny,
            "seconds": took,
            "machine": machine(),
            "rows": rows,
        }
        results[name] = found
        with atomic_write(bench.out / f"{name}.json", "give another folder as --out") as path:
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return {name: result for name, result in results.items() if result}, left


def failures(result: dict[str, Any]) -> bool:
    """Return whether a row of a part failed."""
    return any("failed" in row for row in result.get("rows", []))


if __name__ == "__main__":
    main()
