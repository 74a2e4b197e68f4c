"""Compare a full-size training step with open_clip's; the batch is on the device.

    python benchmarks/step.py --json
    python benchmarks/step.py --recipe my.yaml --image ViT-B-16 --batch-size 64 --precision bf16 --json

A step is forward, loss, backward, AdamW and setting the gradients to none. Ours is `training_step` with the recipes
`clip-yfcc15m-vitb32` and --recipe, a late second view included, on the loader's uint8 views, whose colors are finished
on the device within the step; open_clip gets images that are finished, as its loader makes them, and pads captions to
77 tokens. All take turns in one process (A B A B …); the numbers are medians. They hold for the machine, its load and
the threads printed with them. Muon's update is measured on the same gradients.

With --json the last line is one JSON object: "ours_over_open_clip", "clip_over_open_clip" and "muon_over_adamw" by
precision, and all seconds.
"""

import argparse
import gc
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from declip.data.batch import PairBatch
from declip.data.images.views import apply_photometric
from declip.data.text.tokenizer import Tokenizer
from declip.errors import UserError, unknown
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.training.assemble import build_loader
from declip.training.optimizer import build_optimizer, named_trainable
from declip.training.step import training_step
from declip.training.trainer import keep_freed_memory
from machine import machine
from memory import peak
from pairs import CAPTIONS, InMemory, open_pairs, texts_of
from parts import build
from peers import LEARNING_RATE, Shape, Side, count, open_clip_side
from timing import medians, time_turns

TOWERS = {
    "ViT-B-32": "vit_base_patch32_clip_quickgelu_224",
    "ViT-B-16": "vit_base_patch16_clip_quickgelu_224",
    "ViT-L-14": "vit_large_patch14_clip_quickgelu_224",
    "RN50": "resnet50_clip",
    "RN101": "resnet101_clip",
}
"""OpenAI's name → timm's; open_clip's is OpenAI's and "-quickgelu"."""

BATCHES = 9
"""Loaded batches; the one with the median text length is used, because a batch is as long as its longest caption."""


@dataclass
class Setting:
    """Inputs that all implementations share.

    Attributes:
        name: OpenAI's name of the image tower.
        shape: Sizes, device and precision.
        recipes: "clip", and "ours" of --recipe.
        source: The pairs, in memory.
        batches: One of each recipe, of the same pairs.
    """

    name: str
    shape: Shape
    recipes: dict[str, Recipe]
    source: InMemory
    batches: dict[str, PairBatch]


def resolve(name: str) -> str:
    """Return OpenAI's name of a tower that is given by OpenAI's, open_clip's or timm's name.

    Raises:
        UserError: No equivalent of it in open_clip is known here.
    """
    aliases = {alias: key for key, timm in TOWERS.items() for alias in (key, f"{key}-quickgelu", timm)}
    if name not in aliases:
        raise unknown("image tower with an equivalent in open_clip", name, aliases)
    return aliases[name]


def prepare(options: argparse.Namespace) -> Setting:
    """Build sizes, recipes and batches from the options."""
    import open_clip

    name = resolve(options.image)
    config = open_clip.get_model_config(f"{name}-quickgelu")
    config = tiny(config) if options.tiny else config
    device = pick_device(options.device)
    shape = Shape(config, options.tiny, device, options.precision)
    shipped = {"clip": "clip-yfcc15m-vitb32", "ours": options.recipe}
    recipes = {arm: recipe_of(recipe, name, shape, options.batch_size) for arm, recipe in shipped.items()}
    source = InMemory(texts_of(open_pairs(), options.captions), config["vision_cfg"]["image_size"])
    batches = {arm: batch_of(recipe, source).to(device) for arm, recipe in recipes.items()}
    return Setting(name, shape, recipes, source, batches)


def tiny(config: dict[str, Any]) -> dict[str, Any]:
    """Shrink a configuration to narrow towers of two layers, or four blocks, for 32 px."""
    stages = isinstance(config["vision_cfg"]["layers"], list)
    vision = {"layers": [1, 1, 1, 1]} if stages else {"layers": 2, "width": 64, "patch_size": 16}
    return {
        **config,
        "embed_dim": 32,
        "vision_cfg": {**config["vision_cfg"], **vision, "image_size": 32},
        "text_cfg": {**config["text_cfg"], "width": 64, "heads": 2, "layers": 2},
    }


def recipe_of(recipe: str, name: str, shape: Shape, batch: int) -> Recipe:
    """Load a recipe with the towers of the shape and all views from the first step on."""
    text, vision, convolutional = shape.config["text_cfg"], shape.config["vision_cfg"], name.startswith("RN")
    keys = {
        "image.model": TOWERS[name], "image.size": vision["image_size"], "embed_dim": shape.config["embed_dim"],
        "text.width": text["width"], "text.layers": text["layers"], "text.heads": text["heads"],
        "train.batch_size": batch, "train.precision": shape.precision, "train.warmup_lr": LEARNING_RATE,
        "data.workers": 0,
    }  # fmt: skip
    if shape.tiny:
        width, patch = vision["width"], vision["patch_size"]
        blocks = {"patch_size": patch, "embed_dim": width, "depth": 2, "num_heads": width // 64}
        keys["image.model_kwargs"] = {"depths": vision["layers"]} if convolutional else blocks
    if convolutional:
        keys["image.freeze_patch_embed"] = False
    loaded = load_recipe(recipe)
    if loaded.train.grad_cache_chunk is not None:  # a recipe for one GPU, its towers whole
        keys["train.grad_cache_chunk"] = None
    return load_recipe(recipe, keys)


def batch_of(recipe: Recipe, source: InMemory) -> PairBatch:
    """Load the batch with the median text length among the first."""
    with torch.device("meta"):
        model = DualEncoder.from_recipe(recipe)
    loader = build_loader(recipe, source, model)
    longest = [max(len(model.tokenizer.encode(source.texts[i])) for i in loader.indices(k)) for k in range(BATCHES)]
    loader.step = longest.index(sorted(longest)[BATCHES // 2])
    return next(loader)


def our_side(arm: str, setting: Setting) -> Side:
    """Build `training_step` with a shipped recipe."""
    built, batch = build(setting.recipes[arm], setting.source, setting.shape.device), setting.batches[arm]
    recipe = setting.recipes[arm]
    if setting.shape.device.type == "cpu":
        keep_freed_memory()
    parameters = {
        "model": count(built.model),
        "heads": count(built.objective),
        "learned": count(built.model, built.objective, learned=True),
    }
    with_muon = recipe.train.model_copy(update={"optimizer": "muon"})
    muon = build_optimizer(named_trainable(built.model, built.objective), with_muon)
    return Side(
        lambda: training_step(built.step, batch),
        built.step.optimizer.step,
        parameters,
        batch.texts.shape[-1],
        lambda: apply_photometric(batch.views, built.step.mean, built.step.std),
        muon=muon.step if arm == "clip" else None,
    )


def makers(setting: Setting) -> dict[str, Callable[[], Side]]:
    """Return a builder for each implementation."""
    clip = setting.batches["clip"]
    captions = [setting.source.texts[int(number) % len(setting.source)] for number in clip.sample_ids]
    image = setting.recipes["clip"].image
    mean, std = (torch.tensor(values, device=setting.shape.device) for values in (image.mean, image.std))
    finished = apply_photometric(clip.views, mean, std)["first"].pixels
    return {
        "clip": lambda: our_side("clip", setting),
        "open_clip": lambda: open_clip_side(f"{setting.name}-quickgelu", setting.shape, finished, captions),
        "ours": lambda: our_side("ours", setting),
    }


def tasks_of(name: str, side: Side, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the step and two of its parts; each waits for the device."""
    parts = {name: side.step, f"{name}: optimizer": side.update}
    if side.views is not None:
        parts[f"{name}: views"] = side.views
    if side.muon is not None:
        parts[f"{name}: muon"] = side.muon
    return parts if device.type == "cpu" else {what: synchronized(task, device) for what, task in parts.items()}


def synchronized(task: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Wrap a task so that it waits for the device."""

    def run() -> None:
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def one_by_one(setting: Setting, builders: dict[str, Callable[[], Side]], repeats: int) -> tuple[dict, dict]:
    """Measure all implementations in turns; each is built for its turn and freed after it, so that memory suffices."""
    taken: dict[str, list[float]] = {}
    sides = {}
    for _ in range(repeats):
        for name, make in builders.items():
            side = make()
            for what, seconds in time_turns(1, tasks_of(name, side, setting.shape.device)).items():
                taken.setdefault(what, []).extend(seconds)
            sides[name] = described(side)
            del side
            gc.collect()
    return taken, sides


def described(side: Side) -> dict[str, Any]:
    """Return the parameters and text length of an implementation."""
    return {"parameters": side.parameters, "text_length": side.text_length}


def compare_all(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all implementations in each precision."""
    found = {}
    for precision in ("fp32", "bf16") if options.precision == "both" else (options.precision,):
        found[precision] = compare(argparse.Namespace(**{**vars(options), "precision": precision}))
        gc.collect()
    ratios = ("ours_over_open_clip", "clip_over_open_clip", "muon_over_adamw")
    return {
        **{ratio: {precision: result[ratio] for precision, result in found.items()} for ratio in ratios},
        "measured": found,
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all implementations in one precision."""
    setting = prepare(options)
    about, builders = machine(), makers(setting)
    taken, sides = one_by_one(setting, builders, options.repeats)
    whole = medians(taken)
    seconds = {name: whole[name] for name in builders}
    views = {name: whole[f"{name}: views"] for name in setting.recipes}
    peer = whole["open_clip"]
    result = {
        "part": "step",
        "recipe": options.recipe,
        "image": setting.name,
        "timm": TOWERS[setting.name],
        "tiny": options.tiny,
        "batch": options.batch_size,
        "repeats": options.repeats,
        "precision": options.precision,
        "device": device_name(setting.shape.device),
        "threads": torch.get_num_threads(),
        "captions": described_captions(options.captions, setting),
        "text_length": {name: side["text_length"] for name, side in sides.items()},
        "parameters": {name: side["parameters"] for name, side in sides.items()},
        "clip_over_open_clip": whole["clip"] / peer,
        "ours_over_open_clip": whole["ours"] / peer,
        "ours_over_clip": whole["ours"] / whole["clip"],
        "muon_over_adamw": 1 + (whole["clip: muon"] - whole["clip: optimizer"]) / whole["clip"],
        "clip_without_views_over_open_clip": (whole["clip"] - views["clip"]) / peer,
        "without_optimizers": {
            f"{name}_over_open_clip": (whole[name] - whole[f"{name}: optimizer"])
            / (peer - whole["open_clip: optimizer"])
            for name in builders
            if name != "open_clip"
        },
        "seconds": seconds,
        "views_seconds": views,
        "optimizer_seconds": {name: whole[f"{name}: optimizer"] for name in builders},
        "raw_seconds": taken,
        "largest_memory_mb": round(peak() / 1e6),
        "machine": about,
    }
    return result


def device_name(device: torch.device) -> str:
    """Return the accelerator's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def described_captions(kind: str, setting: Setting) -> dict[str, Any]:
    """Return mean and longest text in tokens, start and end included, of the source and of the batch."""
    encode, clip = Tokenizer().encode, setting.batches["clip"]
    whole = [len(encode(text)) for text in setting.source.texts]
    of_batch = (clip.texts[0] == Tokenizer().end).int().argmax(dim=1).add(1).tolist()

    def said(lengths: Iterable[int], where: str) -> dict[str, float]:
        values = list(lengths)
        return {f"tokens_mean{where}": round(sum(values) / len(values), 1), f"tokens_longest{where}": max(values)}

    return {"kind": kind, "from": open_pairs().name, **said(whole, ""), **said(of_batch, "_of_batch")}


def show(result: dict[str, Any], console: Console) -> None:
    """Print a row for each implementation."""
    table = Table("side", "s a step", "× open_clip", "AdamW, s", "views, s", "tokens", "10⁶ learned", title="Medians")
    for name, seconds in result["seconds"].items():
        views = result["views_seconds"].get(name)
        table.add_row(
            name,
            f"{seconds:.3f}",
            f"{seconds / result['seconds']['open_clip']:.2f}",
            f"{result['optimizer_seconds'][name]:.3f}",
            "-" if views is None else f"{views:.3f}",
            str(result["text_length"][name]),
            f"{result['parameters'][name]['learned'] / 1e6:.1f}",
        )
    console.print(table)
    console.print(
        f"{result['image']}, {result['batch']} pairs, {result['precision']}, {result['device']}, threads: "
        f"{result['threads']}; load {result['machine']['load_before']} before; {result['repeats']} turns each",
        highlight=False,
    )


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--image", default="ViT-B-32", help=f"{', '.join(TOWERS)}, or timm's name (default ViT-B-32)")
    found.add_argument("--batch-size", type=int, default=32, help="pairs, 2 or more (default 32)")
    found.add_argument("--repeats", type=int, default=3, help="turns of each, 1 or more (default 3)")
    found.add_argument("--recipe", default="declip", help="ours (default declip)")
    found.add_argument(
        "--precision", choices=("both", "fp32", "bf16"), default="both", help="bf16: autocast, on all sides"
    )
    found.add_argument("--threads", type=int, help="default: torch's own number")
    found.add_argument("--device", default="auto")
    found.add_argument(
        "--captions",
        choices=CAPTIONS,
        default="joined",
        help="of the built-in emoji: one caption; all captions of a pair (default); several pairs', "
        "so that all 77 tokens are used",
    )
    found.add_argument("--tiny", action="store_true", help="towers of two narrow layers at 32 px, to try this script")
    found.add_argument("--json", action="store_true", help="print the result as JSON, as the last line")
    return found


def main() -> None:
    """Measure, print a table, and JSON in the last line."""
    options = (command := parser()).parse_args()
    for name, least in (("batch_size", 2), ("repeats", 1), ("threads", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            command.error(f"--{name.replace('_', '-')} is {value}; give {least} or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        result = compare_all(options)
    except UserError as error:
        command.error(str(error))
    except ImportError as error:
        command.error(f"{error}. The peers come with: pip install 'declip[bench]'")
    for measured in result["measured"].values():
        show(measured, Console(stderr=True))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
