"""Fine-tuning of projections between frozen towers in closed form."""

import json
import os
import shutil
import signal
from collections import Counter
from copy import deepcopy
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import declip
from conftest import in_processes, refuses, texture
from declip.closed_form.heads import Choice
from declip.closed_form.solve import DEFAULT_FORM, ClassPairs, Form, Heads, Pairs, fit_heads
from declip.data.sources.open import open_source
from declip.data.sources.subset import Subset
from declip.finetuning import outputs
from declip.finetuning.features import projections
from declip.finetuning.fit import fit, set_heads
from declip.finetuning.request import Request
from declip.finetuning.run import finetune_recipe
from declip.io.text import percent
from declip.models.precision import pooling_tower
from declip.reports.page import NBSP, points
from declip.reports.run import fitted_lines, write_report
from declip.runs.folder import CROSS_VALIDATION, KEPT, read_run
from text_encoders import bert
from training.starts import last, moved

pytest.importorskip("transformers")

COUNT = 40
WRITE = outputs.write_finetuned
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
    for name, column, some in (("pairs", "part", rows), ("reversed", "part", rows[::-1]), ("split", "split", rows)):
        (folder / f"{name}.csv").write_text("\n".join([f"image,caption,{column}", *some]) + "\n")
    return folder


def keys_of(folder, **keys):
    sizes = {"image.size": 32, "text.context_length": 24, "embed_dim": 64, "train.precision": "fp32"}
    return {"text.hf_model": str(folder / "bert"), **sizes, "train.report_to": [], **keys}


def asked(folder):
    start = f"timm:test_vit/{folder / 'vit.safetensors'}"
    return Request.of(folder / "pairs.csv", start, keys_of(folder), freeze="both")


def fitted(folder, out, table="pairs.csv", resume=False, **keys):
    """Fine-tune as the command does."""
    start = f"timm:test_vit/{folder / 'vit.safetensors'}"
    return declip.finetune(folder / table, start, keys_of(folder, **keys), out, resume, quiet=True, freeze="both")


def cosines(where, folder):
    """Similarities of all images and captions, and the logit scale."""
    model = declip.load(where, device="cpu")
    source = open_source(folder / "pairs.csv")
    captions = [caption for index in range(len(source)) for caption in source.captions(index)]
    with torch.no_grad():
        images = model.encode_image(model.preprocess([source[index].image for index in range(len(source))]))
        return images @ model.encode_text(model.tokenize(captions)).mT * model.logit_scale.exp()


@pytest.fixture(scope="module")
def run(folder):
    return fitted(folder, folder / "run")


@pytest.fixture(autouse=True)
def without_exports(monkeypatch):
    """Leave out the report and the exports, which take longer than a fit; `run`, of a wider scope, has them."""
    monkeypatch.setattr("declip.finetuning.outputs.write_finetuned", lambda *_: None)


def test_heads_are_those_of_every_caption_of_all_pairs(run, folder):
    model = declip.load(run.folder, device="cpu")
    source = open_source(folder / "pairs.csv")
    captions = [source.captions(index) for index in range(COUNT)]
    of = model.preprocessor
    with torch.no_grad():
        images = model.image_tower.pool(of([source.image(index) for index in range(COUNT)]))
        resized = of.normalize(torch.stack([of.fast(source.lazy_image(index)) for index in range(COUNT)]))
        seen = model.image_tower.pool(resized)
        texts = model.text_tower.pool(model.tokenize([each for pair in captions for each in pair]))
    known = run.cross_validation
    pairs = Pairs(seen, texts, torch.arange(COUNT).repeat_interleave(2))
    (heads,) = fit_heads(pairs, None, 0.0, (Form(known["method"], known["ridge"]),))
    expected = heads.similarities(images.double(), texts.double()).float() * known["logit_scale"]
    torch.testing.assert_close(cosines(run.folder, folder), expected, rtol=0, atol=1e-3)
    assert (known["pairs"], known["captions"], known["classes"], known["candidates"]) == (COUNT, 2 * COUNT, 0, 8)


def test_the_run_is_a_normal_run_with_one_checkpoint_and_no_copy_of_the_start(run, folder):
    assert run.finished
    assert [path.name for path in (run.folder / "checkpoints").glob("step-*")] == ["step-00000001"]
    assert not (run.folder / KEPT).exists()
    exported = cosines(run.folder / "exported" / "safetensors", folder)
    torch.testing.assert_close(exported, cosines(run.folder, folder), rtol=0, atol=1e-5)
    page = run.report.read_text(encoding="utf-8")
    known = run.cross_validation
    assert f"better than {percent(known['percentile']['value']).replace(' ', NBSP)} of the others" in page
    assert (list(known["recall"]), known["recall"]["1"]["chance"]) == (["1"], 1 / 8)  # 10 is more than a fifth of 8
    worst = run.examples["worst"]
    assert page.count('src="data:image/webp') == len({row["key"] for row in worst}) == len(worst) == 16
    assert min(row["rank"] for row in worst) > 0, "a caption that is first is not among the worst"
    ranks = list(run.caption_ranks.values())
    assert len(ranks) == 2 * COUNT
    assert ranks == sorted(ranks, reverse=True)
    assert 0 <= ranks[-1] < ranks[0] <= 1


def test_the_card_of_a_fit_states_no_steps_and_its_cross_validation(run):
    card, _, end = (run.folder / "exported/safetensors/README.md").read_text(encoding="utf-8").partition("<details>")
    assert f"{COUNT} pairs" in card
    assert [words for words in ("peak learning rate", "steps of", "pairs seen") if words in card] == []
    known = run.cross_validation["percentile"]
    numbers = f"better than {percent(known['value'])} of the others ({percent(known['low'])} to"
    assert (numbers in end, f"n = {2 * COUNT}" in end, "No results" in end) == (True, True, False)


def test_a_start_of_two_towers_by_one_name_and_another_order_of_pairs_change_nothing(run, folder, tmp_path):
    where = f"timm:test_vit/{folder / 'vit.safetensors'}+{folder / 'bert'}"
    keys = {"image.size": 32, "train.precision": "fp32"}
    named = declip.finetune(folder / "pairs.csv", where, keys, tmp_path / "named", quiet=True)
    for other in (named, fitted(folder, tmp_path / "run", "reversed.csv")):
        assert other.cross_validation["ridge"] == run.cross_validation["ridge"]
        torch.testing.assert_close(cosines(other.folder, folder), cosines(run.folder, folder), rtol=0, atol=1e-3)


def test_a_finished_run_stays_and_a_killed_one_is_fitted_again(run, folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy, symlinks=True)
    written = (copy / CROSS_VALIDATION).stat().st_mtime_ns
    assert fitted(folder, copy, resume=True).finished
    assert (copy / CROSS_VALIDATION).stat().st_mtime_ns == written
    shutil.rmtree(copy / "checkpoints")
    assert fitted(folder, copy, resume=True).finished
    assert torch.equal(cosines(copy, folder), cosines(run.folder, folder))


def test_each_image_is_read_once_after_the_check(folder, tmp_path):
    reads = Counter()

    class Counted(Subset):
        def read_lazy(self, index):
            reads[index] += 1
            return super().read_lazy(index)

    start = f"timm:test_vit/{folder / 'vit.safetensors'}"
    pairs = Counted(open_source(folder / "pairs.csv"), np.arange(COUNT))
    run = declip.finetune(pairs, start, keys_of(folder), tmp_path / "run", freeze="both", quiet=True)
    shown = {row["key"] for row in run.examples["worst"]}
    assert reads.total() == COUNT + COUNT + len(shown)


def killed_while_it_exports(folder, recipe):
    def export(model, format, out, overwrite):
        out.mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGKILL)

    outputs.export, outputs.write_finetuned = export, WRITE
    fit(recipe, folder, False, True)


def test_a_run_that_was_killed_while_it_exported_is_not_finished(folder, tmp_path, monkeypatch):
    recipe, *_ = finetune_recipe(asked(folder), tmp_path / "x", True)
    process = get_context("fork").Process(target=killed_while_it_exports, args=(tmp_path / "run", recipe))
    process.start()
    process.join()
    assert (process.exitcode, (tmp_path / "run" / "exported").exists()) == (-signal.SIGKILL, True)
    finished = []
    monkeypatch.setattr("declip.finetuning.outputs.write_finetuned", lambda *_: finished.append(1))
    fit(recipe, tmp_path / "run", True, True)
    assert finished == [1]


def test_a_split_column_decides_what_is_validated_on(folder, tmp_path):
    run = fitted(folder, tmp_path / "run", "split.csv")
    assert run.cross_validation["pairs"] == COUNT // 2
    assert [row.result.images for row in read_run(run.folder).last()] == [COUNT // 4]


def test_views_of_one_object_are_named_where_they_are_not_left_out_together(folder, tmp_path):
    rows = ["image,caption,product,kind"]
    for number in range(COUNT):
        first, second = texture(number // 2), texture(100 + number)
        Image.blend(first, second, 0.3).save(tmp_path / f"{number}.png")
        rows.append(f"{tmp_path / f'{number}.png'},text {number},P{number // 2},{number // 4 % 2}")
    (folder / "views.csv").write_text("\n".join(rows) + "\n")
    runs = [fitted(folder, tmp_path / f"run{len(key)}", "views.csv", **key) for key in ({}, GROUPED)]
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
    save_file(timm.create_model("test_vit", num_classes=4).state_dict(), tmp_path / "vit.safetensors")
    (tmp_path / "names.txt").write_text("\n".join(COLORS))
    options, keys = {"freeze": "both", "quiet": True}, keys_of(folder)
    names = {"finetune.class_names": str(tmp_path / "names.txt")}
    start = f"timm:test_vit/{tmp_path / 'vit.safetensors'}"
    known = declip.finetune(folder / "pairs.csv", start, keys | names, tmp_path / "run", **options).cross_validation
    assert (known["classes"], known["better"]) == (4, known["gain"]["low"] > 0)
    assert known["gain"]["value"] == pytest.approx(known["percentile"]["value"] - known["percentile_of_start"]["value"])
    printed = " ".join(fitted_lines(SimpleNamespace(cross_validation={**known, "method": "ridge"}, mixture={})))
    assert ("without any fitting" in printed, points(known["gain"]["value"]) in printed) == (True, True)
    model = declip.load(tmp_path / "run", "cpu")
    assert model.image_tower.proj.classes.shape == (4, model.image_tower.pre_logits_width)
    further = declip.finetune(folder / "pairs.csv", tmp_path / "run", TRAINED, tmp_path / "all", freeze="none")
    assert declip.load(further.folder, "cpu").image_tower.proj.weight.shape == model.image_tower.proj.weight.shape
    keys["finetune.class_pairs"] = False
    run = declip.finetune(folder / "pairs.csv", start, keys, tmp_path / "without", **options)
    assert run.cross_validation["classes"] == 0


def pooled(where, folder, precision=torch.float32):
    """Features of all images and captions as a fit computes them, by the towers of a run."""
    model = declip.load(where, device="cpu")
    source = open_source(folder / "pairs.csv")
    captions = [caption for index in range(COUNT) for caption in source.captions(index)]
    preprocessor = model.preprocessor
    resized = torch.stack([preprocessor.fast(source.lazy_image(index)) for index in range(COUNT)])
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
    (folder / "ten.csv").write_text("\n".join((folder / "pairs.csv").read_text().splitlines()[:21]) + "\n")
    start, names = f"timm:test_vit/{tmp_path / 'vit.safetensors'}", {"finetune.class_names": tmp_path / "names.txt"}
    run = declip.finetune(folder / "ten.csv", start, keys_of(folder, **names), tmp_path / "run", freeze="both")
    pairs, texts = pooled(run.folder, folder)
    few = Pairs(pairs.images[:10], pairs.texts[:20], pairs.owners[:20])
    rows = tower["head.weight"]
    classes = ClassPairs(rows, texts, torch.arange(4), torch.zeros(rows.shape[1]))
    (heads,) = fit_heads(few, classes, 1.0, (DEFAULT_FORM,))
    expected = heads.similarities(pairs.images.double(), pairs.texts.double()).float()
    known = run.cross_validation
    assert (known["method"], known["class_weight"], known["pairs"]) == ("ridge", 1.0, 10)
    torch.testing.assert_close(cosines(run.folder, folder) / known["logit_scale"], expected, rtol=0, atol=2e-3)


def test_features_are_computed_in_the_precision_of_the_recipe(run, folder, tmp_path):
    rounded = fitted(folder, tmp_path / "run", **{"train.precision": "bf16"})
    known = rounded.cross_validation
    found = cosines(rounded.folder, folder) / known["logit_scale"]
    exact, _ = pooled(run.folder, folder)
    form = Form(known["method"], known["ridge"])
    differences = []
    for precision in (torch.bfloat16, torch.float32):
        pairs, _ = pooled(run.folder, folder, precision)
        (heads,) = fit_heads(pairs, None, 0.0, (form,))
        expected = heads.similarities(exact.images.double(), exact.texts.double())
        differences.append(float((found - expected).abs().mean()))
    assert differences[0] < 0.2 * differences[1]


def test_the_mixture_with_the_start_is_chosen_on_left_out_and_kept_pairs(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("declip.finetuning.outputs.write_finetuned", WRITE)
    monkeypatch.setattr("declip.closed_form.heads.START_CAUTION", -9.0)  # another candidate than the start
    monkeypatch.setattr("declip.closed_form.heads.beats", lambda *_: True)
    rows = (folder / "pairs.csv").read_text().splitlines()
    words = [row.split(",", 1)[1] for row in rows[1:]]
    others = [f"{row.split(',')[0]},{word}" for row, word in zip(rows[1:], words[::-1], strict=True)]
    (folder / "others.csv").write_text("\n".join([rows[0], *others]) + "\n")
    kept = folder / "pairs.csv"
    mixed = declip.finetune(
        folder / "others.csv", run.folder, None, tmp_path / "a", freeze="both", keep=kept, quiet=True
    )
    scores = {float(alpha): found for alpha, found in mixed.mixture["scores"].items()}
    assert mixed.mixture["alpha"] == max(scores, key=lambda alpha: (sum(scores[alpha].values()), alpha)) < 1
    assert scores[mixed.mixture["alpha"]][str(kept)] > scores[1][str(kept)]
    # --- the run, its export and its results are the mixture's
    (before, after) = (row.result for row in mixed.evaluated)
    truth = declip.evaluate(mixed.folder, str(kept), "retrieval", device="cpu")
    assert after.headline.value == truth.headline.value
    assert before.headline.value >= after.headline.value > scores[1][str(kept)]
    exported = cosines(mixed.folder / "exported" / "safetensors", folder)
    torch.testing.assert_close(exported, cosines(mixed.folder, folder), rtol=0, atol=1e-5)
    page = mixed.report.read_text(encoding="utf-8")
    assert f"{mixed.mixture['alpha']:g} × fine-tuned" in page


MEASURED = {"pairs": 31, "captions": 31, "classes": 9, "method": "ridge", "ridge": 1.0, "class_weight": 0.0}
NO_CURVE = {"pairs": [], "measured": []}
PERCENTILE = {"value": 0.75, "low": 0.6, "high": 0.9}
VERDICTS = [
    ((0.02, 0.01, 0.03), "is better: +2.0", None),
    ((0.02, -0.01, 0.05), "Too few pairs to tell whether fine-tuning is better: +2.0 points (95 %: −1.0", "39 more"),
    ((0.001, -0.03, 0.032), "Too few pairs to tell whether fine-tuning is better: +0.10", "more than ten times"),
    ((0.001, -0.003, 0.005), "is no better: +0.10", None),
    ((-0.02, -0.05, 0.01), "is no better: −2.0", None),
]


@pytest.mark.parametrize(("gain", "verdict", "advice"), VERDICTS)
def test_the_interval_of_the_gain_decides_what_is_said(gain, verdict, advice):
    interval = dict(zip(("value", "low", "high"), gain, strict=True))
    known = {**MEASURED, "percentile": PERCENTILE, "recall": {}, "leaking": None, "growth": NO_CURVE, "gain": interval}
    for start in ({"percentile_of_start": PERCENTILE}, {}):
        run = SimpleNamespace(cross_validation={**known, **start}, mixture={})
        printed = " ".join(fitted_lines(run))
        assert (verdict in printed) == bool(start)
        assert ("better than chance" in printed) == (not start and gain[1] < 0)
        assert ("declip choose" in printed) == bool(advice)
        assert advice is None or advice in printed


def test_a_gain_whose_interval_contains_0_is_not_called_better(folder, tmp_path):
    rows = [row.split(",", 1) for row in (folder / "pairs.csv").read_text().splitlines()]
    order = np.random.default_rng(7).permutation(COUNT)  # captions of other images; by chance some fit
    images = [rows[1 + 2 * image][0] for image in order.repeat(2)]
    table = [f"{folder / image},{caption}" for image, (_, caption) in zip(images, rows[1:], strict=True)]
    (tmp_path / "shuffled.csv").write_text("\n".join([",".join(rows[0]), *table]) + "\n")
    run = fitted(folder, tmp_path / "run", tmp_path / "shuffled.csv")
    gain = run.cross_validation["gain"]
    assert gain["low"] < 0 < gain["value"]
    assert not run.cross_validation["better"]
    assert "Too few pairs to tell" in " ".join(fitted_lines(run))


def test_a_start_that_stays_is_said_in_plain_words():
    known = {**MEASURED, "method": "start", "percentile": PERCENTILE, "recall": {}, "leaking": None, "growth": NO_CURVE}
    known["gain"] = {"value": 0.0, "low": 0.0, "high": 0.0}
    printed = " ".join(fitted_lines(SimpleNamespace(cross_validation=known, mixture={})))
    assert ("Nothing was changed" in printed, "chance 50" in printed, "no better" in printed) == (True, True, False)


def test_a_set_to_keep_without_images_is_refused_before_the_fit(folder, tmp_path):
    (tmp_path / "kept.csv").write_text("image,caption\nmissing.png,a circle\n")
    given = folder / "pairs.csv", f"timm:test_vit/{folder / 'vit.safetensors'}", keys_of(folder), tmp_path / "run"
    options = {"freeze": "both", "keep": tmp_path / "kept.csv", "quiet": True}
    refuses(("kept.csv", "missing.png"), declip.finetune, *given, **options)
    assert not (tmp_path / "run").exists()


def fitted_here(folder, out):
    """Fit in one of several processes, see `fitted`."""
    recipe, *_ = finetune_recipe(asked(folder), out.with_suffix(".none"), True)
    run = fit(recipe, out, False, True)
    return run.finished, run.is_rank_zero


def test_two_processes_are_one(run, folder, tmp_path):
    assert in_processes(fitted_here, 2, tmp_path / "meet", folder, tmp_path / "run") == [(True, True), (True, False)]
    assert not moved(last(run.folder), last(tmp_path / "run"))


def test_one_pair_is_fitted_without_a_validation_part(folder, tmp_path, command, monkeypatch):
    monkeypatch.setattr("declip.finetuning.outputs.write_finetuned", write_report)
    (folder / "single.csv").write_text("\n".join((folder / "pairs.csv").read_text().splitlines()[:2]) + "\n")
    words = ["finetune", folder / "single.csv", "--from", f"timm:test_vit/{folder / 'vit.safetensors'}", "--freeze"]
    keys = (f"{key}={value}" for key, value in keys_of(folder).items())
    printed = command(*words, "both", "--out", tmp_path / "run", "--quiet", *keys)
    assert printed.status == 0
    assert all(
        part in printed.out
        for part in ("1 pair", "--val", "needs 20 different pairs; there is 1: nothing was measured")
    )
    run = read_run(tmp_path / "run")
    assert (run.recipe.evaluation.retrieval, run.cross_validation["pairs"]) == ((), 1)
    assert bool(cosines(tmp_path / "run", folder).isfinite().all())


def test_broken_pairs_are_counted_and_refused_and_cut_captions_named(folder, tmp_path, command):
    head, *rows = (folder / "pairs.csv").read_text().splitlines()
    (folder / "broken.csv").write_text("\n".join([head, *rows, "missing.png,a red circle,"]) + "\n")
    run = fitted(folder, tmp_path / "run", "broken.csv", **{"text.context_length": 5})
    assert "longer than 5 tokens" in (run.folder / "log.txt").read_text(encoding="utf-8")
    skipped = json.loads((run.folder / "skipped.json").read_text())
    assert (skipped["seen"], run.cross_validation["pairs"]) == (COUNT + 1, COUNT)
    words = ["finetune", folder / "broken.csv", "--from", f"timm:test_vit/{folder / 'vit.safetensors'}", "--freeze"]
    keys = (f"{key}={value}" for key, value in keys_of(folder).items())
    printed = command(*words, "both", "--out", tmp_path / "printed", "--quiet", *keys)
    assert (printed.status, "Left out: 1 × missing image, such as missing.png" in printed.out) == (0, True)
    few = {"data.max_broken_fraction": 0.01}
    refuses("max_broken_fraction", fitted, folder, tmp_path / "refused", "broken.csv", **few)


@pytest.mark.parametrize("posteriors", [False, True])
def test_heads_are_applied_after_the_projections_of_their_start(posteriors, run):
    model, heads = declip.load(run.folder, "cpu"), Heads(*torch.randn(2, 8, 64).unbind())
    tower = model.image_tower
    if posteriors:
        tower.match_projection({"image_tower.proj.classes": torch.empty(4, tower.pre_logits_width)})
    else:
        tower.proj.bias = torch.nn.Parameter(torch.randn(64))  # as of CLIP's ResNets
    images, tokens = model.preprocess([texture(0), texture(1)]), model.tokenize(["red circle", "blue"])
    with torch.no_grad():
        expected = heads.similarities(model.encode_image(images), model.encode_text(tokens))
        onto = deepcopy(projections(model))
        set_heads(model, Choice(heads, Form("pulled", 1.0), 0.0, logit_scale=7.0), onto)
        torch.testing.assert_close(model.encode_image(images) @ model.encode_text(tokens).mT, expected)
    assert model.logit_scale.exp().item() == pytest.approx(7)
