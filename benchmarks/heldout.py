"""Frozen heads against training from nothing, by retrieval on a fifth of a built-in set with other images and captions.

    python benchmarks/heldout.py OUT.jsonl stamps captions 439 31,62,124,248,439 0,1,2

That is: set, demo recipe from nothing (clip, keywords, captions) and its number of pairs, numbers of pairs of the
frozen heads, seeds. Each line of the result is one run. At the end it prints how many times fewer pairs the frozen
heads need for the same R@10, in the mean of both directions.
"""

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import declip
from declip.comparison.statistics import curve_of, factor
from declip.data.sources.open import open_source
from declip.inspection.split import split_pairs

RECIPES = {"clip": "demo-clip", "keywords": "demo-declip-keywords", "captions": "demo-declip-captions"}
SCRATCH = {"train.steps": 1000}
FROZEN = {"train.steps": 300, "train.precision": "bf16", "image.size": 128}
QUIET = {"train.evaluate_every": 0, "evaluation.zero_shot": [], "evaluation.final_zero_shot": []}


def write_parts(name: str, folder: Path) -> None:
    """Write the set's two parts as tables with their images."""
    source = open_source(f"builtin:{name}")
    for part, indices in split_pairs(source, fraction=0.2)._asdict().items():
        with (folder / f"{part}.jsonl").open("w") as file:
            for index in indices.tolist():
                pair = source[index]
                pair.image.save(folder / f"{index}.png")
                row = {"image": f"{index}.png", "caption": list(pair.captions), "keywords": list(pair.keywords)}
                file.write(json.dumps(row) + "\n")


def run(folder: Path, recipe: str, keys: dict, pairs: int, seed: int) -> dict[str, float]:
    """Train on some pairs of the first part and measure retrieval on the second."""
    batch = min(128, max(16, 1 << (pairs // 4).bit_length() - 1))
    sets = {"evaluation.retrieval": [str(folder / "val.jsonl")], "evaluation.final_retrieval": []}
    data = {"data.source": str(folder / "train.jsonl"), "data.max_pairs": pairs, "data.workers": 0, "seed": seed}
    with tempfile.TemporaryDirectory() as out:
        given = {**QUIET, **keys, **sets, **data, "train.batch_size": batch}
        result = declip.train(recipe, given, out=Path(out) / "run", quiet=True, report=False).results[-1]
    return {"pairs": pairs, "seed": seed, **{name: value for name, value in result.items() if "_r" in name}}


def main(out: Path, name: str, scratch: str, most: int, pairs: list[int], seeds: list[int]) -> None:
    """Run all and append a line for each."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_parts(name, folder)
        arms = [("frozen", FROZEN, count) for count in pairs] + [(RECIPES[scratch], SCRATCH, most)]
        for seed in seeds:
            for recipe, keys, count in arms:
                row = {"set": name, "recipe": recipe, **run(folder, recipe, keys, count, seed)}
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    curves: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in map(json.loads, out.read_text().splitlines()):
        mean = (row["text_to_image_r10"] + row["image_to_text_r10"]) / 2
        curves[row["recipe"]][row["pairs"]][row["seed"]] = mean
    found = factor(curve_of(curves["frozen"]), curve_of(curves[RECIPES[scratch]]))
    print(f"factor {found.mean}, 95 % interval {found.low} to {found.high}")


if __name__ == "__main__":
    if len(sys.argv) < 7 or "--help" in sys.argv:
        sys.exit(__doc__)
    out, name, scratch, most, pairs, seeds = sys.argv[1:]
    main(Path(out), name, scratch, int(most), *([int(n) for n in given.split(",")] for given in (pairs, seeds)))
