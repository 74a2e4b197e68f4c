"""How many captions `declip choose` saves: recall of heads fitted to chosen images, and to as many by chance.

    python benchmarks/choose.py emoji icons stamps --work /tmp/features --out benchmarks/results/choose.jsonl

Each seed is another random part of the pool. Heads are in closed form, of the form that is best for images by chance;
with "classes", the classes of the start's classifier are pairs too. Writes a row for each set, seed and number of
captions; prints the factor (captions by chance that reach the recall of those chosen, over these) and its interval.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import declip
from declip.data.builtin.sets import open_builtin
from declip.evaluation.encode import encode_source
from declip.interchange.read import read
from declip.models.closed_form import (
    CenteredFeatures,
    ClassPairs,
    Form,
    Heads,
    Pairs,
    closed_form_heads,
    regression_rows,
)
from declip.models.inference import chunked, inference_tower
from declip.search.facility_location import facility_location

FORMS = (Form("ridge", 0.3), Form("ridge", 1.0), Form("ridge", 3.0), Form("cca", 0.3), Form("cca", 1.0))
# Training part, test part, images of the pool of a seed, numbers of captions by choice, and more by chance
SETS = {
    "emoji": ("emoji", "emoji-test", 4_500, (175, 350, 700, 1_400), (2_800, 4_500)),
    "icons": ("icons", "icons-test", 3_000, (175, 350, 700, 1_400), (2_800,)),
    "stamps": ("stamps", None, 275, (20, 40, 80, 160), (275,)),
    "clipart": ("clipart", None, 1_000, (100, 200, 400), (1_000,)),
    "emoji-2000": ("emoji", None, 1_500, (175, 350, 700), (1_500,)),
}
LIMIT = {"icons": 4_000, "emoji-2000": 2_000}  # images that are encoded, at random


def features(set_name: str, name: str, start: str, work: Path) -> Pairs:
    """Pooled features of a built-in set, kept in a file."""
    path = work / f"{set_name}-{name}-{start.removeprefix('builtin:')}.pt"
    if not path.exists():
        model, source = declip.load(start, "cpu"), open_builtin(name)
        tower = inference_tower(model)
        order = np.random.default_rng(0).permutation(len(source))[
            : LIMIT.get(set_name) if name == SETS[set_name][0] else None
        ]
        with torch.no_grad():
            encode = partial(chunked, lambda pixels: tower(pixels).pre_logits.float())
            found = encode_source(model, source, encode=encode, texts=False, indices=np.sort(order), progress=True)
            captions = found.flat_captions
            texts = torch.cat([model.text_tower.pool(model.tokenize([text])).float() for text in captions])
        pairs = (found.images, texts, torch.from_numpy(found.image_rows))
        torch.save({"index": found.indices, "pairs": pairs, "captions": found.captions}, path)
    return Pairs(*(each.clone() for each in torch.load(path, weights_only=False)["pairs"]))


def take(pairs: Pairs, rows: np.ndarray) -> Pairs:
    """Some images, rising, with their captions."""
    chosen = torch.from_numpy(np.sort(rows))
    captions = torch.isin(pairs.owners, chosen)
    return Pairs(pairs.images[chosen], pairs.texts[captions], torch.searchsorted(chosen, pairs.owners[captions]))


def recall(pairs: Pairs, test: Pairs, classes: ClassPairs | None) -> list[float]:
    """Text-to-image R@10 of heads of each form."""
    rows = regression_rows(pairs, torch.ones(len(pairs.images), dtype=torch.bool), classes, 1.0)
    found = []
    for heads in closed_form_heads(rows.images, rows.texts, rows.weights, FORMS, rows.mean):
        similarities = Heads(heads.image.float(), heads.text.float()).similarities(test.images, test.texts)
        own = similarities[test.owners, torch.arange(len(test.texts))]
        found.append(100 * float(((similarities > own).sum(dim=0) < 10).float().mean()))
    return found


def project(head: Tensor, images: Tensor) -> Tensor:
    """Vectors as an index has them."""
    return normalize(normalize(images @ head.mT, dim=-1).half().float(), dim=-1)


def factor(chance: dict[int, float], count: int, value: float) -> float:
    """Captions by chance that reach a recall, over `count`; at most the pool, which gives a lower bound."""
    counts, values = np.array(sorted(chance)), np.maximum.accumulate([chance[n] for n in sorted(chance)])
    return float(np.exp(np.interp(value, values, np.log(counts))) / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--start", default="builtin:lite2-minilm")
    given = parser.parse_args()
    start = declip.load(given.start, "cpu")
    known = read(given.start).named_classes()
    assert known is not None
    assert known.features is not None
    classes = ClassPairs(known.rows.float(), known.features.float(), known.texts()[1], known.mean.float())
    head = start.image_tower.proj.weight.detach().float()
    for name in given.sets:
        train, held_out, size, counts, more = SETS[name]
        everything, factors = features(name, train, given.start, given.work), {}
        for seed in range(given.seeds):
            order = np.random.default_rng(seed).permutation(len(everything.images))
            pool, rest = order[:size], order[size:]
            test = take(everything, rest) if held_out is None else features(name, held_out, given.start, given.work)
            images = everything.images[torch.from_numpy(pool)]
            found = facility_location(project(head, images), torch.empty(0, len(head)), max(counts))
            chosen = pool[[row for row, _ in found]]
            # --- the largest of 1,280 directions, for speed, and heads of images by chance
            centered = CenteredFeatures.of(images.float(), torch.ones(len(images)) / len(images)).rows
            axes = torch.linalg.eigh(centered.mT @ centered).eigenvectors[:, -384:]
            small, small_test = (pairs._replace(images=pairs.images.float() @ axes) for pairs in (everything, test))
            small_classes = classes._replace(rows=classes.rows @ axes, mean=classes.mean @ axes)
            for kind, extra in (("alone", None), ("classes", small_classes)):
                tried = {n: recall(take(small, pool[:n]), small_test, extra) for n in (*counts, *more)}
                best = {n: int(np.argmax(values)) for n, values in tried.items()}
                chance = {n: values[best[n]] for n, values in tried.items()}
                for n in counts:
                    value = recall(take(small, chosen[:n]), small_test, extra)[best[n]]
                    row = {
                        "start": given.start,
                        "set": name,
                        "pairs": kind,
                        "seed": seed,
                        "captions": n,
                        "chance": round(chance[n], 2),
                    }
                    row |= {"chosen": round(value, 2), "factor": round(factor(chance, n, value), 3)}
                    factors.setdefault((kind, n), []).append(row["factor"])
                    with given.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
        for (kind, n), values in factors.items():
            logs = np.log(values)
            middle, width = logs.mean(), 2.776 * logs.std(ddof=1) / len(logs) ** 0.5  # t of five seeds
            print(name, kind, n, *(round(float(np.exp(middle + s * width)), 2) for s in (0, -1, 1)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
