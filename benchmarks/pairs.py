"""Pairs for the benchmarks: emoji, or drawn shapes, and longer texts; and the parts of a training step on them."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw

from declip.data.pair import Pair, PairSource
from declip.data.sources.open import open_source
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.nearest_neighbor import NearestNeighbor
from declip.supervision.objective import Objective
from declip.training.assemble import build_loader
from declip.training.optimizer import build_optimizer, named_trainable
from declip.training.parallel import build_learner
from declip.training.step import training_step

COLORS = ("red", "green", "blue", "orange", "purple", "black", "brown", "pink")
SHAPES = ("circle", "square", "ring", "frame")
CONTEXT = 77
"""Context length of a text tower; as many words fill it."""


class Shapes(PairSource):
    """Colored shapes of 96 x 96 pixels, the emoji's size, each with a caption of the usual length."""

    name = "drawn shapes"

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> Pair:
        color, shape = COLORS[index % 8], SHAPES[index // 8 % 4]
        image = Image.new("RGB", (96, 96), "white")
        pen, edge = ImageDraw.Draw(image), 8 + index % 24
        box = (edge, edge, 96 - edge, 96 - edge)
        draw = pen.ellipse if shape in ("circle", "ring") else pen.rectangle
        draw(box, fill=color if shape in ("circle", "square") else None, outline=color, width=9)
        return Pair.of(f"shape {index}", image, [f"a {color} {shape}, number {index}"])


def open_pairs() -> PairSource:
    """Return the built-in emoji if they are downloaded, else shapes."""
    try:
        return open_source("builtin:emoji")
    except UserError:
        return Shapes()


CAPTIONS = ("joined", "full")
"""All captions of a pair joined; those of several pairs, enough to fill a text tower."""


def texts_of(source: PairSource, kind: str, count: int = 2048) -> list[str]:
    """Return texts of `count` pairs spread over a source; `kind` is one of `CAPTIONS`."""
    joined = [
        " ".join(source[int(index)].captions()) for index in np.linspace(0, len(source) - 1, count)
    ]
    if kind == "joined":
        return joined
    words = " ".join(joined).split()
    return [
        " ".join(words[start : start + CONTEXT])
        for start in range(0, len(words) - CONTEXT, CONTEXT // 4)
    ][:count]


class InMemory(PairSource):
    """Texts, each with a square of random pixels."""

    name = "in memory"

    def __init__(self, texts: Sequence[str], size: int) -> None:
        self.texts = texts
        self._pixels = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Pair:
        image = Image.fromarray(self._pixels[index % len(self._pixels)])
        return Pair.of(f"text {index}", image, [self.texts[index]])


def build(
    recipe: Recipe, source: PairSource, device: torch.device | str = "cpu"
) -> SimpleNamespace:
    """Build model, objective, step and loader as the trainer does, with random weights and a filled queue."""
    torch.manual_seed(0)
    model = DualEncoder(recipe).to(device)
    objective = Objective(recipe, model).to(device)
    objective.prepare(source, model)
    for term in objective.terms.values():
        if isinstance(term, NearestNeighbor):
            term.queue.push(torch.randn(term.queue.size, recipe.embed_dim, device=device))
    learner = build_learner(model, objective).train()
    optimizer = build_optimizer(named_trainable(model, objective), recipe.train)
    step = partial(training_step, learner, optimizer)
    loader = build_loader(source, model, objective)
    return SimpleNamespace(
        model=model,
        objective=objective,
        learner=learner,
        optimizer=optimizer,
        step=step,
        loader=loader,
    )
