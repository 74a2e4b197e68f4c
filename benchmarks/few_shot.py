"""Few-shot classification by class names and 1 to 16 images a class: declip and five other ways, top-1.

    python benchmarks/few_shot.py stamps emoji icons --work /tmp/features --out benchmarks/results/few_shot.json

All ways see the same frozen features and the same five draws of examples. Their settings are chosen by the same
cross-validation on the examples (from two a class on). "none" is the AUROC of "none of these".
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

import declip
from declip.data.builtin.sets import open_builtin
from declip.evaluation.encode import encode_source
from declip.evaluation.few_shot import FOLDS, Examples, fit_few_shot, joint_encoder
from declip.evaluation.linear_probe import LogisticProblem
from declip.evaluation.results import sample_per_class
from declip.evaluation.zero_shot import class_features

SETS = {  # training part, test part; of icons also the icon sets of both; one part alone is divided at random
    "stamps": ("stamps-kinds-train", "stamps-kinds"),
    "emoji": ("emoji", "emoji-test"),
    "icons": ("icons", "icons-test"),
    # validation: the rule of declip was decided on these
    "emoji-openmoji": ("emoji", "emoji-validation"),
    "icons-solar": ("icons/solar", "icons/reicon"),
    "icons-streamline": ("icons/streamline", "icons/streamline-plump"),
    "icons-mdi": ("icons/mdi", None),
    "clipart": ("clipart", None),
    "stamps-keywords": ("stamps-kinds-train", None),
}
SHOTS, DRAWS, MOST = (1, 2, 4, 8, 16), 5, 60  # images of a class that are encoded
CUT = 12  # classes, the most frequent


def labels_of(name: str, part: str) -> list[str]:
    """The class of each image: its kind, keywords or category; empty for none."""
    source, _, icons = part.partition("/")
    if name == "stamps-keywords":
        return [" ".join(row["keywords"][1::-1]) for row in open_builtin(source).rows]
    key = "kind" if name == "stamps" else "category"
    return [row[key] if icons in ("", row.get("set")) else "" for row in open_builtin(source).rows]


def examples(name: str, start: str, work: Path) -> tuple[Examples, Examples, list[str]]:
    """Training and test images of a set, kept in a file."""
    path = work / f"few-{name}-{start.removeprefix('builtin:')}.pt"
    if not path.exists():
        model, (first, second) = declip.load(start, "cpu"), SETS[name]
        given = [labels_of(name, part) for part in (first, second or first)]
        fewest = (16, 9)
        if second is None:
            fewest = (8, 4) if name == "stamps-keywords" else fewest
            chosen = np.random.default_rng(7).random(len(given[0])) < (0.65 if name == "stamps-keywords" else 0.5)
            given = [[label * (own == side) for label, own in zip(given[0], chosen, strict=True)] for side in (1, 0)]
        counts = [Counter(labels) for labels in given]
        common = [
            label for label, n in counts[0].most_common() if label and n > fewest[0] and counts[1][label] > fewest[1]
        ]
        names = sorted(counts[0] if name == "stamps" else common[:CUT])
        encode, width = joint_encoder(model)
        parts = []
        for part, labels in zip((first, second or first), given, strict=True):
            rows = np.array([place for place, label in enumerate(labels) if label in names])
            numbers = np.array([names.index(labels[place]) for place in rows])
            kept = sample_per_class(numbers, lambda count: min(count, MOST))
            with torch.no_grad():
                source = open_builtin(part.partition("/")[0])
                found = encode_source(model, source, encode=encode, texts=False, indices=rows[kept])
            parts += [found.images, torch.from_numpy(numbers[kept])]
        torch.save(
            {"parts": parts, "names": names, "width": width, "texts": class_features(model, names, ["{}"])}, path
        )
    stored = torch.load(path, weights_only=False)
    pairs = (stored["parts"][:2], stored["parts"][2:])
    train, test = (Examples(images, labels, stored["texts"], stored["width"]) for images, labels in pairs)
    return train, test, stored["names"]


def halves(few: Examples, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features before the projection, centered by the examples, and embeddings."""
    center = normalize(few.images[:, : few.width], dim=1).mean(dim=0)
    return normalize(normalize(images[:, : few.width], dim=1) - center, dim=1), normalize(images[:, few.width :], dim=1)


def means(few: Examples, images: Tensor, _: tuple[float, ...]) -> Tensor:
    own, count = halves(few, few.images)[0], len(few.names)
    return halves(few, images)[0] @ normalize(one_hot(few.labels, count).float().mT @ own, dim=1).mT


def k_nn(few: Examples, images: Tensor, chosen: tuple[float, ...]) -> Tensor:
    cosines = halves(few, images)[0] @ halves(few, few.images)[0].mT
    top = cosines.topk(min(int(chosen[0]), len(few.labels)))
    return torch.zeros(len(images), len(few.names)).scatter_add_(1, few.labels[top.indices], 1 + top.values)


def linear_probe(few: Examples, images: Tensor, chosen: tuple[float, ...]) -> Tensor:
    own, query = (halves(few, part)[0] for part in (few.images, images))
    axes = torch.linalg.qr(own.mT).Q  # the weights lie in the span of the examples: the same optimum, sooner
    fitted = LogisticProblem(own @ axes, few.labels).fit(chosen[0])
    scores = torch.full((len(images), len(few.names)), -torch.inf)
    scores[:, fitted.present] = fitted.scores(query @ axes)
    return scores


def tip_adapter(few: Examples, images: Tensor, chosen: tuple[float, ...]) -> Tensor:
    """arXiv 2111.03930, without training."""
    own, query = (halves(few, part)[1] for part in (few.images, images))
    cache = (-chosen[1] * (1 - query @ own.mT)).exp() @ one_hot(few.labels, len(few.names)).float()
    return 20 * query @ few.names.mT + chosen[0] * cache


def gda(few: Examples, images: Tensor, chosen: tuple[float, ...]) -> Tensor:
    """arXiv 2402.04087: one covariance, shrunk as there, added to the names' scores."""
    own, query = (halves(few, part)[1].double() for part in (few.images, images))
    mean = normalize(one_hot(few.labels, len(few.names)).double(), p=1, dim=0).mT @ own
    spread = (own - mean[few.labels]).mT @ (own - mean[few.labels])
    trace = spread.trace() / max(1, len(own) - 1)
    precision = own.shape[1] * torch.linalg.inv(spread + (trace + 1e-6) * torch.eye(own.shape[1]))
    rows = mean @ precision
    return (20 * query @ few.names.double().mT + chosen[0] * (query @ rows.mT - (rows * mean).sum(1) / 2)).float()


Way = Callable[[Examples, Tensor, tuple[float, ...]], Tensor]
WAYS: dict[str, tuple[Way, list[tuple[float, ...]]]] = {  # candidates, the default first
    "class means": (means, [()]),
    "k-NN": (k_nn, [(1,), (3,), (5,), (9,)]),
    "linear probe": (linear_probe, [(10.0,), (0.1,), (1.0,), (100.0,)]),
    "Tip-Adapter": (tip_adapter, [(a, b) for a in (1.0, 3.0, 10.0, 30.0) for b in (5.5, 1.0, 12.0)]),
    "GDA": (gda, [(1.0,), (0.001,), (0.01,), (0.1,), (10.0,)]),
}


def choose(way: Way, candidates: list[tuple[float, ...]], few: Examples) -> tuple[float, ...]:
    """The candidate that is right most often on left-out folds; the first with one image a class."""
    order = torch.cat([torch.arange(int(n)) for n in torch.bincount(few.labels)]) % FOLDS  # rows are in order of class
    if order.max() == 0 or len(candidates) == 1:
        return candidates[0]
    right = [
        sum(
            int((way(few.take(order != f), few.images[order == f], c).argmax(1) == few.labels[order == f]).sum())
            for f in range(int(order.max()) + 1)
        )
        for c in candidates
    ]
    return candidates[int(np.argmax(right))]


def auroc(known: Tensor, strangers: Tensor) -> float:
    return float((known[:, None] > strangers).double().mean() + 0.5 * (known[:, None] == strangers).double().mean())


def none_of_these(few: Examples, test: Examples, out: int) -> dict[str, float]:
    """AUROC of images of a class that was left out, by the largest score and the largest probability."""
    head = fit_few_shot(few.without(out))
    plain = 20 * halves(few, test.images)[1] @ few.without(out).names.mT
    ours, inside = head.scores(test.images), test.labels != out
    found = {
        "declip": ours.amax(1),
        "declip, softmax": ours.softmax(1).amax(1),
        "names, softmax": plain.softmax(1).amax(1),
    }
    return {name: auroc(values[inside], values[~inside]) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", default="builtin:lite2-minilm")
    given = parser.parse_args()
    results = []
    for name in given.sets:
        train, test, names = examples(name, given.start, given.work)
        zero = float((halves(train, test.images)[1] @ train.names.mT).argmax(1).eq(test.labels).double().mean())
        for shots in SHOTS:
            found: dict[str, list[float]] = {"names alone": [zero] * DRAWS}
            none: dict[str, list[float]] = {}
            for draw in range(DRAWS):
                rows = torch.from_numpy(
                    sample_per_class(train.labels.numpy(), lambda count, n=shots: min(count, n), draw)
                )
                few = train.take(rows.nonzero().flatten()[train.labels[rows].argsort(stable=True)])
                for way, (call, candidates) in WAYS.items():
                    scores = call(few, test.images, choose(call, candidates, few))
                    found.setdefault(way, []).append(float((scores.argmax(1) == test.labels).double().mean()))
                scores = fit_few_shot(few).scores(test.images)
                found.setdefault("declip", []).append(float((scores.argmax(1) == test.labels).double().mean()))
                if shots in (4, 16):
                    for out in range(draw, len(names), DRAWS):
                        for key, value in none_of_these(few, test, out).items():
                            none.setdefault(key, []).append(value)
            row = {"start": given.start, "set": name, "classes": len(names), "test": len(test.labels), "shots": shots}
            row |= {"top1": {way: round(100 * float(np.mean(values)), 1) for way, values in found.items()}}
            row |= {"sd": {way: round(100 * float(np.std(values, ddof=1)), 1) for way, values in found.items()}}
            row |= {"none": {key: round(float(np.mean(values)), 3) for key, values in none.items()}}
            results.append(row)
            print(name, shots, row["top1"], row["none"], flush=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
