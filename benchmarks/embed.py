"""Embed JPEG files: declip compared with sentence-transformers, open_clip's plain loop, and the tower alone.

    pip install 'declip[open_clip,hf]'; pip install sentence-transformers --no-deps
    python benchmarks/embed.py --threads 2 --json
    python benchmarks/embed.py --threads 2 --towers ViT-B-32 RN50 builtin:lite0-minilm \
        --sizes 300x300 640x480 1024x768 --out FILE

Weights are random, except those of the built-in start. All sides take turns in one process and hold their model:
declip as `declip embed` with its defaults, the others in float32 as their guides show, and as "…_bf16" with their
weights in bfloat16. "fp32" is declip in float32, "tower" its image tower alone on pixels in memory. The last line is
JSON; with --json the ratios of ViT-B/32 only.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from declip.interchange.read import load
from declip.models.dual_encoder import DualEncoder
from declip.models.inference import image_encoder
from declip.models.precision import Precision, convert, precision_of
from declip.recipe.load import load_recipe
from declip.recipe.starts import STARTS
from declip.search.embed import embed
from timing import machine, medians, row, time_turns

TOWERS = {
    "ViT-B-32": "vit_base_patch32_clip_quickgelu_224",
    "RN50": "resnet50_clip",
}  # open_clip's names, and timm's


def write_images(folder: Path, width: int, height: int, count: int) -> list[Path]:
    """Write JPEG files as dense as photographs: smooth colors with grain."""
    rng, paths = np.random.default_rng(0), [folder / f"{number:05d}.jpg" for number in range(count)]
    for path in paths:
        colors = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        grain = rng.integers(-12, 13, (height, width, 1))
        Image.fromarray((np.asarray(colors) + grain).clip(0, 255).astype(np.uint8)).save(
            path, quality=85
        )
    return paths


def build(tower: str, precision: Precision) -> DualEncoder:
    """Build declip's model."""
    if tower in STARTS:
        return load(tower, "cpu", precision)
    torch.manual_seed(0)
    keys = {"image.model": TOWERS[tower], "image.size": 224, "embed_dim": 512}
    return convert(DualEncoder(load_recipe("few-clip", keys), towers="image").eval(), precision)


def open_clip_loop(tower: str, paths: list[Path], dtype: torch.dtype) -> Callable[[], object]:
    """The loop of open_clip's README, in batches of 64."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(tower)
    model.to(dtype).eval()

    @torch.no_grad()
    def loop() -> list[torch.Tensor]:
        batches = [paths[start : start + 64] for start in range(0, len(paths), 64)]
        stacks = (
            torch.stack([preprocess(Image.open(path)) for path in batch]) for batch in batches
        )
        return [normalize(model.encode_image(stack.to(dtype)), dim=-1) for stack in stacks]

    return loop


def sentence_loop(folder: Path, paths: list[Path], dtype: torch.dtype) -> Callable[[], object]:
    """sentence-transformers' `encode` of opened images, with CLIP ViT-B/32 of transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    CLIPModel(CLIPConfig(projection_dim=512)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    model = SentenceTransformer(modules=[Transformer(str(folder))], device="cpu").to(dtype)
    return lambda: model.encode([Image.open(path) for path in paths], show_progress_bar=False)


def compare(tower: str, size: str, count: int, repeats: int) -> list[dict[str, Any]]:
    """Embed `count` files of a size with each side; returns a row for each."""
    width, height = map(int, size.split("x"))
    with tempfile.TemporaryDirectory() as work:
        folder, runs = Path(work) / "images", iter(range(1_000))
        folder.mkdir()
        paths = write_images(folder, width, height, count)
        model, exact = build(tower, "auto"), build(tower, "fp32")
        side = model.preprocessor.size
        pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
        encode = image_encoder(model)
        sides: dict[str, Callable[[], object]] = {
            "declip": lambda: embed(model, folder, out=Path(work) / f"index{next(runs)}"),
            "fp32": lambda: embed(exact, folder, out=Path(work) / f"index{next(runs)}"),
            "tower": torch.no_grad()(lambda: encode(pixels)),
        }
        for suffix, dtype in (("", torch.float32), ("_bf16", torch.bfloat16)):
            if tower in TOWERS:
                sides[f"open_clip{suffix}"] = open_clip_loop(tower, paths, dtype)
            if tower == "ViT-B-32":
                sides[f"sentence_transformers{suffix}"] = sentence_loop(
                    Path(work) / f"hf{suffix}", paths, dtype
                )
        seconds = medians(time_turns(repeats, sides))
    about = {"size": size, "precision": precision_of(model)}
    rows = [row(tower, name, each, count, "images", **about) for name, each in seconds.items()]
    return [
        {**about, "times_declip": round(seconds[name] / seconds["declip"], 3)}
        for name, about in zip(seconds, rows, strict=True)
    ]


def main() -> None:
    """Measure, and print a row for each side; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--towers", nargs="+", default=["ViT-B-32"], choices=[*TOWERS, *STARTS])
    parser.add_argument(
        "--sizes", nargs="+", default=["1024x768"], help="WIDTHxHEIGHT of the files"
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--json", action="store_true", help="print the ratios of ViT-B/32 alone")
    parser.add_argument("--out", type=Path, help="also write all numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"machine": machine(), "repeats": options.repeats, "rows": []}
    for tower in options.towers:
        for size in options.sizes:
            result["rows"] += compare(tower, size, options.images, options.repeats)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for each in result["rows"]:
        print(
            *(
                each[key]
                for key in ("part", "size", "what", "precision", "per_second", "times_declip")
            ),
            sep="\t",
        )
    times = {
        each["what"]: each["times_declip"] for each in result["rows"] if each["part"] == "ViT-B-32"
    }
    ratios = {f"over_{name}": times.get(name) for name in ("sentence_transformers", "open_clip")}
    print(json.dumps({**ratios, "of_the_tower": times.get("tower")} if options.json else result))


if __name__ == "__main__":
    main()
