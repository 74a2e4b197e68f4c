"""Numbers of the pages' main tables equal the raw files; `<!--numbers:NAME-->` before a table names a function here."""

import json
import re
from collections import defaultdict
from statistics import mean

import pytest

from docs.blocks import ROOT

MARKED = re.compile(r"<!--numbers:(\w+)-->\n\n((?:\|.*\n)+)")
PAGES = [path.read_text(encoding="utf-8") for path in ((ROOT / "README.md"), *(ROOT / "docs").glob("*.md"))]
TITLES = {
    "stamps-photos": "photographs",
    "clipart": "clip art",
    "emoji-test": "emoji",
    "ViT-B-32": "ViT-B/32",
    "RN50": "ResNet-50",
}
TITLES |= {"demo-clip": "demo-few-clip", "demo-declip": "demo-few-declip", "demo-slip": "demo-slip, smoothed"}
TITLES |= {"demo-declip-official, contrastive.label_smoothing=0.1": "demo-declip, smoothed"}
TITLES |= {"demo-filip": "FILIP, smoothed", "demo-defilip": "DeFILIP, smoothed"}


def read(name):
    return [json.loads(line) for line in (ROOT / "benchmarks/results" / name).read_text("utf-8").splitlines()[1:]]


NAMES = ("best class name", "five class names", "ConSE")
PACKAGES = ("scikit-learn Ridge", "scikit-learn PLS", "open_clip, locked")


def rivals():
    cells = defaultdict(lambda: defaultdict(list))
    for row in read("few/rivals.jsonl"):
        cells[row["set"], row["pairs"]][row["method"]].append((row["r1"], row["r10"]))
    for (name, pairs), runs in cells.items():
        means = {method: [*map(mean, zip(*rows, strict=True))] for method, rows in runs.items()}
        columns = [("declip finetune",), ("declip, linear",), NAMES, ("Ridge with class rows",), PACKAGES]
        best = [[*map(max, zip(*(means[m] for m in column if m in means), strict=True))] for column in columns]
        yield f"{TITLES.get(name, name)}, {pairs:,}", [number for pair in best for number in pair]


def readme():
    """No pairs and all pairs of each set, by declip."""
    rows = read("few/rivals.jsonl")
    for name in {row["set"] for row in rows}:
        ours = [row for row in rows if (row["set"], row["method"]) == (name, "declip finetune")]
        most, held_out = max(row["pairs"] for row in ours), ours[0]["held_out"]
        sides = [[row for row in ours if row["pairs"] == pairs] for pairs in (0, most)]
        numbers = [mean(row[key] for row in side) for side in sides for key in ("r1", "r10")]
        yield f"{TITLES.get(name, name)}, {most:,} pairs, {held_out} held-out images", numbers


def demo():
    for row in read("demo.jsonl"):
        bf16 = [None] * ("validation" not in row["dataset"])  # without a raw file
        yield row["dataset"].removeprefix("builtin:"), [*bf16, 100 * row["top1"], row["n"], 100 * row["chance"]]


def methods():
    scores = defaultdict(dict)
    for row in read("muon/methods.jsonl"):
        if row["recipe"] in TITLES and row["data"] == "emoji" and "loss_weights" not in row:
            title = TITLES[row["recipe"]] + ", in the time of demo-few-declip" * (row["steps"] == 1900)
            if row["steps"] in (1000, 1900):
                scores[title, row["pairs"]][row["seed"]] = 100 * row["emoji-test top1"]
    for row in read("studies/few.jsonl"):  # demo-clip was CLIP as published then
        if row["budget"] == "samples" and "top-1" in row["measure"]:
            scores[row["recipe"], row["pairs"]] = {"all seeds": row["mean_percent"]}
    for title in {title for title, _ in scores}:
        yield title, [None, *(mean(scores[title, n].values()) for n in (1400, 2800, 5600) if (title, n) in scores)]


def embed():
    rows = [row for run in read("speed/embed.jsonl") for row in run["rows"] if row["size"] == "1024x768"]
    for tower in {row["part"] for row in rows}:
        most, sides = max(row["count"] for row in rows if row["part"] == tower), defaultdict(list)
        for row in (row for row in rows if (row["part"], row["count"]) == (tower, most)):
            sides["torch" if row["precision"] == "bf16" and row["what"] == "declip" else row["what"]].append(row)
        columns = [sides[side] for side in ("torch", "fp32", "open_clip", "sentence_transformers")]
        yield TITLES.get(tower, tower), [mean(row["per_second"] for row in column) for column in columns if column]


@pytest.mark.parametrize("check", [readme, rivals, demo, methods, embed], ids=lambda check: check.__name__)
def test_a_table_has_the_numbers_of_its_raw_file(check):
    [table] = [table for page in PAGES for name, table in MARKED.findall(page) if name == check.__name__]
    expected = dict(check())
    for line in table.splitlines()[2:]:
        title, cells = re.sub(r"[`*]", "", line).strip("| ").split(" | ", 1)
        for printed, value in zip(re.findall(r"\d[\d,]*\.?\d*", cells), expected[title], strict=False):
            decimals = len(printed.partition(".")[2])
            assert value is None or printed == f"{value:,.{decimals}f}", f"{title}: {printed}, raw {value}"
