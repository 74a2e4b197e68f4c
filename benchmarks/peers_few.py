"""Few pairs: `declip finetune` and what people would use instead, with the same towers, pairs and split.

    python benchmarks/peers_few.py stamps-photos,stamps,clipart,emoji-test,icons-test [--seeds 3] [--out runs/few]

measures what is missing in OUT/cells.jsonl, and writes OUT/table.md and OUT/class_pairs.json: how many times fewer
pairs are needed with class names. With --from open_clip:ViT-B-32/openai, which downloads it, the features
are the embeddings of that CLIP. results/few/cells.jsonl is of --from builtin:lite0-minilm at an earlier commit;
results/few/rivals.jsonl is of --sizes 0 31 124 -1, of icons 0 124 1000, and neighbors.jsonl of --sizes 31 124 -1;
results/few/posteriors.jsonl has --whole and trials.

A fifth of the groups of each set is held out; rows of the table are R@1 and R@10 there, the mean of both directions.
Every method reads the same features of the built-in start, so only what is learned from them differs. The settings of
the peers are chosen by cross-validation in five parts up to 100 pairs, on a fifth of the training groups above, and the
peer is fitted again on all of them.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.closed_form.folds import assign_folds
from declip.closed_form.pairs import FOLDS, ClassPairs, Pairs
from declip.closed_form.ranks import HeldOutBlock, caption_numbers, score
from declip.comparison.outcome import EfficiencyCurve, curve_of, pairs_needed
from declip.finetuning.request import Request
from declip.finetuning.run import Start
from declip.fitting.pairs import read_features
from declip.fitting.run import class_pairs, named_weights, open_base
from declip.recipe.checks import load_for_training
from declip.recipe.resolve import Facts, resolve
from declip.training.pairs import open_training_source
from few_methods import (
    Method,
    Task,
    Towers,
    asif,
    class_names,
    conse,
    csa,
    declip,
    declip_linear,
    declip_own_pairs,
    declip_without_neighbors,
    open_clip,
    pls,
    procrustes,
    ridge,
    ridge_with_classes,
    sentence_transformers,
    start,
)

SIZES = (0, 31, 124, 500, 2_000, -1)  # training pairs; -1: all
MOST = 6_000  # of 64,000 icons
START = "builtin:lite2-minilm"
MANY = 100  # pairs, above which one part chooses the settings of the peers
SALT = 7_000  # of the splits; 0 to 2 are those of this table


@dataclass
class Data:
    """The features of a set, computed once."""

    pairs: Pairs
    groups: np.ndarray
    classes: ClassPairs | None
    names: Callable[[Tensor], Tensor] | None
    embedded: bool

    @classmethod
    def of(cls, name: str, weights: str) -> "Data":
        """Compute the features as `declip finetune NAME --from WEIGHTS --freeze both` does."""
        keys: dict[str, Any] = {"train.device": "cpu", "train.precision": "fp32"}
        if name.endswith("icons"):
            keys["data.max_pairs"] = MOST
        started = Start(Request.of(name, weights, keys, freeze="both"))
        given = load_for_training("finetune", started.keys(MOST, False), name)
        recipe = resolve(given, Facts(started.weights))
        source = open_training_source(recipe.data, recipe.seed)
        base = open_base(recipe, started.weights)
        features = read_features(source, base, recipe.data.max_broken_fraction, True)
        classes = started.weights.named_classes()

        def names(rows: Tensor) -> Tensor:
            assert classes is not None
            texts = [", ".join(classes.names[i] for i in row) for row in rows.tolist()]
            return base.pool_captions(texts)

        named = names if classes is not None else None
        known = None
        if not base.projected:
            known = class_pairs(named_weights(recipe, started.weights), base, progress=True)
        return cls(features.pairs, features.groups, known, named, base.projected)

    def some(self, indices: np.ndarray) -> tuple[Pairs, np.ndarray]:
        """Some images with their captions, and their groups."""
        chosen = torch.from_numpy(np.sort(indices))
        return self.pairs.of_images(chosen), self.groups[chosen.numpy()]


def recall(towers: Towers, pairs: Pairs) -> tuple[float, float]:
    """R@1 and R@10 in percent, the mean of both directions; equal captions are one candidate."""
    rows = torch.arange(len(pairs.images))
    block = HeldOutBlock.of(rows, pairs.owners, caption_numbers(pairs))
    with torch.no_grad():
        sides = towers.image(pairs.images), towers.text(pairs.texts[block.texts])
        images, texts = (normalize(side, dim=-1) for side in sides)
        outcome = score(images @ texts.mT, block)
    r1, r10 = (100 * outcome.recall(k, rows.numpy()).value for k in (1, 10))
    return r1, r10


class Peer(NamedTuple):
    """A method and the settings that are tried on the validation part."""

    method: Method
    settings: Mapping[str, tuple[float, ...]]


RIDGES = {"ridge": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)}
ALPHAS = {"alpha": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)}
TRAINED = {"lr": (3e-4, 1e-3, 3e-3, 1e-2), "epochs": (10, 30, 100)}
START_AS_IS = "start as it is"
PEERS = {
    START_AS_IS: Peer(start, {}),
    "declip finetune": Peer(declip, {}),
    "declip, without neighbors": Peer(declip_without_neighbors, {}),
    "declip, linear": Peer(declip_linear, {}),
    "declip, own pairs": Peer(declip_own_pairs, {}),
    "best class name": Peer(partial(class_names, count=1), {}),
    "five class names": Peer(partial(class_names, count=5), {}),
    "ConSE": Peer(partial(conse, count=10), {}),
    "ASIF": Peer(partial(asif, classes=False), {}),
    "ASIF with classes": Peer(partial(asif, classes=True), {}),
    "CSA": Peer(partial(csa, classes=False), RIDGES),
    "CSA with classes": Peer(partial(csa, classes=True), RIDGES),
    "Procrustes": Peer(procrustes, {"width": (16, 64, 256)}),
    "Ridge with class rows": Peer(ridge_with_classes, ALPHAS),
    "scikit-learn Ridge": Peer(ridge, ALPHAS),
    "scikit-learn PLS": Peer(pls, {"directions": (4, 8, 16, 32, 64, 128)}),
    "open_clip, locked": Peer(open_clip, TRAINED),
    "sentence-transformers": Peer(sentence_transformers, TRAINED),
}


WITHOUT_PAIRS = (
    "declip finetune",
    "declip, linear",
    "best class name",
    "five class names",
    "ConSE",
    "Ridge with class rows",
)


def measure(
    peer: Peer, data: Data, chosen: np.ndarray, held_out: Pairs, seed: int
) -> dict[str, Any]:
    """Choose the settings on parts of the training groups, fit on all pairs, and score on the held-out ones."""
    began = time.perf_counter()
    pairs, groups = data.some(chosen)
    grid = [
        dict(zip(peer.settings, values, strict=True)) for values in product(*peer.settings.values())
    ]
    scores = [
        float(number == len(grid) // 2) for number in range(len(grid))
    ]  # without pairs the middle
    if len(grid) > 1 and len(chosen):
        fold, scores = assign_folds(groups, FOLDS, seed), [0.0] * len(grid)
        for part in (fold == number for number in range(FOLDS if len(chosen) <= MANY else 1)):
            (fitted, own), (validation, _) = (
                data.some(np.sort(chosen)[side]) for side in (~part, part)
            )
            smaller = Task(fitted, own, data.classes, data.names, seed, data.embedded)
            found = (sum(recall(peer.method(smaller, **settings), validation)) for settings in grid)
            scores = [sum(both) for both in zip(scores, found, strict=True)]
    settings = grid[int(np.argmax(scores))]
    towers = peer.method(
        Task(pairs, groups, data.classes, data.names, seed, data.embedded), **settings
    )
    r1, r10 = recall(towers, held_out)
    return {"r1": r1, "r10": r10, "settings": settings, "seconds": time.perf_counter() - began}


def summarize(cells: list[dict[str, Any]], out: Path) -> None:
    """Write the table of means over the seeds, and the factors of pairs with class names over without."""
    methods = [name for name in PEERS if any(cell["method"] == name for cell in cells)]
    lines = ["| set, pairs | " + " | ".join(methods) + " |", "|---|" + "--:|" * len(methods)]
    for name, size in sorted({(cell["set"], cell["pairs"]) for cell in cells}):
        found = dict.fromkeys(methods, "")
        for method in methods:
            rows = [c for c in cells if (c["set"], c["pairs"], c["method"]) == (name, size, method)]
            if rows:
                found[method] = " / ".join(
                    f"{np.mean([row[key] for row in rows]):.1f}" for key in ("r1", "r10")
                )
        lines.append(f"| {name}, {size:,} | " + " | ".join(found.values()) + " |")
    (out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    names = sorted({cell["set"] for cell in cells if cell["method"] == "declip, own pairs"})
    factors = {name: class_factor(cells, name) for name in names}
    (out / "class_pairs.json").write_text(json.dumps(factors, indent=1) + "\n", "utf-8")


def class_factor(cells: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """How many times fewer pairs reach, with class names, the mean of R@1 and R@10 that all pairs reach without them.

    By seed, from its own two curves. Where the fewest pairs that were measured reach it, the factor is a lower bound,
    and `high` is null.
    """
    with_classes, without = (
        curve(cells, name, method) for method in ("declip finetune", "declip, own pairs")
    )
    factors, bounds = [], []
    for seed, value in enumerate(without.values[-1]):
        rows = [
            (pairs, values[seed])
            for pairs, values in zip(with_classes.pairs, with_classes.values, strict=True)
        ]
        pairs, means = zip(*rows, strict=True)
        needed, outside = pairs_needed(pairs, np.array(means), value)
        factors.append(without.pairs[-1] / (pairs[0] if needed is None else needed))
        bounds.append(outside == "below")
    return {
        "factor": float(np.median(factors)),
        "low": min(factors),
        "high": None if any(bounds) else max(factors),
        "lower_bounds": sum(bounds),
        "with": dict(
            zip(map(str, with_classes.pairs), with_classes.means.round(2).tolist(), strict=True)
        ),
        "without": dict(zip(map(str, without.pairs), without.means.round(2).tolist(), strict=True)),
    }


def curve(cells: list[dict[str, Any]], name: str, method: str) -> EfficiencyCurve:
    """The mean of R@1 and R@10 of a method against the number of pairs."""
    rows: dict[int, dict[int, float]] = {}
    for cell in cells:
        if (cell["set"], cell["method"]) == (name, method):
            rows.setdefault(cell["pairs"], {})[cell["seed"]] = (cell["r1"] + cell["r10"]) / 2
    return curve_of(rows)


def main() -> None:
    """Measure what is missing, one JSON line a cell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", help="built-in sets, such as stamps-photos,clipart")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, help="numbers of training pairs; -1: all"
    )
    parser.add_argument("--whole", action="store_true", help="without pairs, all images as gallery")
    parser.add_argument("--methods", nargs="+", choices=PEERS)
    parser.add_argument("--from", dest="weights", default=START, help=f"default: {START}")
    parser.add_argument("--out", type=Path, default=Path("runs/few"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "cells.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["set"], row["seed"], row["pairs"], row["method"]) for row in known}
    for name in options.sets.split(","):
        data = Data.of(f"builtin:{name}", options.weights)
        left_out = "declip, own pairs" if data.embedded else START_AS_IS
        methods = options.methods or [method for method in PEERS if method != left_out]
        if START_AS_IS in methods and not data.embedded:
            parser.error(
                f"'{START_AS_IS}' requires weights with projections, and '{options.weights}' has none. "
                "Leave it out of --methods, or give another --from, such as open_clip:ViT-B-32/openai."
            )
        label = name if options.weights == START else f"{name} from {options.weights}"
        label += ", whole" * options.whole
        for seed in range(1 if options.whole else options.seeds):
            fold = assign_folds(data.groups, FOLDS, SALT + seed)
            held_out = data.pairs if options.whole else data.some(np.flatnonzero(fold == 0))[0]
            pool = np.random.default_rng(seed).permutation(np.flatnonzero(fold != 0))
            sizes = [0] if options.whole else options.sizes
            for size in sorted({len(pool) if size < 0 else min(size, len(pool)) for size in sizes}):
                for method in methods:
                    if (label, seed, size, method) in done or (
                        size == 0 and method not in WITHOUT_PAIRS
                    ):
                        continue
                    row = {
                        "set": label,
                        "seed": seed,
                        "pairs": size,
                        "held_out": len(held_out.images),
                        "method": method,
                    }
                    row |= measure(PEERS[method], data, pool[:size], held_out, seed)
                    print(json.dumps(row), flush=True)
                    known.append(row)
                    with file.open("a") as lines:
                        lines.write(json.dumps(row) + "\n")
    summarize(known, options.out)


if __name__ == "__main__":
    main()
