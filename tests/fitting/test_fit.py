"""Fine-tuning of projections between frozen towers in closed form."""

import os
import re
import shutil
import signal
from collections import Counter
from dataclasses import replace
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import declip
from conftest import in_processes, refuses, texture
from declip.closed_form.heads import Heads, fit_heads
from declip.closed_form.pairs import ClassPairs, Pairs
from declip.closed_form.related import known_pairs
from declip.closed_form.solve import DEFAULT_FORM, Form
from declip.data.sources.open import open_source
from declip.data.sources.subset import Subset
from declip.fitting.adapted import Adapted
from declip.fitting.base import Base
from declip.fitting.shown import SHOWN_QUERIES
from declip.io.text import percent
from declip.models.image_tower import ImageTower
from declip.models.posteriors import PosteriorProjection
from declip.models.precision import pooling_tower
from declip.reports.fitted import fitted_lines
from declip.reports.page import NBSP, points
from declip.runs.fitted import HEADS, FittedRun
from interchange.towers import add_neighbors
from text_encoders import bert

COUNT = 40
TRAINED = {"train.steps": 2, "train.batch_size": 8, "train.report_to": []}
GROUPED = {"data.columns.group": "product"}
COLORS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs with two captions each, and two towers without projections."""
    folder = tmp_path_factory.mktemp("fit")
    torch.manual_seed(0)
    bert(folder / "bert")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "vit.safetensors")
    rows = []
    for number in range(COUNT):
        texture(number).save(folder / f"{number}.png")
        words = f"{COLORS[number % 4]} {COLORS[number // 4 % 4]} {COLORS[number // 16]}"
        part = ["test", "val", "train", "train"][number % 4]
        rows += [f"{number}.png,{words} {end},{part}" for end in ("circle", "on paper")]
    for name, column, some in (
        ("pairs", "part", rows),
        ("reversed", "part", rows[::-1]),
        ("split", "split", rows),
    ):
        (folder / f"{name}.csv").write_text("\n".join([f"image,caption,{column}", *some]) + "\n")
    return folder


def keys_of(**keys):
    return {"image.size": 32, "text.context_length": 24, "train.precision": "fp32", **keys}


def start_of(folder, towers=None):
    """The name of two towers without projections."""
    return f"timm:test_vit/{(towers or folder) / 'vit.safetensors'}+{folder / 'bert'}"


def fitted(folder, out, table="pairs.csv", resume=False, **keys):
    """Fine-tune as the command does."""
    return declip.finetune(
        folder / table, start_of(folder), keys_of(**keys), out, resume, progress=False
    )


def cosines(where, folder):
    """Similarities of all images and captions, and the logit scale."""
    model = declip.load(where, device="cpu")
    source = open_source(folder / "pairs.csv")
    captions = [caption for index in range(len(source)) for caption in source[index].captions()]
    with torch.no_grad():
        images = model.encode_image(
            model.preprocess([source[index].open().decoded() for index in range(len(source))])
        )
        return images @ model.encode_text(model.tokenize(captions)).mT * model.logit_scale.exp()


@pytest.fixture(scope="module")
def run(folder):
    return fitted(folder, folder / "run")


@pytest.fixture(autouse=True)
def without_exports(request, monkeypatch):
    """Leave out the exports, which take longer than a fit; `run`, of a wider scope, has them."""
    if "exports" not in request.keywords:
        monkeypatch.setattr("declip.fitting.run.export_complete", lambda *_: None)


def test_heads_are_those_of_every_caption_of_all_pairs(run, folder):
    model = declip.load(run.folder, device="cpu")
    source = open_source(folder / "pairs.csv")
    captions = [source[index].captions() for index in range(COUNT)]
    of = model.preprocessor
    with torch.no_grad():
        images = model.image_tower.pool(
            of([source[index].open().decoded() for index in range(COUNT)])
        )
        resized = of.normalize(
            torch.stack([of.fast(source[index].open()) for index in range(COUNT)])
        )
        seen = model.image_tower.pool(resized)
        texts = model.text_tower.pool(model.tokenize([each for pair in captions for each in pair]))
    known = run.cross_validation
    pairs = Pairs(seen, texts, torch.arange(COUNT).repeat_interleave(2))
    heads = fit_heads(pairs, None, 0.0, Form(known["method"], known["ridge"]))
    expected = heads.similarities(images.double(), texts.double()).float() * known["logit_scale"]
    torch.testing.assert_close(cosines(run.folder, folder), expected, rtol=0, atol=1e-3)
    assert (known["pairs"], known["captions"], known["classes"], known["candidates"]) == (
        COUNT,
        2 * COUNT,
        0,
        8,
    )


def test_a_fit_is_two_matrices_its_measures_and_an_export_that_stands_alone(run, folder, tmp_path):
    assert run.finished
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        HEADS,
        "cross_validation.json",
        "out_of_fold.csv",
        "results.json",
        "fit.json",
        "report.html",
        "exported",
    }
    small = (run.folder / HEADS).stat().st_size
    assert small < 0.2 * (run.folder / "exported/safetensors/declip.safetensors").stat().st_size
    moved = tmp_path / "moved"
    shutil.copytree(run.folder / "exported" / "safetensors", moved)
    torch.testing.assert_close(
        cosines(moved, folder), cosines(run.folder, folder), rtol=0, atol=1e-5
    )
    # --- the page and the table of captions
    page = run.report.read_text(encoding="utf-8")
    assert f"fitted to {start_of(folder)}" in page
    known = run.cross_validation
    assert (
        f"better than {percent(known['percentile']['value']).replace(' ', NBSP)} of the others"
        in page
    )
    assert (list(known["recall"]), known["recall"]["1"]["chance"]) == (
        ["1"],
        1 / 8,
    )  # 10 is more than a fifth of 8
    assert all(fitted_lines(run)), "no empty line"
    place = round(100 - 99 * known["percentile"]["value"])
    assert re.search(
        rf"of the others [^<]* Among 100 images, the right one is then in place {place} ", page
    )
    worst = run.facts["worst"]
    assert len({row["key"] for row in worst}) == len(worst) == 16
    shown = run.facts["queries"]["shown"]
    assert len(shown) == SHOWN_QUERIES
    assert page.count('src="data:image/webp') == len(worst) + 2 * len(shown), "without a start"
    assert min(row["rank"] for row in worst) > 0, "a caption that is first is not among the worst"
    ranks = list(run.caption_ranks.values())
    assert len(ranks) == 2 * COUNT
    assert ranks == sorted(ranks, reverse=True)
    assert 0 <= ranks[-1] < ranks[0] <= 1


def test_a_base_that_is_gone_or_another_one_is_named(folder, tmp_path):
    base = tmp_path / "vit.safetensors"
    shutil.copy(folder / "vit.safetensors", base)
    run = declip.finetune(
        folder / "pairs.csv",
        start_of(folder, tmp_path),
        keys_of(),
        tmp_path / "run",
        progress=False,
    )
    base.rename(tmp_path / "away.safetensors")
    refuses(
        ("was fitted to 'timm:test_vit/", "exported/safetensors"), declip.load, run.folder, "cpu"
    )
    other = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file(other, base)
    refuses("of fingerprint .* but that is now", declip.load, run.folder, "cpu")
    (tmp_path / "away.safetensors").rename(base)
    before = cosines(run.folder, folder)
    elsewhere = run.folder.rename(tmp_path / "elsewhere")
    assert torch.equal(cosines(elsewhere, folder), before)


def test_the_card_of_a_fit_states_no_steps_and_its_cross_validation(run):
    card, _, end = (
        (run.folder / "exported/safetensors/README.md")
        .read_text(encoding="utf-8")
        .partition("<details>")
    )
    assert f"{COUNT} pairs" in card
    assert [
        words for words in ("peak learning rate", "steps of", "pairs seen") if words in card
    ] == []
    known = run.cross_validation["percentile"]
    numbers = f"better than {percent(known['value'])} of the others ({percent(known['low'])} to"
    assert (numbers in end, f"n = {2 * COUNT}" in end, "No results" in end) == (True, True, False)


def test_another_order_of_pairs_changes_nothing(run, folder, tmp_path):
    other = fitted(folder, tmp_path / "run", "reversed.csv")
    assert other.cross_validation["ridge"] == run.cross_validation["ridge"]
    torch.testing.assert_close(
        cosines(other.folder, folder), cosines(run.folder, folder), rtol=0, atol=1e-3
    )


def test_a_finished_fit_stays(run, folder, tmp_path):
    written = (run.folder / HEADS).stat().st_mtime_ns
    assert fitted(folder, run.folder, resume=True).finished
    assert (run.folder / HEADS).stat().st_mtime_ns == written
    refuses("already holds a fit", fitted, folder, run.folder)
    refuses("was fitted with PAIRS", fitted, folder, run.folder, "reversed.csv", True)
    (tmp_path / "photos").mkdir()
    texture(1).save(tmp_path / "photos" / "a.png")
    refuses("has other files, such as 'a.png'", fitted, folder, tmp_path / "photos")


def test_each_image_is_read_once(folder, tmp_path):
    reads = Counter()

    class Counted(Subset):
        def __getitem__(self, index):
            pair = super().__getitem__(index)

            def opened():
                reads[index] += 1
                return pair.open()

            return replace(pair, open=opened)

    pairs = Counted(open_source(folder / "pairs.csv"), np.arange(COUNT))
    run = declip.finetune(pairs, start_of(folder), keys_of(), tmp_path / "run", progress=False)
    images = [row["image"]["src"] for row in run.facts["worst"]]
    for query in run.facts["queries"]["shown"]:
        images += [query[name]["src"] for name in ("own", "before", "now")]
    assert reads.total() == COUNT + len(set(images))


def killed_while_it_exports(folder, out):
    def export(traced, target):
        target.mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("declip.fitting.run.export_complete", export)
        fitted(folder, out)


def test_a_fit_that_was_killed_leaves_no_folder_and_its_features(
    run, folder, tmp_path, monkeypatch
):
    process = get_context("fork").Process(
        target=killed_while_it_exports, args=(folder, tmp_path / "run")
    )
    process.start()
    process.join()
    assert (process.exitcode, (tmp_path / "run").exists()) == (-signal.SIGKILL, False)
    monkeypatch.setattr(ImageTower, "pool", None)  # all features are cached
    again = fitted(folder, tmp_path / "run", resume=True)
    assert torch.equal(
        load_file(again.folder / HEADS)["logit_scale"], load_file(run.folder / HEADS)["logit_scale"]
    )


def test_a_split_column_decides_what_is_validated_on(folder, tmp_path):
    run = fitted(folder, tmp_path / "run", "split.csv")
    assert run.cross_validation["pairs"] == COUNT // 2
    assert [result.images for result in FittedRun(run.folder).results] == [COUNT // 4]


def test_views_of_one_object_are_named_where_they_are_not_left_out_together(folder, tmp_path):
    rows = ["image,caption,product,kind"]
    for number in range(COUNT):
        first, second = texture(number // 2), texture(100 + number)
        Image.blend(first, second, 0.3).save(tmp_path / f"{number}.png")
        row = f"P{number // 2},{number // 4 % 2}"
        texts = [f"text {number}", f"other {number}"][: 1 + number % 3]  # rows and images differ
        rows += [f"{tmp_path / f'{number}.png'},{text},{row}" for text in texts]
    (folder / "views.csv").write_text("\n".join(rows) + "\n")
    runs = [
        fitted(folder, tmp_path / f"run{len(key)}", "views.csv", **key) for key in ({}, GROUPED)
    ]
    assert [run.cross_validation["leaking"] for run in runs] == ["product", None]
    warned = ["data.columns.group=product" in line for line in fitted_lines(runs[0])]
    percentile = ["fits its image better than" in line for line in fitted_lines(runs[0])]
    assert (warned, any(warned)) == (percentile, True), "at the number that is too high"
    assert "data.columns.group" not in " ".join(fitted_lines(runs[1]))


def test_copies_of_an_image_are_left_out_together(folder, tmp_path):
    # Captions without meaning, on two copies of each image: only the copy could tell which caption is right.
    rng, rows = np.random.default_rng(0), ["image,caption,product"]
    for number in range(60):
        caption = " ".join(rng.choice([*"abcdefghijklmnopqrstuvwxyz", *COLORS], 4))
        for copy, side in enumerate((96, 48)):
            name = tmp_path / f"{number}-{copy}.png"
            texture(500 + number, 96).resize((side, side)).save(name)
            rows.append(f"{name},{caption},P{number}")
    (tmp_path / "copies.csv").write_text("\n".join(rows) + "\n")
    known = fitted(folder, tmp_path / "run", tmp_path / "copies.csv").cross_validation
    assert (known["pairs"], known["groups"]) == (120, 60)
    assert known["percentile"]["low"] < 0.5 < known["percentile"]["high"]
    assert known["leaking"] is None, "copies share a product, and are left out together already"


@pytest.mark.parametrize("key", ["train.lr", "loss_weights.multi_view"])
def test_keys_without_effect_are_refused(key, folder, tmp_path):
    refuses((f"{key}=0.1", "--freeze none"), fitted, folder, tmp_path / "run", **{key: 0.1})
    assert not (tmp_path / "run").exists()


def test_the_classes_of_the_start_are_pairs_too(folder, tmp_path):
    save_file(
        timm.create_model("test_vit", num_classes=4).state_dict(), tmp_path / "vit.safetensors"
    )
    (tmp_path / "names.txt").write_text("\n".join(COLORS))
    options, keys = {"progress": False}, keys_of()
    names = {"finetune.class_names": str(tmp_path / "names.txt")}
    start = start_of(folder, tmp_path)
    known = declip.finetune(
        folder / "pairs.csv", start, keys | names, tmp_path / "run", **options
    ).cross_validation
    assert (known["classes"], known["better"]) == (4, known["gain"]["low"] > 0)
    assert known["gain"]["value"] == pytest.approx(
        known["percentile"]["value"] - known["percentile_of_start"]["value"]
    )
    printed = " ".join(
        fitted_lines(SimpleNamespace(cross_validation={**known, "method": "ridge"}, mixture={}))
    )
    assert ("without any fitting" in printed, points(known["gain"]["value"]) in printed) == (
        True,
        True,
    )
    model = declip.load(tmp_path / "run", "cpu")
    assert model.image_tower.proj.classes.shape == (4, model.image_tower.pre_logits_width)
    further = declip.finetune(
        folder / "pairs.csv", tmp_path / "run", TRAINED, tmp_path / "all", freeze="none"
    )
    trained = declip.load(further.folder, "cpu").image_tower.proj
    assert trained.axes.shape == model.image_tower.proj.axes.shape
    assert torch.equal(trained.anchors, model.image_tower.proj.anchors)
    keys["finetune.class_pairs"] = False
    run = declip.finetune(folder / "pairs.csv", start, keys, tmp_path / "without", **options)
    assert run.cross_validation["classes"] == 0


def test_heads_with_neighbors_are_compared_with_the_start_which_stays_otherwise(
    folder, tmp_path, monkeypatch
):
    tower = timm.create_model("test_vit", num_classes=4).state_dict()
    save_file(tower, tmp_path / "vit.safetensors")
    (tmp_path / "names.txt").write_text("\n".join(COLORS))
    keys = keys_of(**{"finetune.class_names": tmp_path / "names.txt"})
    seen, known = [], {}
    for better in (True, False):
        compare = lambda outcome, *_, better=better: seen.append(outcome) or better  # noqa: E731
        monkeypatch.setattr("declip.closed_form.choice.beats", compare)
        out = tmp_path / str(better)
        run = declip.finetune(folder / "pairs.csv", start_of(folder, tmp_path), keys, out)
        known[better] = run.cross_validation
    assert (known[True]["method"], known[True]["neighbors"]) == ("ridge", [0.5, 0.5])
    assert (known[False]["method"], known[False]["neighbors"]) == ("start", [1.0, 0.0])
    assert len(seen) == 3, "with neighbors, and then the start with neighbors"
    assert float(seen[0].percentiles().mean()) == pytest.approx(known[True]["percentile"]["value"])
    assert known[False]["percentile"] == known[True]["percentile_of_start"]


def pooled(where, folder, precision=torch.float32):
    """Features of all images and captions as a fit computes them, by the towers of a run."""
    model = declip.load(where, device="cpu")
    source = open_source(folder / "pairs.csv")
    captions = [caption for index in range(COUNT) for caption in source[index].captions()]
    preprocessor = model.preprocessor
    resized = torch.stack([preprocessor.fast(source[index].open()) for index in range(COUNT)])
    tower = pooling_tower(model, precision)
    with torch.no_grad():
        images = tower.pool(preprocessor.normalize(resized).to(precision)).float()
        texts = model.text_tower.pool(model.tokenize(captions))
        names = model.text_tower.pool(model.tokenize(list(COLORS)))
    return Pairs(images, texts, torch.arange(COUNT).repeat_interleave(2)), names


def test_a_saved_model_computes_posteriors_as_the_heads_that_were_fitted(folder, tmp_path):
    tower = timm.create_model("test_vit", num_classes=4).state_dict()
    save_file(tower, tmp_path / "vit.safetensors")
    (tmp_path / "names.txt").write_text("\n".join(COLORS))
    # Pairs that are too few for a choice, so that the form and the weight of the classes are known
    (folder / "ten.csv").write_text(
        "\n".join((folder / "pairs.csv").read_text().splitlines()[:21]) + "\n"
    )
    start, names = start_of(folder, tmp_path), {"finetune.class_names": tmp_path / "names.txt"}
    run = declip.finetune(folder / "ten.csv", start, keys_of(**names), tmp_path / "run")
    pairs, texts = pooled(run.folder, folder)
    few = Pairs(pairs.images[:10], pairs.texts[:20], pairs.owners[:20])
    rows = tower["head.weight"]
    classes = ClassPairs(rows, texts, torch.arange(4), torch.zeros(rows.shape[1]))
    heads = fit_heads(few, classes, 1.0, DEFAULT_FORM)
    heads = heads._replace(neighbors=known_pairs(few, classes))  # all their dimensions
    expected = heads.similarities(pairs.images.double(), pairs.texts.double()).float()
    known = run.cross_validation
    assert known["neighbors"] == [0.5, 0.5]
    assert (known["method"], known["class_weight"], known["pairs"]) == ("ridge", 1.0, 10)
    torch.testing.assert_close(
        cosines(run.folder, folder) / known["logit_scale"], expected, rtol=0, atol=2e-3
    )
    # --- what the anchors are
    keys = [open_source(folder / "ten.csv")[index].key for index in range(10)]
    assert [key for key, _ in run.known] == [*keys, "", "", "", ""]
    assert [caption for _, caption in run.known[10:]] == list(COLORS)
    captions = declip.load(run.folder, "cpu").text_tower.text_projection.side
    of_first = captions.nearest(pairs.texts[0:20:2], 2)[1]
    assert [row in near for row, near in enumerate(of_first.tolist())] == [True] * 10
    assert run.known[3][1] == open_source(folder / "ten.csv")[3].captions()[0]


def test_features_are_computed_in_the_precision_of_the_recipe(run, folder, tmp_path):
    rounded = fitted(folder, tmp_path / "run", **{"train.precision": "bf16"})
    known = rounded.cross_validation
    found = cosines(rounded.folder, folder) / known["logit_scale"]
    exact, _ = pooled(run.folder, folder)
    form = Form(known["method"], known["ridge"])
    differences = []
    for precision in (torch.bfloat16, torch.float32):
        pairs, _ = pooled(run.folder, folder, precision)
        heads = fit_heads(pairs, None, 0.0, form)
        expected = heads.similarities(exact.images.double(), exact.texts.double())
        differences.append(float((found - expected).abs().mean()))
    assert differences[0] < 0.2 * differences[1]


@pytest.mark.exports
def test_the_mixture_with_the_start_is_chosen_on_left_out_and_kept_pairs(
    run, folder, tmp_path, monkeypatch
):
    # Another candidate than the start
    monkeypatch.setattr("declip.closed_form.choice.START_CAUTION", -9.0)
    monkeypatch.setattr("declip.closed_form.choice.beats", lambda *_: True)
    rows = (folder / "pairs.csv").read_text().splitlines()
    words = [row.split(",", 1)[1] for row in rows[1:]]
    others = [
        f"{row.split(',')[0]},{word}" for row, word in zip(rows[1:], words[::-1], strict=True)
    ]
    (folder / "others.csv").write_text("\n".join([rows[0], *others]) + "\n")
    kept = folder / "pairs.csv"
    mixed = declip.finetune(
        folder / "others.csv",
        run.folder,
        None,
        tmp_path / "a",
        freeze="both",
        keep=kept,
        progress=False,
    )
    scores = {float(alpha): found for alpha, found in mixed.mixture["scores"].items()}
    assert (
        mixed.mixture["alpha"]
        == max(scores, key=lambda alpha: (sum(scores[alpha].values()), alpha))
        < 1
    )
    assert scores[mixed.mixture["alpha"]][str(kept)] > scores[1][str(kept)]
    # --- the run, its export and its results are the mixture's
    (before,), (after,) = mixed.results_of_start, mixed.results
    truth = declip.evaluate(mixed.folder, str(kept), "retrieval", device="cpu")
    assert after.headline.value == truth.headline.value
    assert before.headline.value >= after.headline.value > scores[1][str(kept)]
    exported = cosines(mixed.folder / "exported" / "safetensors", folder)
    torch.testing.assert_close(exported, cosines(mixed.folder, folder), rtol=0, atol=1e-5)
    page = mixed.report.read_text(encoding="utf-8")
    assert f"{mixed.mixture['alpha']:g} × fine-tuned" in page


MEASURED = {
    "pairs": 31,
    "captions": 31,
    "classes": 9,
    "method": "ridge",
    "ridge": 1.0,
    "class_weight": 0.0,
}
NO_CURVE = {"pairs": [], "measured": []}
PERCENTILE = {"value": 0.75, "low": 0.6, "high": 0.9}
VERDICTS = [
    ((0.02, 0.01, 0.03), "is better: +2.0", None),
    (
        (0.02, -0.01, 0.05),
        "Too few pairs to tell whether fine-tuning is better: +2.0 points (95 %: −1.0",
        "39 more",
    ),
    (
        (0.001, -0.03, 0.032),
        "Too few pairs to tell whether fine-tuning is better: +0.10",
        "more than ten times",
    ),
    ((0.001, -0.003, 0.005), "is no better: +0.10", None),
    ((-0.02, -0.05, 0.01), "is no better: −2.0", None),
]


@pytest.mark.parametrize(("gain", "verdict", "advice"), VERDICTS)
def test_the_interval_of_the_gain_decides_what_is_said(gain, verdict, advice):
    interval = dict(zip(("value", "low", "high"), gain, strict=True))
    known = {
        **MEASURED,
        "percentile": PERCENTILE,
        "recall": {},
        "leaking": None,
        "growth": NO_CURVE,
        "gain": interval,
    }
    for start in ({"percentile_of_start": PERCENTILE}, {}):
        run = SimpleNamespace(cross_validation={**known, **start}, mixture={})
        printed = " ".join(fitted_lines(run))
        assert (verdict in printed) == bool(start)
        assert ("better than chance" in printed) == (not start and gain[1] < 0)
        assert ("declip choose" in printed) == bool(advice)
        assert advice is None or advice in printed


def test_a_gain_whose_interval_contains_0_is_not_called_better(folder, tmp_path):
    rows = [row.split(",", 1) for row in (folder / "pairs.csv").read_text().splitlines()]
    # Captions of other images; by chance some fit
    order = np.random.default_rng(7).permutation(COUNT)
    images = [rows[1 + 2 * image][0] for image in order.repeat(2)]
    table = [
        f"{folder / image},{caption}" for image, (_, caption) in zip(images, rows[1:], strict=True)
    ]
    (tmp_path / "shuffled.csv").write_text("\n".join([",".join(rows[0]), *table]) + "\n")
    run = fitted(folder, tmp_path / "run", tmp_path / "shuffled.csv")
    gain = run.cross_validation["gain"]
    assert gain["low"] < 0 < gain["value"]
    assert not run.cross_validation["better"]
    assert "Too few pairs to tell" in " ".join(fitted_lines(run))
    page = run.report.read_text()
    assert "<code>declip app … --caption</code>" in page
    assert "`" not in page


def test_a_start_that_stays_is_said_in_plain_words():
    known = {
        **MEASURED,
        "method": "start",
        "percentile": PERCENTILE,
        "recall": {},
        "leaking": None,
        "growth": NO_CURVE,
    }
    known["gain"] = {"value": 0.0, "low": 0.0, "high": 0.0}
    printed = " ".join(fitted_lines(SimpleNamespace(cross_validation=known, mixture={})))
    assert ("Nothing was changed" in printed, "chance 50" in printed, "no better" in printed) == (
        True,
        True,
        False,
    )
    known |= {"known_pairs": 31, "neighbors": [0.5, 0.5], "percentile_of_start": PERCENTILE}
    lines = fitted_lines(SimpleNamespace(cross_validation=known, mixture={}))
    assert all(lines)
    assert "Nothing was changed" not in lines[0]
    assert "pairs and classes an image and a caption both resemble" in lines[0]
    assert "no better" in " ".join(lines[1:])


def test_a_set_to_keep_without_images_is_refused_before_the_fit(folder, tmp_path):
    (tmp_path / "kept.csv").write_text("image,caption\nmissing.png,a circle\n")
    given = folder / "pairs.csv", start_of(folder), keys_of(), tmp_path / "run"
    options = {"keep": tmp_path / "kept.csv", "progress": False}
    refuses(("kept.csv", "missing.png"), declip.finetune, *given, **options)
    assert not (tmp_path / "run").exists()


def fitted_here(folder, out):
    """Fit in one of several processes, see `fitted`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "declip.training.distributed.destroy_distributed", lambda: None
        )  # which the test does
        run = fitted(folder, out)
    return run.finished, run.is_rank_zero


def test_two_processes_are_one(run, folder, tmp_path):
    assert in_processes(fitted_here, 2, tmp_path / "meet", folder, tmp_path / "run") == [
        (True, True),
        (True, False),
    ]
    torch.testing.assert_close(
        cosines(tmp_path / "run", folder), cosines(run.folder, folder), rtol=0, atol=1e-5
    )


def words_of(folder, table, out, **keys):
    """The words of the command."""
    given = (f"{key}={value}" for key, value in keys_of(**keys).items())
    return ["finetune", folder / table, "--from", start_of(folder), "--out", out, "--quiet", *given]


def test_one_pair_is_fitted_without_a_validation_part(folder, tmp_path, command):
    (folder / "single.csv").write_text(
        "\n".join((folder / "pairs.csv").read_text().splitlines()[:2]) + "\n"
    )
    printed = command(*words_of(folder, "single.csv", tmp_path / "run"))
    assert printed.status == 0
    parts = ("1 pair", "--val", "needs 20 different pairs; there is 1: nothing was measured")
    assert all(part in printed.out for part in parts)
    run = FittedRun(tmp_path / "run")
    assert (run.results, run.cross_validation["pairs"]) == ([], 1)
    assert bool(cosines(tmp_path / "run", folder).isfinite().all())


def test_broken_pairs_are_counted_and_refused_and_cut_captions_named(
    folder, tmp_path, command, caplog
):
    head, *rows = (folder / "pairs.csv").read_text().splitlines()
    (folder / "broken.csv").write_text("\n".join([head, *rows, "missing.png,a red circle,"]) + "\n")
    printed = command(
        *words_of(folder, "broken.csv", tmp_path / "run", **{"text.context_length": 5})
    )
    assert (printed.status, "Left out: 1 × missing image, such as missing.png" in printed.out) == (
        0,
        True,
    )
    assert "longer than 5 tokens" in caplog.text
    run = FittedRun(tmp_path / "run")
    assert (run.skipped["seen"], run.cross_validation["pairs"]) == (COUNT + 1, COUNT)
    few = {"data.max_broken_fraction": 0.01}
    refuses("max_broken_fraction", fitted, folder, tmp_path / "refused", "broken.csv", **few)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("more", ["", "posteriors", "neighbors"])
def test_heads_are_applied_after_the_projections_of_their_start(more, run):
    """The merged model computes what the heads compute from the embeddings of the base."""
    model, heads = declip.load(run.folder, "cpu"), Heads(*torch.randn(2, 8, 64).unbind())
    tower, weights = model.image_tower, len(model.image_tower.proj.weight)
    heads = Heads(heads.image[:, :weights], heads.text[:, :weights])
    if more == "posteriors":
        tower.proj = PosteriorProjection(tower.pre_logits_width, 4, weights)
        torch.nn.init.normal_(tower.proj.classes)
    if more == "neighbors":
        add_neighbors(model, 20, weights)
    adapted = Adapted(Base(model, projected=True, name="start"), heads, 7.0)
    images = model.preprocess([texture(0), texture(1)])
    tokens = model.tokenize(["red circle", "blue"])
    with torch.no_grad():
        expected = heads.similarities(model.encode_image(images), model.encode_text(tokens))
        found = adapted.encode_image(images) @ adapted.encode_text(tokens).mT
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        merged = adapted.merged()
        found = merged.encode_image(images) @ merged.encode_text(tokens).mT
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert merged.logit_scale.exp().item() == pytest.approx(7)
