"""Fine-tuning of projections between frozen towers in closed form."""

import functools
import os
import re
import shutil
import signal
from collections import Counter
from copy import deepcopy
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
TRAINED = {"train.steps": 2, "train.batch_size": 8, "train.report_to": [], "data.workers": 0}
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


def start_of(folder, vit="vit.safetensors"):
    """The name of two towers without projections."""
    return f"timm:test_vit/{folder / vit}+{folder / 'bert'}"


def fitted(folder, out, table="pairs.csv", resume=False, start=None, **keys):
    """Fine-tune as the command does."""
    start = start or start_of(folder)
    return declip.finetune(folder / table, start, keys_of(**keys), out, resume, progress=False)


@pytest.fixture(scope="module")
def classifier(folder):
    """As keys of `fitted`: towers of which the first has classes, and their names."""
    tower = timm.create_model("test_vit", num_classes=len(COLORS)).state_dict()
    save_file(tower, folder / "classes.safetensors")
    (folder / "names.txt").write_text("\n".join(COLORS))
    names = {"finetune.class_names": str(folder / "names.txt")}
    return {"start": start_of(folder, "classes.safetensors"), **names}


@functools.cache
def read_pairs(folder):
    """All images and all captions."""
    source = open_source(folder / "pairs.csv")
    pairs = [source[index] for index in range(COUNT)]
    return [pair.open() for pair in pairs], [each for pair in pairs for each in pair.captions()]


def cosines(model, folder):
    """Similarities of all images and captions, and the logit scale."""
    images, captions = read_pairs(folder)
    with torch.no_grad():
        features = model.encode_image(model.preprocess([image.decoded() for image in images]))
        return features @ model.encode_text(model.tokenize(captions)).mT * model.logit_scale.exp()


def loaded_cosines(where, folder):
    return cosines(declip.load(where, device="cpu"), folder)


@pytest.fixture(scope="module")
def run(folder):
    return fitted(folder, folder / "run")


@pytest.fixture(scope="module")
def model(run):
    """The model of `run`, which no test changes."""
    return declip.load(run.folder, device="cpu")


@pytest.fixture(scope="module")
def similarities(model, folder):
    """The cosines of `run`, times its logit scale."""
    return cosines(model, folder)


def pooled(model, folder, precision=torch.float32):
    """Features of all images and captions as a fit computes them."""
    images, captions = read_pairs(folder)
    preprocessor = model.preprocessor
    resized = torch.stack([preprocessor.fast(image) for image in images])
    tower = pooling_tower(model, precision)
    with torch.no_grad():
        features = tower.pool(preprocessor.normalize(resized).to(precision)).float()
        texts = model.text_tower.pool(model.tokenize(captions))
    return Pairs(features, texts, torch.arange(COUNT).repeat_interleave(2))


def test_heads_are_those_of_every_caption_of_all_pairs(run, model, similarities, folder):
    pairs = pooled(model, folder)
    exact = [image.decoded() for image in read_pairs(folder)[0]]
    with torch.no_grad():
        images = model.image_tower.pool(model.preprocess(exact))
    known = run.cross_validation
    heads = fit_heads(pairs, None, 0.0, Form(known["method"], known["ridge"]))
    expected = heads.similarities(images.double(), pairs.texts.double()).float()
    torch.testing.assert_close(similarities, expected * known["logit_scale"], rtol=0, atol=1e-3)
    counts = {"pairs": COUNT, "captions": 2 * COUNT, "classes": 0, "candidates": 8}
    assert {name: known[name] for name in counts} == counts


def test_a_fit_is_two_matrices_its_measures_and_an_export_that_stands_alone(
    run, similarities, folder, tmp_path
):
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
    torch.testing.assert_close(loaded_cosines(moved, folder), similarities, rtol=0, atol=1e-5)
    # --- the page and the table of captions
    page = run.report.read_text(encoding="utf-8")
    assert f"fitted to {start_of(folder)}" in page
    percentile, recall = run.cross_validation["percentile"]["value"], run.cross_validation["recall"]
    assert f"better than {percent(percentile).replace(' ', NBSP)} of the others" in page
    assert list(recall) == ["1"], "10 is more than a fifth of 8"
    assert recall["1"]["chance"] == 1 / 8
    assert all(fitted_lines(run)), "no empty line"
    place = round(100 - 99 * percentile)
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


def test_a_base_that_is_gone_or_another_one_is_named(similarities, folder, tmp_path):
    base = tmp_path / "vit.safetensors"
    shutil.copy(folder / "vit.safetensors", base)
    run = fitted(folder, tmp_path / "run", start=start_of(folder, base))
    base.rename(tmp_path / "away.safetensors")
    refuses(
        ("was fitted to 'timm:test_vit/", "exported/safetensors"), declip.load, run.folder, "cpu"
    )
    other = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file(other, base)
    refuses("of fingerprint .* but that is now", declip.load, run.folder, "cpu")
    (tmp_path / "away.safetensors").rename(base)
    elsewhere = run.folder.rename(tmp_path / "elsewhere")
    assert torch.equal(loaded_cosines(elsewhere, folder), similarities)


def test_the_card_of_a_fit_states_no_steps_and_its_cross_validation(run):
    page = (run.folder / "exported/safetensors/README.md").read_text(encoding="utf-8")
    card, _, end = page.partition("<details>")
    assert f"{COUNT} pairs" in card
    assert not any(words in card for words in ("peak learning rate", "steps of", "pairs seen"))
    known = run.cross_validation["percentile"]
    numbers = f"better than {percent(known['value'])} of the others ({percent(known['low'])} to"
    assert numbers in end
    assert f"n = {2 * COUNT}" in end
    assert "No results" not in end


def test_another_order_of_pairs_changes_nothing(run, similarities, folder, tmp_path):
    other = fitted(folder, tmp_path / "run", "reversed.csv")
    assert other.cross_validation["ridge"] == run.cross_validation["ridge"]
    found = loaded_cosines(other.folder, folder)
    torch.testing.assert_close(found, similarities, rtol=0, atol=1e-3)


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
    def export(record, target):
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
    run = fitted(folder, tmp_path / "run", "views.csv")
    grouped = fitted(folder, tmp_path / "grouped", "views.csv", **GROUPED)
    assert run.cross_validation["leaking"] == "product"
    assert grouped.cross_validation["leaking"] is None
    lines = fitted_lines(run)
    warned = [line for line in lines if "data.columns.group=product" in line]
    percentile = [line for line in lines if "fits its image better than" in line]
    assert warned
    assert warned == percentile, "at the number that is too high"
    assert "data.columns.group" not in " ".join(fitted_lines(grouped))


def test_copies_of_an_image_are_left_out_together(folder, tmp_path):
    # Captions without meaning, on two copies of each image: only the copy could tell which caption is right.
    rng, rows = np.random.default_rng(0), ["image,caption,product"]
    for number in range(30):
        caption = " ".join(rng.choice([*"abcdefghijklmnopqrstuvwxyz", *COLORS], 4))
        for copy, side in enumerate((96, 48)):
            name = tmp_path / f"{number}-{copy}.png"
            texture(500 + number, 96).resize((side, side)).save(name)
            rows.append(f"{name},{caption},P{number}")
    (tmp_path / "copies.csv").write_text("\n".join(rows) + "\n")
    known = fitted(folder, tmp_path / "run", tmp_path / "copies.csv").cross_validation
    assert (known["pairs"], known["groups"]) == (60, 30)
    assert known["percentile"]["low"] < 0.5 < known["percentile"]["high"]
    assert known["leaking"] is None, "copies share a product, and are left out together already"


@pytest.mark.parametrize("key", ["train.lr", "loss_weights.multi_view"])
def test_keys_without_effect_are_refused(key, folder, tmp_path):
    refuses((f"{key}=0.1", "--freeze none"), fitted, folder, tmp_path / "run", **{key: 0.1})
    assert not (tmp_path / "run").exists()


def test_the_classes_of_the_start_are_pairs_too(classifier, folder, tmp_path):
    known = fitted(folder, tmp_path / "run", **classifier).cross_validation
    assert known["classes"] == len(COLORS)
    assert known["better"] == (known["gain"]["low"] > 0)
    gain = known["percentile"]["value"] - known["percentile_of_start"]["value"]
    assert known["gain"]["value"] == pytest.approx(gain)
    chosen = {**known, "method": "ridge"}
    printed = " ".join(fitted_lines(SimpleNamespace(cross_validation=chosen, mixture={})))
    assert "without any fitting" in printed
    assert points(known["gain"]["value"]) in printed
    model = declip.load(tmp_path / "run", "cpu")
    projection = model.image_tower.proj
    assert projection.classes.shape == (len(COLORS), model.image_tower.pre_logits_width)
    further = declip.finetune(
        folder / "pairs.csv", tmp_path / "run", TRAINED, tmp_path / "all", freeze="none"
    )
    trained = declip.load(further.folder, "cpu").image_tower.proj
    assert trained.axes.shape == projection.axes.shape
    assert torch.equal(trained.anchors, projection.anchors)
    unnamed = {"start": classifier["start"], "finetune.class_pairs": False}
    assert fitted(folder, tmp_path / "without", **unnamed).cross_validation["classes"] == 0


def test_heads_with_neighbors_are_compared_with_the_start_which_stays_otherwise(
    classifier, folder, tmp_path, monkeypatch
):
    seen, known = [], {}
    for better in (True, False):
        compare = lambda outcome, *_, better=better: seen.append(outcome) or better  # noqa: E731
        monkeypatch.setattr("declip.closed_form.choice.beats", compare)
        run = fitted(folder, tmp_path / str(better), **classifier)
        known[better] = run.cross_validation
    assert (known[True]["method"], known[True]["neighbors"]) == ("ridge", [0.5, 0.5])
    assert (known[False]["method"], known[False]["neighbors"]) == ("start", [1.0, 0.0])
    assert len(seen) == 3, "with neighbors, and then the start with neighbors"
    assert float(seen[0].percentiles().mean()) == pytest.approx(known[True]["percentile"]["value"])
    assert known[False]["percentile"] == known[True]["percentile_of_start"]


def first_lines(folder, count, name):
    """Write a table of the first lines of the pairs."""
    lines = (folder / "pairs.csv").read_text().splitlines()[: 1 + count]
    (folder / name).write_text("\n".join(lines) + "\n")


def test_a_saved_model_computes_posteriors_as_the_heads_that_were_fitted(
    classifier, folder, tmp_path
):
    # Pairs that are too few for a choice, so that the form and the weight of the classes are known
    first_lines(folder, 20, "ten.csv")
    run = fitted(folder, tmp_path / "run", "ten.csv", **classifier)
    model = declip.load(run.folder, "cpu")
    pairs = pooled(model, folder)
    with torch.no_grad():
        texts = model.text_tower.pool(model.tokenize(list(COLORS)))
    few = Pairs(pairs.images[:10], pairs.texts[:20], pairs.owners[:20])
    rows = load_file(folder / "classes.safetensors")["head.weight"]
    classes = ClassPairs(rows, texts, torch.arange(4), torch.zeros(rows.shape[1]))
    heads = fit_heads(few, classes, 1.0, DEFAULT_FORM)
    heads = heads._replace(neighbors=known_pairs(few, classes))  # all their dimensions
    expected = heads.similarities(pairs.images.double(), pairs.texts.double()).float()
    known = run.cross_validation
    assert known["neighbors"] == [0.5, 0.5]
    assert (known["method"], known["class_weight"], known["pairs"]) == ("ridge", 1.0, 10)
    found = cosines(model, folder) / known["logit_scale"]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    # --- what the anchors are
    keys = [open_source(folder / "ten.csv")[index].key for index in range(10)]
    assert [key for key, _ in run.known] == [*keys, "", "", "", ""]
    assert [caption for _, caption in run.known[10:]] == list(COLORS)
    captions = model.text_tower.text_projection.side
    of_first = captions.nearest(pairs.texts[0:20:2], 2)[1]
    assert [row in near for row, near in enumerate(of_first.tolist())] == [True] * 10
    assert run.known[3][1] == open_source(folder / "ten.csv")[3].captions()[0]


def test_features_are_computed_in_the_precision_of_the_recipe(model, folder, tmp_path):
    run = fitted(folder, tmp_path / "run", **{"train.precision": "bf16"})
    known = run.cross_validation
    found = loaded_cosines(run.folder, folder) / known["logit_scale"]
    exact, rounded = pooled(model, folder), pooled(model, folder, torch.bfloat16)
    differences = []
    for pairs in (rounded, exact):
        heads = fit_heads(pairs, None, 0.0, Form(known["method"], known["ridge"]))
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
    kept = folder / "pairs.csv"
    head, *rows = kept.read_text().splitlines()
    images, captions = zip(*(row.split(",", 1) for row in rows), strict=True)
    others = map(",".join, zip(images, captions[::-1], strict=True))
    (folder / "others.csv").write_text("\n".join([head, *others]) + "\n")
    options = {"freeze": "both", "keep": kept, "progress": False}
    mixed = declip.finetune(folder / "others.csv", run.folder, None, tmp_path / "a", **options)
    scores = {float(alpha): found for alpha, found in mixed.mixture["scores"].items()}
    sums = {alpha: sum(found.values()) for alpha, found in scores.items()}
    alpha = mixed.mixture["alpha"]
    assert alpha == max(alpha for alpha in sums if sums[alpha] == max(sums.values())) < 1
    assert scores[alpha][str(kept)] > scores[1][str(kept)]
    # --- the run, its export and its results are the mixture's
    (before,), (after,) = mixed.results_of_start, mixed.results
    truth = declip.evaluate(mixed.folder, str(kept), "retrieval", device="cpu")
    assert after.headline.value == truth.headline.value
    assert before.headline.value >= after.headline.value > scores[1][str(kept)]
    exported = loaded_cosines(mixed.folder / "exported" / "safetensors", folder)
    torch.testing.assert_close(exported, loaded_cosines(mixed.folder, folder), rtol=0, atol=1e-5)
    assert f"{alpha:g} × fine-tuned" in mixed.report.read_text(encoding="utf-8")
    card = (mixed.folder / "exported/safetensors/README.md").read_text(encoding="utf-8")
    assert f"text → image R@1 | {percent(after.text_to_image.r1)} |" in card


def test_a_gain_whose_interval_contains_0_is_not_called_better(folder, tmp_path):
    head, *rows = (folder / "pairs.csv").read_text().splitlines()
    captions = [row.partition(",")[2] for row in rows]
    # Captions of other images; by chance some fit
    order = np.random.default_rng(7).permutation(COUNT).repeat(2)
    table = [
        f"{folder / f'{image}.png'},{caption}"
        for image, caption in zip(order, captions, strict=True)
    ]
    (tmp_path / "shuffled.csv").write_text("\n".join([head, *table]) + "\n")
    run = fitted(folder, tmp_path / "run", tmp_path / "shuffled.csv")
    gain = run.cross_validation["gain"]
    assert gain["low"] < 0 < gain["value"]
    assert not run.cross_validation["better"]
    assert "Too few pairs to tell" in " ".join(fitted_lines(run))
    page = run.report.read_text()
    assert "<code>declip app … --caption</code>" in page
    assert "`" not in page


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


def test_two_processes_are_one(similarities, folder, tmp_path):
    ends = in_processes(fitted_here, 2, tmp_path / "meet", folder, tmp_path / "run")
    assert ends == [(True, True), (True, False)]
    found = loaded_cosines(tmp_path / "run", folder)
    torch.testing.assert_close(found, similarities, rtol=0, atol=1e-5)


def words_of(folder, table, out, **keys):
    """The words of the command."""
    given = (f"{key}={value}" for key, value in keys_of(**keys).items())
    return ["finetune", folder / table, "--from", start_of(folder), "--out", out, "--quiet", *given]


def test_one_pair_is_fitted_without_a_validation_part(folder, tmp_path, command):
    first_lines(folder, 1, "single.csv")
    printed = command(*words_of(folder, "single.csv", tmp_path / "run"))
    assert printed.status == 0
    parts = ("1 pair", "--val", "needs 20 different pairs; there is 1: nothing was measured")
    assert all(part in printed.out for part in parts)
    run = FittedRun(tmp_path / "run")
    assert (run.results, run.cross_validation["pairs"]) == ([], 1)
    assert loaded_cosines(tmp_path / "run", folder).isfinite().all()


def test_broken_pairs_are_counted_and_refused_and_cut_captions_named(
    folder, tmp_path, command, caplog
):
    head, *rows = (folder / "pairs.csv").read_text().splitlines()
    (folder / "broken.csv").write_text("\n".join([head, *rows, "missing.png,a red circle,"]) + "\n")
    short = {"text.context_length": 5}
    printed = command(*words_of(folder, "broken.csv", tmp_path / "run", **short))
    assert printed.status == 0
    assert "Left out: 1 × missing image, such as missing.png" in printed.out
    assert "longer than 5 tokens" in caplog.text
    run = FittedRun(tmp_path / "run")
    assert (run.skipped["seen"], run.cross_validation["pairs"]) == (COUNT + 1, COUNT)
    few = {"data.max_broken_fraction": 0.01}
    refuses("max_broken_fraction", fitted, folder, tmp_path / "refused", "broken.csv", **few)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("more", ["", "posteriors", "neighbors"])
def test_heads_are_applied_after_the_projections_of_their_start(more, model):
    """The merged model computes what the heads compute from the embeddings of the base."""
    model = deepcopy(model)
    tower, weights = model.image_tower, len(model.image_tower.proj.weight)
    heads = Heads(*torch.randn(2, 8, weights).unbind())
    if more == "posteriors":
        tower.proj = PosteriorProjection(tower.pre_logits_width, 4, weights)
        torch.nn.init.normal_(tower.proj.classes)
    if more == "neighbors":
        add_neighbors(model, 20, weights)
    adapted = Adapted(Base(model, projected=True, name="start"), heads, 7.0)
    images = model.preprocess([texture(0), texture(1)])
    tokens = model.tokenize(["red circle", "blue"])
    merged = adapted.merged()
    with torch.no_grad():
        expected = heads.similarities(model.encode_image(images), model.encode_text(tokens))
        for encoder in (adapted, merged):
            found = encoder.encode_image(images) @ encoder.encode_text(tokens).mT
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert merged.logit_scale.exp().item() == pytest.approx(7)
