"""A training step with `train.grad_cache_chunk` against one that sees its batch whole: memory, time and gradients.

    python benchmarks/chunks.py --batch-size 512 --chunk 128 32              small pictures, a minute or two
    python benchmarks/chunks.py --image vit_base_patch32_clip_quickgelu_224 --batch-size 4096 --chunk 64

Each step is a fresh process's first: towers, AdamW, a queue full of random rows, and a batch of random pictures with
captions. For each chunk there is a row for a whole batch of its size: what the large batch should need too, apart from
what its pairs leave behind (pictures as the loader gives them, what the towers made of them, loss matrices). A whole
batch that would not fit is left out. Gradients are compared on `--agree` pairs, both ways. The last line is JSON.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timm.models import get_pretrained_cfg
from torch import Tensor

from declip.data.batch import PairBatch
from declip.models.image_tower import SMALL_TOWERS
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.training.step import StepParts, training_step
from machine import machine
from memory import added_peak, available, in_fresh_process, resident
from pairs import InMemory
from parts import build


def read_recipe(options: argparse.Namespace, batch: int, chunk: int | None) -> Recipe:
    """The recipe to take a step of: of demo size for the small towers, else CLIP's as published."""
    small = options.image in SMALL_TOWERS
    size = 32 if small else get_pretrained_cfg(options.image).input_size[-1]
    keys = {
        "image.model": options.image,
        "image.size": size,
        "train.batch_size": batch,
        "train.grad_cache_chunk": chunk,
    }
    keys |= {"train.precision": options.precision, "train.device": "cpu"}
    return load_recipe(options.recipe or ("demo-declip" if small else "clip-yfcc15m-vitb32"), keys)


def prepare(recipe: Recipe) -> tuple[StepParts, PairBatch]:
    """Build the parts of a step, and load a batch of random images."""
    captions = [f"a drawing of thing number {n} on a white page" for n in range(recipe.train.batch_size)]
    built = build(recipe, InMemory(captions, recipe.image.size))
    return built.step, next(built.loader)


def one_step(recipe: Recipe) -> dict[str, float]:
    """Take a step in this process; gigabytes are 10^9 bytes."""
    parts, batch = prepare(recipe)
    held = resident()
    losses: dict[str, Tensor] = {}
    started, used = time.perf_counter(), time.process_time()
    added = added_peak(lambda: losses.update(training_step(parts, batch)))
    return {
        "GB": round((held + added) / 1e9, 3),
        "GB before the step": round(held / 1e9, 3),
        "GB of images": round(sum(view.pixels.nbytes for view in batch.views.values()) / 1e9, 3),
        "seconds": round(time.perf_counter() - started, 2),
        "processor seconds": round(time.process_time() - used, 2),
        "loss": float(losses["loss"]),
        "gradient norm": float(losses["grad_norm"]),
    }


def gradients(recipe: Recipe) -> dict[str, Tensor]:
    """Every parameter's gradient."""
    parts, batch = prepare(recipe)
    training_step(parts, batch)
    named = {name: p.grad for name, p in parts.learner.named_parameters() if p.grad is not None}
    return {name: gradient.clone() for name, gradient in named.items()}


def agreement(whole: Recipe, in_chunks: Recipe) -> dict[str, float]:
    """How far the gradients are apart: over the length of all together, and over each parameter's largest entry."""
    expected, found = gradients(whole), gradients(in_chunks)
    assert expected.keys() == found.keys()
    apart = torch.stack([(found[name] - g).norm() for name, g in expected.items()]).norm()
    length = torch.stack([g.norm() for g in expected.values()]).norm()
    entries = [float((found[name] - g).abs().max() / g.abs().max()) for name, g in expected.items() if g.any()]
    return {"of all": float(apart / length), "of a parameter, at most": max(entries)}


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """Each chunk, a whole batch of its size, and the whole batch where it fits."""
    rows: list[dict[str, object]] = []

    def add(batch: int, chunk: int | None) -> dict[str, float]:
        found = in_fresh_process(one_step, read_recipe(options, batch, chunk))
        rows.append({"part": "chunks", "image": options.image, "batch": batch, "chunk": chunk, **found})
        return found

    for chunk in options.chunk:
        alone = add(chunk, None)
        add(options.batch_size, chunk)
    needed = (alone["GB"] - alone["GB before the step"]) * options.batch_size / options.chunk[-1]
    if 1e9 * needed < 0.8 * available():
        add(options.batch_size, None)
    else:
        rows.append({"part": "chunks", "note": f"the whole batch would add about {needed:,.0f} GB and was left out"})
    if options.agree:
        recipes = (read_recipe(options, options.agree, chunk) for chunk in (None, options.chunk[-1]))
        found = in_fresh_process(agreement, *recipes)
        rows.append({"part": "gradients", "batch": options.agree, "chunk": options.chunk[-1], **found})
    return rows


def main() -> None:
    """Measure, show a table, and print the JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="declip_vit_small", help="image tower (default declip_vit_small)")
    parser.add_argument("--recipe", help="default: declip for the small towers, else clip-yfcc15m-vitb32")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--chunk", type=int, nargs="+", default=[128, 32], help="one or more, the last is compared")
    parser.add_argument("--agree", type=int, default=128, help="pairs to compare gradients on, 0 for none")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"machine": machine(), "rows": measure(options)}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = Table("batch", "chunk", "GB", "before", "pictures", "seconds", "of a core", "loss", title="A step")
    for found in result["rows"]:
        if "GB" in found:
            sizes = (f"{found[name]:.2f}" for name in ("GB", "GB before the step", "GB of images"))
            times = (f"{found[name]:,.1f}" for name in ("seconds", "processor seconds"))
            chunk = "whole" if found["chunk"] is None else str(found["chunk"])
            table.add_row(f"{found['batch']:,}", chunk, *sizes, *times, f"{found['loss']:.6f}")
    said = [found["note"] for found in result["rows"] if "note" in found]
    said += [f"gradients: {found}" for found in result["rows"] if found["part"] == "gradients"]
    Console().print(table, *said, sep="\n", highlight=False)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
