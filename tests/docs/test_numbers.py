"""Numbers of the pages equal the raw files: tables behind `<!--numbers:NAME-->`, and marked numbers of sentences."""

import csv
import json
import re
from collections import defaultdict
from functools import cache
from math import exp, log
from operator import itemgetter
from statistics import mean, median, stdev

import pytest

from declip.recipe.load import recipe_names
from docs.blocks import ROOT

MARKED = re.compile(r"<!--numbers:(\w+)-->\n\n((?:\|.*\n)+)")
FILES = ((ROOT / "README.md"), *(ROOT / "docs").glob("*.md"))
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in FILES}
NUMBER = r"(\d[\d,]*\.?\d*)"
TITLES = {
    "stamps-photos": "photographs",
    "clipart": "clip art",
    "emoji-test": "emoji",
    "icons-test": "icons",
    "ViT-B-32": "ViT-B/32",
    "RN50": "ResNet-50",
}
TITLES |= {
    "demo-clip": "demo-few-clip",
    "demo-declip": "demo-few-declip",
    "demo-slip": "demo-slip, smoothed",
}
TITLES |= {"demo-declip-official, contrastive.label_smoothing=0.1": "demo-declip, smoothed"}
TITLES |= {"demo-filip": "FILIP, smoothed", "demo-defilip": "DeFILIP, smoothed"}


@cache
def load(name):
    """The content of a JSON file, or the rows of a JSONL file."""
    text = (ROOT / "benchmarks/results" / name).read_text("utf-8")
    return (
        [json.loads(line) for line in text.splitlines()[1:]]
        if name.endswith("l")
        else json.loads(text)
    )


def rows_of(name, **values):
    """The rows with these values."""
    return [row for row in load(name) if values.items() <= row.items()]


def pick(name, **values):
    return rows_of(name, **values)[0]


NAMES = ("best class name", "five class names", "ConSE")
PACKAGES = ("scikit-learn Ridge", "scikit-learn PLS", "open_clip, locked")
COLUMNS = [("declip finetune",), ("declip, linear",), NAMES, ("Ridge with class rows",), PACKAGES]


def rivals():
    cells = defaultdict(lambda: defaultdict(list))
    for row in load("few/rivals.jsonl"):
        cells[row["set"], row["pairs"]][row["method"]].append((row["r1"], row["r10"]))
    for (name, pairs), runs in cells.items():
        means = {method: [*map(mean, zip(*rows, strict=True))] for method, rows in runs.items()}
        best = [
            [*map(max, zip(*(means[m] for m in column if m in means), strict=True))]
            for column in COLUMNS
        ]
        yield f"{TITLES.get(name, name)}, {pairs:,}", [number for pair in best for number in pair]


def wins():
    """Cells, and those where declip is above all but its own linear form: by R@1, R@10, R@1 of the linear form."""
    cells = [numbers for _, numbers in rivals()]
    first, tenth, linear = (
        sum(row[k] > max(row[rivals::2]) for row in cells) for k, rivals in ((0, 4), (1, 5), (2, 4))
    )
    return len(cells), first, tenth, linear


def without_pairs(name, neighbors=True):
    """R@1 and R@10 of held-out images by `builtin:lite2-minilm` alone."""
    row = pick(
        "few/neighbors-none.jsonl", start="builtin:lite2-minilm", set=name, neighbors=neighbors
    )
    return [mean(side) for side in zip(*row["fifths"], strict=True)]


def readme():
    """No pairs and all pairs of each set, by declip; of icons without neighbors."""
    known = {row["set"] for row in load("few/neighbors.jsonl")}
    for name in sorted({row["set"] for row in load("few/rivals.jsonl")}):
        file = "few/neighbors.jsonl" if name in known else "few/rivals.jsonl"
        ours = rows_of(file, set=name, method="declip finetune")
        most, held_out = max(row["pairs"] for row in ours), ours[0]["held_out"]
        fitted = [row for row in ours if row["pairs"] == most]
        start = [row for row in ours if row["pairs"] == 0]
        numbers = [mean(row[key] for row in start) for key in ("r1", "r10") if start]
        numbers = numbers or without_pairs(name)
        numbers += [mean(row[key] for row in fitted) for key in ("r1", "r10")]
        yield f"{TITLES.get(name, name)}, {most:,} pairs, {held_out} held-out images", numbers


NEIGHBOR_COLUMNS = (
    *("declip finetune", "declip, without neighbors", "ASIF with classes", "ASIF"),
    *("CSA with classes", "Procrustes"),
)


def neighbors():
    """declip with and without neighbors, and the methods that reviewers name."""
    cells = defaultdict(lambda: defaultdict(list))
    for row in load("few/neighbors.jsonl"):
        cells[row["set"], row["pairs"]][row["method"]].append((row["r1"], row["r10"]))
    for name in {name for name, _ in cells}:
        yield (
            f"{TITLES.get(name, name)}, 0",
            [*without_pairs(name), *without_pairs(name, neighbors=False)],
        )
    for (name, pairs), runs in cells.items():
        numbers = []
        for method in NEIGHBOR_COLUMNS:
            numbers += map(mean, zip(*runs[method], strict=True))
        yield f"{TITLES.get(name, name)}, {pairs:,}", numbers


def whole():
    """Galleries of whole sets, without and with class posteriors."""
    for name in ("stamps-photos", "clipart"):
        for method in ("declip, linear", "declip finetune"):
            row = pick("few/posteriors.jsonl", set=f"{name}, whole", method=method)
            yield from (row["r1"], row["r10"])


def demo():
    for row in load("demo.jsonl"):
        numbers = [*demo_seeds(row["dataset"]), 100 * row["top1"], row["n"], 100 * row["chance"]]
        yield row["dataset"].removeprefix("builtin:"), numbers


def demo_seeds(dataset):
    """Top-1 of the demo in bfloat16, by seed."""
    rows = rows_of("demo-bf16.jsonl", dataset=dataset)
    return [100 * row["top1"] for row in sorted(rows, key=itemgetter("seed"))]


FACTORS = {
    "demo-multi-view": "few",
    "demo-slip, smoothed": "slip",
    "demo-declip, smoothed": "declip_official",
}
FACTORS |= {"demo-few-declip": "", "FILIP, smoothed": "filip", "DeFILIP, smoothed": "defilip"}


def factor(*names):
    """Data-efficiency factors with their 95 % intervals."""
    return [load("factors.json")[name][key] for name in names for key in ("factor", "low", "high")]


def methods():
    scores = defaultdict(dict)
    for row in load("muon/methods.jsonl"):
        if row["recipe"] in TITLES and row["data"] == "emoji" and "loss_weights" not in row:
            title = TITLES[row["recipe"]] + ", in the time of demo-few-declip" * (
                row["steps"] == 1900
            )
            if row["steps"] in (1000, 1900):
                scores[title, row["pairs"]][row["seed"]] = 100 * row["emoji-test top1"]
    for row in load("studies/few.jsonl"):  # demo-clip was CLIP as published then
        if row["budget"] == "samples" and "top-1" in row["measure"]:
            scores[row["recipe"], row["pairs"]] = {"all seeds": row["mean_percent"]}
    for title in {title for title, _ in scores}:
        means = [
            mean(scores[title, n].values()) for n in (1400, 2800, 5600) if (title, n) in scores
        ]
        names = [f"{FACTORS[title]}_equal_samples".lstrip("_")] if title in FACTORS else []
        yield title, [None, *means, *factor(*names)]


LOSSES = {
    "few-clip": "demo-few-clip",
    "clip-constant": "demo-clip with constant temperature 0.1",
    "clip": "demo-clip",
}
LOSSES |= {"fast": "FastCLIP", "near-text": "caption_neighbor.py"}
LOSSES |= {
    "multi-view-16": "demo-multi-view with a second image of 16 px",
    "few-declip": "demo-few-declip",
}
CELLS = (
    ("emoji", 1400, 0),
    ("emoji", 5600, 0),
    ("icons", 16_000, 0),
    ("emoji", 1400, 0.25),
    ("emoji", 1400, 0.5),
)
OF_THREE = 4.303 / 3**0.5  # Student's t for the mean of three seeds


def losses():
    def runs(method, name, pairs, wrong=0):
        cell = {"method": method, "set": name, "pairs": pairs, "wrong": wrong}
        return {row["seed"]: row for row in load("loss.jsonl") if cell.items() <= row.items()}

    def of(method, pairs):
        return {seed: row["emoji-test"] for seed, row in runs(method, "emoji", pairs).items()}

    few, many = (of("clip", pairs) for pairs in (1400, 5600))
    doubling = (mean(many.values()) - mean(few.values())) / 2
    for method, title in LOSSES.items():
        numbers = [pick("loss.jsonl", method=method)["cost"]]
        for name, pairs, wrong in CELLS:
            own = runs(method, name, pairs, wrong).values()
            numbers += [
                mean(row[f"{name}-{part}"] for row in own) for part in ("validation", "test") if own
            ]
            if name == "emoji" and not wrong and method != "clip":
                plain = few if pairs == 1400 else many
                gains = [
                    (top1 - plain[seed]) / doubling for seed, top1 in of(method, pairs).items()
                ]
                numbers += [
                    2 ** (mean(gains) + side * OF_THREE * stdev(gains)) for side in (0, -1, 1)
                ]
        yield title, numbers


def embed():
    rows = [
        row for run in load("speed/embed.jsonl") for row in run["rows"] if row["size"] == "1024x768"
    ]
    for tower in {row["part"] for row in rows}:
        most, sides = max(row["count"] for row in rows if row["part"] == tower), defaultdict(list)
        for row in (row for row in rows if (row["part"], row["count"]) == (tower, most)):
            sides[
                "torch" if row["precision"] == "bf16" and row["what"] == "declip" else row["what"]
            ].append(row)
        columns = [sides[side] for side in ("torch", "fp32", "open_clip", "sentence_transformers")]
        yield (
            TITLES.get(tower, tower),
            [mean(row["per_second"] for row in column) for column in columns if column],
        )


def step():
    runs = [load(f"speed/step-{name}.jsonl")[0] for name in ("fp32", "bf16", "fp32-full-captions")]
    runs = [next(iter(run.get("measured", {"": run}).values())) for run in runs]
    yield "CLIP", [run["clip_over_open_clip"] for run in runs]
    yield "DeCLIP", [run.get("declip_over_open_clip") or run["ours_over_open_clip"] for run in runs]


def loading():
    columns = (
        "declip, colors left to the device",
        "declip, all on the CPU",
        "Pillow and torchvision",
        "open_clip's view, twice",
    )
    for title, size in (
        ("photographs of 500 × 375", "500 x 375"),
        ("2,048 × 1,536", "2048 x 1536"),
    ):
        where = {"pictures": f"photographs, {size}"}
        rows = [pick("speed/loader.jsonl", what=what, **where) for what in columns]
        yield title, [row["per_second"] for row in rows]


SHARES = {"6 to 10 %": {"stamps": 20, "clipart": 100, "emoji": 350, "icons": 175}}
SHARES |= {
    "12 to 20 %": {"stamps": 40, "clipart": 200, "emoji": 700, "icons": 350, "emoji-2000": 175}
}
SHARES |= {"22 to 31 %": {"stamps": 80, "emoji": 1400, "icons": 700, "emoji-2000": 350}}
SHARES |= {"40 to 58 %": {"stamps": 160, "clipart": 400, "icons": 1400, "emoji-2000": 700}}
STUDENT = 2.776  # of five seeds


def choose():
    """Smallest and largest factor, lowest limit; lite0 alone where lite2 with class names was not measured."""
    rows = [row for row in load("choose.jsonl") if "factor" in row]
    for share, sizes in SHARES.items():
        logs = defaultdict(list)
        for row in rows:
            own = (
                (None, "alone")
                if row["set"] in ("emoji", "icons")
                else ("builtin:lite2-minilm", "classes")
            )
            if sizes.get(row["set"]) == row["captions"] and (row.get("start"), row["pairs"]) == own:
                logs[row["set"]].append(log(row["factor"]))
        assert logs.keys() == sizes.keys()
        means = [exp(mean(each)) for each in logs.values()]
        low = min(
            exp(mean(each) - STUDENT * stdev(each) / len(each) ** 0.5) for each in logs.values()
        )
        yield share, [min(means), max(means), low]


def few_shot():
    kinds = {
        "stamps": "stamps by kind, 13 classes",
        "emoji": "emoji by category, 8",
        "icons": "icons by category, 12",
    }
    for name, title in kinds.items():
        where = {"start": "builtin:lite2-minilm", "set": name}
        runs = [pick("few_shot.json", shots=shots, **where)["top1"] for shots in (1, 4, 16)]
        names, ours = runs[0]["names alone"], [run["declip"] for run in runs]
        best = [
            max(v for k, v in run.items() if k not in ("declip", "names alone")) for run in runs
        ]
        yield title, [names, *ours, *best]


def keep():
    titles = {"clipart": ("clip art", "photographs"), "emoji-test": ("emoji", "stamps")}
    for name, (own, kept) in titles.items():
        rows = [row for row in rows_of("few/keep.jsonl", set=name) if row["pairs"] > 124]
        assert {row["alpha"] for row in rows if row["chosen"]} == {1}
        pairs = f"{own}, {rows[0]['pairs']:,} pairs fitted"
        for title, n, keys in (
            (pairs, "held_out", ("r1", "r10")),
            (f"{kept}, kept", "kept", ("kept_r1", "kept_r10")),
        ):
            numbers = [rows[0][n]]
            for alpha in (0, 0.25, 0.5, 0.75, 1):
                own = [row for row in rows if row["alpha"] == alpha]
                numbers += [mean(row[key] for row in own) for key in keys]
            yield title, numbers


def wrong_pairs():
    """Right captions listed without wrong ones; then recall and precision of the list, by the share of wrong ones."""
    for name in ("stamps-photos", "clipart", "emoji-test"):
        numbers = []
        for share in (0.0, 0.05, 0.1, 0.2):
            own = rows_of("few/wrong-pairs.jsonl", by="out-of-fold rank", set=name, share=share)
            right = sum(row["right_listed"][0] for row in own)
            wrong = sum(row["wrong_listed"][0] for row in own)
            if share:
                all_wrong = sum(row["wrong"] for row in own)
                numbers += [100 * wrong / all_wrong, 100 * wrong / (right + wrong)]
            else:
                numbers.append(100 * right / sum(row["right"] for row in own))
        yield TITLES.get(name, name), numbers


TABLES = [
    wrong_pairs,
    keep,
    readme,
    rivals,
    neighbors,
    demo,
    methods,
    losses,
    embed,
    step,
    loading,
    choose,
    few_shot,
]


def assert_equal(printed, values, where):
    """Compare with values, rounded as printed; None has no raw file."""
    assert len(printed) >= len(values), where
    for shown, value in zip(printed, values, strict=False):
        decimals = len(shown.partition(".")[2])
        assert value is None or shown == f"{value:,.{decimals}f}", f"{where}: {shown}, raw {value}"


@pytest.mark.parametrize("check", TABLES, ids=lambda check: check.__name__)
def test_a_table_has_the_numbers_of_its_raw_file(check):
    marked = [each for page in PAGES.values() for each in MARKED.findall(page)]
    [table] = [table for name, table in marked if name == check.__name__]
    expected = dict(check())
    for line in table.splitlines()[2:]:
        title, cells = re.sub(r"[`*]", "", line).strip("| ").split(" | ", 1)
        assert_equal(re.findall(NUMBER, cells), expected[title], title)


def class_pairs(name):
    return [load("class_pairs.json")[name][key] for key in ("factor", "low", "high")]


def chunks(batch):
    row = pick("speed/chunks-full.jsonl", batch=batch)
    return row["GB"], row["seconds"] / batch


def languages():
    """R@1 and R@10 from text to image of four languages, then by chance."""
    rows = [
        pick("few/languages.jsonl", language=code)["text_to_image"]
        for code in ("en", "de", "fr", "zh_CN")
    ]
    numbers = [row[key] for row in rows for key in ("r1", "r10")]
    numbers += [mean(row[key] for row in rows) for key in ("chance1", "chance10")]
    return [100 * number for number in numbers]


def fitting_seconds():
    """Medians with 101 and 1,000 images while the host gave little to others, and with 101 large ones."""
    rows = [row for row in load("speed/finetune.jsonl") if "359423b4" in str(row.get("commits"))]
    large = next(row["after"] for row in rows if "pixels" in row)
    times = {101: [], 1_000: []}
    for row in rows:
        taken = row["stolen_%"]["after"] if "stolen_%" in row else []
        for seconds, stolen in zip(row["after"], taken, strict=False):
            if stolen < 1.5:
                times[row["images"]].append(seconds)
    return [*map(median, times.values()), median(large)]


def clipart_fitted():
    """R@1 and R@10 with all pairs, then with none."""
    numbers = dict(readme())["clip art, 1,197 pairs, 300 held-out images"]
    return numbers[2:] + numbers[:2]


def started(dataset, *keys):
    return [100 * pick("few/start.jsonl", dataset=dataset)[key] for key in keys]


def equal_time(recipe):
    row = pick("demo-equal-time.jsonl", recipe=f"demo-few-{recipe}", dataset="builtin:emoji-test")
    return [100 * row["top1"]]


def words(measure):
    """Mean average precision of a search for words, before and after."""
    for name in ("stamps-photos", "clipart", "icons-test"):
        yield from pick("few/words.jsonl", set=name, measure=measure)["map"]


def steps():
    """Top-1 with 1,400 pairs, one loss added at a time."""
    names = (
        *(f"demo-declip, step {step}" for step in ("clip", "+multi_view", "+simsiam")),
        "demo-declip",
    )
    for name in names:
        rows = rows_of("muon/methods.jsonl", recipe=name, pairs=1400, steps=1000)
        top1 = {r["seed"]: r["emoji-test top1"] for r in rows if "loss_weights" not in r}
        yield 100 * mean(top1.values())


def many_icons():
    """Top-1 with 64,000 icons, of CLIP's loss and of DeCLIP's."""
    for name in ("demo-clip", "demo-declip with keywords"):
        rows = rows_of("muon/methods.jsonl", recipe=name, pairs=64_000)
        yield mean(100 * row["icons-test top1"] for row in rows)


TUNED = "demo-clip", "demo-filip", "demo-slip", "demo-declip-official", "demo-defilip"


def tuned():
    """Top-1 of methods without label smoothing, each with its own learning rate, with 5,600 pairs."""
    for name in TUNED:
        rows = rows_of("studies/emoji-five.jsonl", recipe=name, pairs=5600)
        yield mean(row["builtin:emoji-test: zero-shot top-1"] for row in rows)


def contained(name, *keys, first_seed=0):
    """Intervals that contain the value on new images, and all; with `first_seed` without those that chose a width."""
    rows = [
        row for row in load(f"few/{name}") if keys[0] in row and row.get("seed", -1) >= first_seed
    ]
    inside = []
    for key, truth in zip(keys[::2], keys[1::2], strict=True):
        inside += [row[key][1] <= row[truth] <= row[key][2] for row in rows]
    return sum(inside), len(inside)


EMBEDDERS = [
    ("ViT-B-32", side) for side in ("declip", "open_clip_bf16", "sentence_transformers_bf16")
]
EMBEDDERS += [("RN50", side) for side in ("declip", "open_clip_bf16")]
ENGINES = "declip, exact, float16", "sentence-transformers", "faiss, IndexFlatIP"
NUMBERS = {  # by the key of their markers, in the order of the page
    "wins": wins,
    "class_pairs_stamps": lambda: class_pairs("stamps")[:2],
    "class_pairs_emoji": lambda: class_pairs("emoji"),
    "class_pairs_clipart": lambda: class_pairs("clipart"),
    "factor_steps": lambda: factor("equal_samples")[:1],
    "factor_smoothing": lambda: factor("smoothed_clip_over_published"),
    "factor_published": lambda: factor("over_clip_as_published"),
    "factor_time": lambda: factor("equal_compute"),
    "factor_multi_view_time": lambda: factor("few_equal_compute"),
    "posteriors": lambda: [*whole()],
    "gain_of_losses": steps,
    "without_smoothing": tuned,
    "equal_time_clip": lambda: equal_time("clip"),
    "equal_time_neighbor": lambda: equal_time("neighbor"),
    "coverage_percentile": lambda: contained("percentile.jsonl", "percentile", "truth"),
    "coverage_recall": lambda: contained(
        "coverage.jsonl", "R1", "truth1", "R10", "truth10", first_seed=4
    ),
    "start_photographs": lambda: pick(
        "few/neighbors-none.jsonl",
        start="builtin:lite2-minilm",
        set="stamps-photos",
        neighbors=True,
    )["whole"],
    "clipart_fitted": clipart_fitted,
    "words": lambda: [*words("all words")],
    "kinds": lambda: pick("few/kinds.jsonl", what="names")["top1"],
    "demo_seeds": lambda: [fold(demo_seeds("builtin:emoji-test")) for fold in (min, max)],
    "fitting_seconds": fitting_seconds,
    "five_minutes": lambda: [100 * load("five-minutes.jsonl")[0]["top1"]],
    "start_kinds": lambda: started("builtin:stamps-kinds", "top1"),
    "chunks_large": lambda: chunks(4096),
    "chunks_small": lambda: chunks(64),
    "languages": languages,
    "many_icons": lambda: [*many_icons()],
    "usearch": lambda: [
        pick("speed/search.jsonl", vectors=10**5, count=1, what=what)["milliseconds"]
        for what in ("usearch, float16", "declip, exact, float16")
    ],
    "engines": lambda: [
        pick("speed/search.jsonl", vectors=10**6, count=1, what=what)["milliseconds"] / 1000
        for what in ENGINES
    ],
    "embed_bf16": (
        lambda: [
            pick("speed/embed-bf16.jsonl", part=part, what=what)["per_second"]
            for part, what in EMBEDDERS
        ]
    ),
    "starts": lambda: [row["processor_s"] for row in load("speed/start.json")["rows"][1:]],
}


@pytest.mark.parametrize("key", NUMBERS)
def test_marked_numbers_are_those_of_their_raw_file(key):
    """Numbers of sentences are marked, as in `<!--n:KEY-->24.7<!--/n-->`, so that the words are free."""
    on_pages = [re.findall(f"<!--n:{key}-->{NUMBER}<!--/n-->", text) for text in PAGES.values()]
    on_pages = [found for found in on_pages if found]
    assert on_pages, f"no page has {key}"
    values = [*NUMBERS[key]()]
    for found in on_pages:
        assert len(found) == len(values)
        assert_equal(found, values, key)


@pytest.mark.parametrize("page", PAGES)
def test_markers_of_numbers_are_complete(page):
    text = PAGES[page]
    opened = re.findall(r"<!--n:(\w+)-->", text)
    assert set(opened) <= NUMBERS.keys()
    complete = re.findall(rf"<!--n:\w+-->{NUMBER}<!--/n-->", text)
    assert len(opened) == text.count("<!--/n-->") == len(complete)


def test_the_table_of_models_has_the_numbers_of_recipes_and_raw_files():
    with (ROOT / "docs" / "models.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    library = ROOT / "src" / "declip" / "recipe" / "library"
    published = {row["recipe"] for row in rows if row["reported"]}
    measured = re.compile("-yfcc15m-(?!vitb16)|-88m-")  # the authors have no ViT-B/16
    assert published == {name for name in recipe_names() if measured.search(name)}
    for row in rows:
        recipe = row["recipe"].split()[0]
        if row["reported"]:
            comment = (library / f"{recipe}.yaml").read_text(encoding="utf-8").replace("\n# ", " ")
            assert f"README: {row['reported']} % {row['measure']} on {row['set']}" in comment
        if row["measured"]:
            own = {"recipe": recipe} if row["raw"] == "demo-equal-time.jsonl" else {}
            runs = rows_of(row["raw"], dataset=row["set"], **own)
            assert len(runs) == int(row["runs"]), row
            assert_equal([row["measured"]], [mean(100 * run["top1"] for run in runs)], row)
            raw = (ROOT / "benchmarks" / "results" / row["raw"]).read_text(encoding="utf-8")
            assert row["commit"] in raw.partition("\n")[0]
