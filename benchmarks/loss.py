"""Losses in equal processor time: what needs fewer pairs than CLIP with label smoothing?

    python benchmarks/loss.py METHOD PAIRS SEED [--wrong 0.5] [--set icons] --out runs/loss.jsonl
    python benchmarks/loss.py cost --out runs/loss.jsonl

appends top-1 on held-out designers after `STEPS` steps of `demo-few-clip`, or as many of METHOD as take the same time.
An interrupted run continues, and a row that exists is not measured again. `cost` times a step of all methods in turns;
`METHODS` has the results. With --wrong a fraction of the pairs has captions of others.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import declip
from declip.data.pair import PairSource
from declip.data.sources.open import open_source
from declip.data.sources.subset import take
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import scaled_similarity
from declip.supervision.multi_view import MultiView
from declip.supervision.nearest_neighbor import neighbor_contrast
from declip.supervision.term import Encodings, Rows, Similarity, Term, require
from declip.training.assemble import assemble
from declip.training.state import Extensions
from declip.training.step import training_step

STEPS = 600
SETS = {
    "emoji": ("emoji-validation", "emoji-test", "emoji-test-new", "emoji-validation-new"),
    "icons": ("icons-validation", "icons-test"),
}
ROUNDS, TURN = 8, 2  # of `cost`: steps of a method before those of the next
LAST_GAMMA, EPSILON = 0.2, 1e-14  # of FastCLIP


class ByPair(Term):
    """Base class of losses with a state for each training pair."""

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.recipe, self.smoothing = recipe, recipe.contrastive.label_smoothing

    def prepare(self, source: PairSource, model: DualEncoder) -> None:
        self.pairs = len(source)

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        return {"index": require(encoded.batch.sample_ids) % self.pairs}


def fast_clip(
    image: Tensor, text: Tensor, scale: Tensor | float, averages: Tensor, gamma: float, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """FastCLIP's loss with a constant temperature (arXiv 2407.01445), divided by 2τ, and the new averages (2, B).

    Equals the plain loop, s the cosines of images (B, d) and texts (B, d), τ = 1 / scale, u1 and u2 the averages
        g1[i], g2[i] = mean over j ≠ i of exp((s[i, j] - s[i, i]) / τ), of exp((s[j, i] - s[i, i]) / τ)
        u[i] = (1 - gamma)·u[i] + gamma·g[i], without gradient
        ½ mean over i of  g1[i] / (u1[i] + ε) + g2[i] / (u2[i] + ε)
    and, as in cross-entropy with label smoothing, smoothing · mean over i, j of (s[i, i] - s[i, j]) / τ.
    """
    logits = scaled_similarity(image, text, scale)
    others = ~torch.eye(len(logits), dtype=torch.bool)
    rows = torch.stack([logits, logits.mT]) - logits.diagonal()[:, None]  # (2, B, B)
    g = (rows.exp() * others).sum(dim=2) / (len(logits) - 1)  # (2, B)
    averages = torch.lerp(averages, g.detach(), gamma)
    return (g / (averages + EPSILON)).mean() - smoothing * rows.mean(), averages


class Fast(ByPair):
    """CLIP's loss with averages over the data set in place of the sums over the batch, see `fast_clip`."""

    reaches_all = compares_pairs = True
    view = 0  # of the text
    averages: Tensor
    step: Tensor

    def prepare(self, source: PairSource, model: DualEncoder) -> None:
        super().prepare(source, model)
        self.register_buffer("averages", torch.zeros(2, len(source)))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        # From 1 to its last value, as a cosine over the first half of the run
        part = min(1.0, 2 * int(self.step) / self.recipe.train.steps)
        gamma = LAST_GAMMA + (1 - LAST_GAMMA) * (1 + math.cos(math.pi * part)) / 2
        index, scale = own.extra["index"], similarity.scale.detach()
        text = own.texts[self.view]
        loss, after = fast_clip(own.images[0], text, scale, self.averages[:, index], gamma, self.smoothing)
        self.averages[:, index] = after
        return loss

    def after_step(self, model: DualEncoder) -> None:
        self.step += 1


class NearText(ByPair):
    """DeCLIP's third loss with neighbors that a sentence encoder finds once: the most similar pair with other captions.

    The features of a neighbor are those of the last step that had it; before the first one, the own pair's.
    """

    least = -1.0  # cosine below which the own caption takes a neighbor's place
    both = False  # whether captions are compared with images of neighbors too
    bank: Tensor  # (2, pairs, d) of images and texts
    neighbors: Tensor

    def prepare(self, source: PairSource, model: DualEncoder) -> None:
        super().prepare(source, model)
        captions = [source.captions(index) for index in range(len(source))]
        encoder, known = declip.load("builtin:lite2-minilm"), sorted({text for texts in captions for text in texts})
        with torch.no_grad():
            blocks = [encoder.encode_text(encoder.tokenize(known[k : k + 256])) for k in range(0, len(known), 256)]
        of = dict(zip(known, F.normalize(torch.cat(blocks), dim=1), strict=True))
        sentences = F.normalize(torch.stack([sum(of[text] for text in texts) for texts in captions]), dim=1)
        numbers = {texts: number for number, texts in enumerate(dict.fromkeys(captions))}
        same = torch.tensor([numbers[texts] for texts in captions])
        cosines, nearest = (sentences @ sentences.mT).masked_fill_(same[:, None] == same, -1).max(dim=1)
        self.register_buffer("neighbors", torch.where(cosines >= self.least, nearest, torch.arange(len(nearest))))
        self.register_buffer("bank", torch.zeros(2, len(source), self.recipe.embed_dim))

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        index, sides = own.extra["index"], torch.stack([own.images[0], own.texts[0]])  # (2, B, d)
        self.pending = index, sides.detach()
        found = self.bank[:, self.neighbors[index]]
        near = found.any(dim=2, keepdim=True) & (self.neighbors[index] != index)[:, None]
        found = torch.where(near, found, sides.detach())
        scale, smoothing = similarity.scale, self.smoothing
        to_text = neighbor_contrast(sides[:1], found[1:], scale, smoothing=smoothing)
        to_image = neighbor_contrast(sides[1:], found[:1], scale, smoothing=smoothing) if self.both else to_text
        return (to_text + to_image) / 2

    def after_step(self, model: DualEncoder) -> None:
        index, self.bank[:, index] = self.pending


class SmallSecond(MultiView):
    """DeCLIP's multi-view loss; the second image view has half the side, and no part in batch statistics."""

    side = 0.5

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        norms = [m for m in model.image_tower.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momentum, passes = norms[0].momentum, [0]

        def reduce(tower: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
            passes[0] += tower.training
            small = tower.training and passes[0] % 2 == 0  # a tower with batch norm sees the views in turns
            for norm in norms:
                norm.momentum = 0.0 if small else momentum
            if not small:
                return None
            if self.side == 0.5:
                return (F.avg_pool2d(inputs[0], 2),)
            size = round(self.side * inputs[0].shape[-1])
            return (F.interpolate(inputs[0], (size, size), mode="bilinear", antialias=True),)

        model.image_tower.register_forward_pre_hook(reduce)


TERMS: dict[str, type[Term]] = {"fast": Fast, "near_text": NearText, "small": SmallSecond}
TERMS["fast_second"] = type("FastSecond", (Fast,), {"view": 1, "needs": MultiView.needs})
TERMS["medium"] = type("Medium", (SmallSecond,), {"side": 0.75})
TERMS["near_alike"] = type("NearAlike", (NearText,), {"least": 0.75})
TERMS["near_both"] = type("NearBoth", (NearText,), {"both": True})
TEMPERATURE = [f"logit_scale.{key}" for key in ("init", "min", "max")]
METHODS: dict[str, tuple[float, str, dict[str, Any], dict[str, float]]] = {  # cost, recipe, keys, weights of losses
    "few-clip": (1, "demo-few-clip", {}, {}),
    "clip": (1, "demo-clip", {}, {}),
    "clip-constant": (1, "demo-clip", dict.fromkeys(TEMPERATURE, math.log(1 / 0.1)), {}),
    "fast": (1, "demo-clip", dict.fromkeys(TEMPERATURE, math.log(1 / 0.07)), {"fast": 1}),
    "fast-smooth": (1, "demo-few-clip", dict.fromkeys(TEMPERATURE, math.log(1 / 0.05)), {"fast": 1}),
    "near-text": (1, "demo-few-clip", {}, {"contrastive": 0.8, "near_text": 0.2}),
    "near-text-40": (1, "demo-few-clip", {}, {"contrastive": 0.6, "near_text": 0.4}),
    "near-alike": (1, "demo-few-clip", {}, {"contrastive": 0.8, "near_alike": 0.2}),
    "near-both": (1, "demo-few-clip", {}, {"contrastive": 0.8, "near_both": 0.2}),
    "multi-view": (1.15, "demo-multi-view", {}, {}),
    "multi-view-16": (1.39, "demo-multi-view", {"views.image_second": True}, {"contrastive": 0.5, "small": 0.5}),
    "multi-view-24": (1.6, "demo-multi-view", {"views.image_second": True}, {"contrastive": 0.5, "medium": 0.5}),
    "multi-fast": (
        1.15,
        "demo-multi-view",
        dict.fromkeys(TEMPERATURE, math.log(1 / 0.07)) | {"contrastive.label_smoothing": 0.0},
        {"fast": 0.5, "fast_second": 0.5},
    ),
    "few-declip": (1.78, "demo-few-declip", {}, {}),
}


def keys_of(method: str, seed: int = 0) -> dict[str, Any]:
    """The overrides of a method's recipe."""
    cost, _, keys, weights = METHODS[method]
    return keys | {"train.steps": round(STEPS / cost), "seed": seed} | ({"loss_weights": weights} if weights else {})


def append(out: Path, row: Mapping[str, Any]) -> None:
    """Append a row with its command and commit; a new file begins with a line without numbers."""
    commit = subprocess.check_output(["git", "rev-parse", "--short=8", "HEAD"], text=True, cwd=Path(__file__).parent)
    run = {"command": " ".join(["python benchmarks/loss.py", *sys.argv[1:]]), "commit": commit.strip()}
    with out.open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in ([] if out.stat().st_size else [run]) + [{**row, **run}])


def train(method: str, pairs: int, seed: int, wrong: float, data_set: str, out: Path) -> None:
    """Append the row of a run, unless there is one; processor seconds are of runs without interruption."""
    key = {"method": method, "pairs": pairs, "seed": seed, "wrong": wrong, "set": data_set}
    if any(key.items() <= json.loads(line).items() for line in out.read_text().splitlines()):
        return
    # --- pairs, of which a fraction has the captions of another one
    source, owner = take(open_source(f"builtin:{data_set}"), pairs, seed), np.arange(pairs)
    moved = np.random.default_rng((seed, 1)).permutation(pairs)[: round(wrong * pairs)]
    owner[moved] = np.roll(moved, 1)
    data = [(source.image(index), source.captions(other)) for index, other in enumerate(owner.tolist())]
    # --- run and row
    folder = out.with_suffix("") / f"{data_set}-{method}-{pairs}-{seed}-{wrong}"
    began, resumed = time.process_time(), folder.exists()
    run = declip.train(METHODS[method][1], keys_of(method, seed), folder, True, True, False, data=data, terms=TERMS)
    seconds = None if resumed else round(time.process_time() - began)
    if run.finished:
        found = {name: declip.evaluate(run, f"builtin:{name}", progress=False) for name in SETS[data_set]}
        top1 = {name: round(100 * result.top1, 2) for name, result in found.items()}
        counts = {f"{name} n": result.n for name, result in found.items()}
        append(out, {**key, "steps": run.step, "processor_s": seconds, **top1, **counts})


def measure_costs(out: Path) -> None:
    """Append the processor time of a step of each method, loading included, relative to `few-clip`."""
    taken: dict[str, list[float]] = {name: [] for name in METHODS}
    with TemporaryDirectory() as folder:
        states = {}
        for name in METHODS:
            recipe = load_recipe(METHODS[name][1], keys_of(name) | {"data.max_pairs": 1400})
            states[name] = assemble(recipe, Path(folder) / name, quiet=True, extensions=Extensions(terms=TERMS))
            states[name].learner.train()
        for name, state in [*states.items()] * (ROUNDS + 1):
            began = time.process_time()
            for _ in range(TURN):
                training_step(state.learner, state.optimizer, next(state.loader))
            taken[name].append(1000 * (time.process_time() - began) / TURN)
    for name, [_, *timed] in taken.items():  # the first round warms up
        cost = statistics.median(a / b for a, b in zip(timed, taken["few-clip"][1:], strict=True))
        append(out, {"method": name, "cost": round(cost, 3), "milliseconds": [round(each, 1) for each in timed]})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=[*METHODS, "cost"])
    parser.add_argument("pairs", type=int, nargs="?", default=1400)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--wrong", type=float, default=0.0)
    parser.add_argument("--set", dest="data_set", choices=SETS, default="emoji")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.touch()
    measure_costs(given.out) if given.method == "cost" else train(**vars(given))


if __name__ == "__main__":
    main()
