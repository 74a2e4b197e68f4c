"""Compare a full-size training step with open_clip's; the batch is on the device.

    python benchmarks/step.py --json
    python benchmarks/step.py --recipe my.yaml --image ViT-B-16 --batch-size 64 --precision bf16 --json

A step is forward, loss, backward, AdamW and setting the gradients to none. Ours is `training_step` with the recipes
`clip-yfcc15m-vitb32` and --recipe, on the loader's uint8 views, whose colors are finished on the device within the
step; open_clip gets images that are finished, as its loader makes them, and pads captions to 77 tokens. All take turns
in one process (A B A B …); the numbers are medians. They hold for the machine, its load and the threads printed with
them. Muon's update is measured on the same gradients.

With --json the last line is one JSON object: "ours_over_open_clip", "clip_over_open_clip" and "muon_over_adamw" by
precision, and all seconds.
"""

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from declip.data.batch import PairBatch
from declip.data.images.views import apply_photometric
from declip.data.text.tokenizer import Tokenizer
from declip.errors import UserError
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training.assemble import build_loader
from declip.training.optimizer import build_optimizer, named_trainable
from pairs import CAPTIONS, InMemory, build, open_pairs, texts_of
from peers import LEARNING_RATE, Shape, Side, count, open_clip_side
from timing import device_name, machine, medians, show, time_turns

TOWERS = {
    "ViT-B-32": "vit_base_patch32_clip_quickgelu_224",
    "ViT-B-16": "vit_base_patch16_clip_quickgelu_224",
    "RN50": "resnet50_clip",
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


def sizes(
    name: str, small: bool, device: torch.device, precision: str, captions: str
) -> tuple[Shape, InMemory]:
    """Return the sizes of both towers, and pairs for them."""
    import open_clip

    config = open_clip.get_model_config(f"{name}-quickgelu")
    config = tiny(config) if small else config
    source = InMemory(texts_of(open_pairs(), captions), config["vision_cfg"]["image_size"])
    return Shape(config, small, device, precision), source


def prepare(options: argparse.Namespace, precision: str) -> Setting:
    """Build sizes, recipes and batches from the options."""
    name, device = options.image, pick_device(options.device)
    shape, source = sizes(name, options.tiny, device, precision, options.captions)
    shipped = {"clip": "clip-yfcc15m-vitb32", "ours": options.recipe}
    recipes = {
        arm: recipe_of(recipe, name, shape, options.batch_size) for arm, recipe in shipped.items()
    }
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
    text = shape.config["text_cfg"]
    vision = shape.config["vision_cfg"]
    convolutional = name.startswith("RN")
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
    # A recipe for one GPU, its towers whole
    if load_recipe(recipe).train.grad_cache_chunk is not None:
        keys["train.grad_cache_chunk"] = None
    return load_recipe(recipe, keys)


def batch_of(recipe: Recipe, source: InMemory) -> PairBatch:
    """Load the batch with the median text length among the first."""
    with torch.device("meta"):
        model = DualEncoder(recipe)
        loader = build_loader(source, model, Objective(recipe, model))
    longest = [
        max(len(model.tokenizer.encode(source.texts[i])) for i in loader.indices(k))
        for k in range(BATCHES)
    ]
    loader.step = longest.index(sorted(longest)[BATCHES // 2])
    return next(loader)


def our_side(arm: str, setting: Setting) -> Side:
    """Build `training_step` with a shipped recipe."""
    recipe, batch = setting.recipes[arm], setting.batches[arm]
    built = build(recipe, setting.source, setting.shape.device)
    parameters = {
        "model": count(built.model),
        "heads": count(built.objective),
        "learned": count(built.model, built.objective, learned=True),
    }
    with_muon = recipe.train.model_copy(update={"optimizer": "muon"})
    muon = build_optimizer(named_trainable(built.model, built.objective), with_muon)
    parts = {"": lambda: built.step(batch), ": optimizer": built.optimizer.step}
    parts[": views"] = lambda: apply_photometric(batch.views, built.learner.mean, built.learner.std)
    if arm == "clip":
        parts[": muon"] = muon.step
    return Side(parts, parameters, batch.texts.shape[-1])


def makers(setting: Setting) -> dict[str, Callable[[], Side]]:
    """Return a builder for each implementation."""
    clip = setting.batches["clip"]
    assert clip.sample_ids is not None, "the loader gives them"
    captions = [
        setting.source.texts[int(number) % len(setting.source)] for number in clip.sample_ids
    ]
    image = setting.recipes["clip"].image
    mean, std = (
        torch.tensor(values, device=setting.shape.device) for values in (image.mean, image.std)
    )
    finished = apply_photometric(clip.views, mean, std)["first"].pixels
    return {
        "clip": lambda: our_side("clip", setting),
        "open_clip": lambda: open_clip_side(
            f"{setting.name}-quickgelu", setting.shape, finished, captions
        ),
        "ours": lambda: our_side("ours", setting),
    }


def synchronized(task: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Wrap a task so that it waits for the device."""

    def run() -> None:
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def measure(setting: Setting, repeats: int) -> tuple[dict[str, list[float]], dict[str, Side]]:
    """Measure all implementations in turns; each is built for its turn and freed after it, so that memory suffices."""
    taken: dict[str, list[float]] = {}
    sides = {}
    for _ in range(repeats):
        for name, make in makers(setting).items():
            side = make()
            tasks = {
                f"{name}{part}": synchronized(task, setting.shape.device)
                for part, task in side.parts.items()
            }
            for what, seconds in time_turns(1, tasks).items():
                taken.setdefault(what, []).extend(seconds)
            sides[name] = Side({}, side.parameters, side.text_length)
            del side, tasks
            gc.collect()
    return taken, sides


def compare(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Measure all implementations in one precision."""
    setting, about = prepare(options, precision), machine()
    taken, sides = measure(setting, options.repeats)
    whole = medians(taken)
    optimizer = whole["clip: muon"] - whole["clip: optimizer"]
    return {
        "recipe": options.recipe,
        "image": setting.name,
        "tiny": options.tiny,
        "batch": options.batch_size,
        "repeats": options.repeats,
        "precision": precision,
        "device": device_name(setting.shape.device),
        "captions": described_captions(options.captions, setting),
        "text_length": {name: side.text_length for name, side in sides.items()},
        "parameters": {name: side.parameters for name, side in sides.items()},
        "clip_over_open_clip": whole["clip"] / whole["open_clip"],
        "ours_over_open_clip": whole["ours"] / whole["open_clip"],
        "muon_over_adamw": 1 + optimizer / whole["clip"],
        "seconds": {name: whole[name] for name in sides},
        "raw_seconds": taken,
        "machine": about,
    }


def described_captions(kind: str, setting: Setting) -> dict[str, Any]:
    """Return mean and longest text in tokens, start and end included, of the source and of the batch."""
    encode, texts = Tokenizer().encode, setting.batches["clip"].texts
    lengths = {"": [len(encode(text)) for text in setting.source.texts]}
    lengths["_of_batch"] = (texts[0] == Tokenizer().end).int().argmax(dim=1).add(1).tolist()
    means = {
        f"tokens_mean{where}": round(sum(each) / len(each), 1) for where, each in lengths.items()
    }
    longest = {f"tokens_longest{where}": max(each) for where, each in lengths.items()}
    return {"kind": kind, "from": open_pairs().name, **means, **longest}


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each implementation and part."""
    peer = result["seconds"]["open_clip"]
    about = {key: result[key] for key in ("image", "batch", "precision", "device")}
    return [
        {
            "what": what,
            "seconds": round(seconds, 3),
            "× open_clip": round(seconds / peer, 2),
            **about,
        }
        for what, seconds in medians(result["raw_seconds"]).items()
    ]


def main() -> None:
    """Measure, print a table, and JSON in the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", choices=TOWERS, default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs, 2 or more (default 32)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="turns of each, 1 or more (default 3)"
    )
    parser.add_argument("--recipe", default="declip", help="ours (default declip)")
    parser.add_argument(
        "--precision", choices=("both", "fp32", "bf16"), default="both", help="bf16: autocast"
    )
    parser.add_argument("--threads", type=int, help="default: torch's own number")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--captions", choices=CAPTIONS, default="joined", help="full: all 77 tokens are used"
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="towers of two narrow layers at 32 px, to try this script",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, as the last line"
    )
    options = parser.parse_args()
    for name, least in (("batch_size", 2), ("repeats", 1), ("threads", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}; give {least} or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    precisions = ("fp32", "bf16") if options.precision == "both" else (options.precision,)
    try:
        measured = {precision: compare(options, precision) for precision in precisions}
    except UserError as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}. The peers come with: pip install 'declip[bench]'")
    show([row for result in measured.values() for row in rows_of(result)])
    ratios = ("ours_over_open_clip", "clip_over_open_clip", "muon_over_adamw")
    by_ratio = {
        ratio: {precision: result[ratio] for precision, result in measured.items()}
        for ratio in ratios
    }
    if options.json:
        print(json.dumps({**by_ratio, "measured": measured}))


if __name__ == "__main__":
    main()
