"""The command `declip finetune`, and the same in Python."""

import subprocess
import sys
from pathlib import Path
from statistics import fmean
from unittest.mock import Mock

import numpy as np
import pytest

import declip
from conftest import TINY, once, refuses, texture, tiny_tree, write_table
from declip.data.columns import Columns
from declip.data.sources.open import open_source
from declip.data.sources.pair_list import PairList, read_pair_list, write_pair_list
from declip.finetuning import outputs
from declip.finetuning.request import Request
from declip.finetuning.run import Start, training_recipe
from declip.finetuning.wise_ft import ends_of, interpolate
from declip.interchange import starter
from declip.interchange.declip_file import write_declip_file
from declip.recipe.finetuning import fits_closed_form as closed_form
from declip.recipe.finetuning import settings
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.reports.run import write_report
from declip.runs.folder import SPLIT, read_run
from interchange.towers import build
from training.starts import moved, quiet_train, same_end, stop_at
from training.test_best import best_step

PLAIN = {"data.workers": 0, "train.report_to": []}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return once(tmp_path_factory, "textures", draw_textures) / "pairs.csv"


def draw_textures(folder):
    for name, numbers in {"pairs": range(40), "other": range(40, 48)}.items():
        for number in numbers:
            texture(number).save(folder / f"{number}.png")
        rows = [f"{number}.png,texture number {number}" for number in numbers]
        write_table(folder / f"{name}.csv", rows)


@pytest.fixture(scope="module")
def weights(pairs, tmp_path_factory):
    # Which one format alone can hold
    text = {**TINY["text"], "activation": "gelu", "projection_bias": True}
    tree = tiny_tree(pairs, text=text, train={**TINY["train"], "steps": 2})
    recipe = Recipe.model_validate(tree)
    make = lambda folder: quiet_train(recipe, folder / "start")  # noqa: E731
    return once(tmp_path_factory, "weights", make) / "start"


def write_lists(lists):
    for path, listed in lists.items():
        write_pair_list(Path(path), listed)


@pytest.fixture(autouse=True)
def without_outputs(without_exports, monkeypatch):
    monkeypatch.setattr(outputs, "write_report", lambda *_, **__: None)


@pytest.mark.exports
def test_one_line_trains_validates_and_exports(pairs, weights, tmp_path, command, monkeypatch):
    monkeypatch.setattr(outputs, "write_report", write_report)
    out = tmp_path / "run"
    words = ["finetune", pairs, "--from", weights, "--out", out, "--quiet", "train.epochs=2"]
    printed = command(*words, "train.patience=9").out
    parts = ("text → image R@1", "validation loss", str(out / "report.html"))
    assert all(part in printed for part in parts)
    done = read_run(out)
    assert done.recipe.train.steps == 8  # 2 epochs of 4 batches of 8 of the 36 pairs
    assert {row["step"] for row in done.evaluations} == {0, 4, 8}
    assert done.recipe.data.source == str(out / "train.pairs")
    assert done.recipe.evaluation.retrieval == (str(out / "val.pairs"),)
    assert done.best_step == best_step(done.evaluations)
    exported = declip.load(out / "exported/safetensors/declip.safetensors", device="cpu")
    assert not moved(exported.state_dict(), declip.load(out, device="cpu").state_dict())  # type: ignore[attr-defined]
    assert "--resume" in command(*words).err


def test_the_best_mixture_with_the_start_is_kept(pairs, weights, tmp_path, command):
    out, other, shop = tmp_path / "run", pairs.with_name("other.csv"), pairs.with_name("shop.csv")
    shop.write_text(pairs.read_text().replace("image,caption", "Bild,Titel", 1))
    words = ["finetune", shop, "--from", weights, "--val", other, "--keep", shop]
    words += ["--out", out, "--quiet"]
    words += ["data.columns={image: Bild, caption: Titel}", "train.epochs=2", "train.lr=3e-2"]
    words += ["data.workers=0", "train.report_to=[]"]
    printed = command(*words).out
    run = read_run(out)
    scores = {float(alpha): fmean(found.values()) for alpha, found in run.mixture["scores"].items()}
    assert run.mixture["alpha"] == max(scores, key=lambda alpha: (scores[alpha], alpha))
    assert f"{run.mixture['alpha']:g} × fine-tuned" in printed
    # --- the model of the run is that mixture, and its last results are the mixture's
    start, end = ends_of(out, "cpu")
    mixed = interpolate(start, end, run.mixture["alpha"])
    loaded = declip.load(out, device="cpu")
    assert not moved(mixed.state_dict(), loaded.state_dict())  # type: ignore[attr-defined]
    columns = Columns("Bild", "Titel")
    truth = declip.evaluate(loaded, str(shop), "retrieval", columns=columns).to_dict()
    last = {row["dataset"]: row for row in run.results}[str(shop)]
    assert last["image_to_text_r1"] == truth["image_to_text_r1"]
    # --- again: nothing is added
    command(*words, "--resume")
    assert len(read_run(out).evaluations) == len(run.evaluations)


def test_python_uses_the_same_words_and_resumes(pairs, weights, tmp_path):
    keys = {"train.steps": 6, "train.batch_size": 4, "train.evaluate_every": 2, "train.patience": 9}
    keys |= {"data.max_pairs": np.int64(12), **PLAIN}
    options = {"overrides": keys, "val": (), "freeze": "text", "progress": False}
    whole = declip.finetune(pairs, weights, out=tmp_path / "whole", **options)
    assert whole.finished
    assert whole.recipe.finetune.freeze_text_blocks == "all"
    part = tmp_path / "part"
    start = Start(Request.of(pairs, weights, keys, freeze="text"))
    recipe, split = training_recipe(start, part, progress=False)
    assert not part.exists()
    write_lists(split.lists)
    stop_at(recipe, part, 3)
    listed = (part / "val.pairs").read_bytes()
    others = [{"freeze": "none"}, {"val": [pairs]}, {"pairs": "builtin:emoji"}]
    for other in (*others, {"weights": "builtin:lite0-minilm"}):
        given = {"pairs": pairs, "weights": weights, **options, **other, "out": part}
        refuses("not what this run was started with", declip.finetune, resume=True, **given)
    assert declip.finetune(pairs, weights, out=part, resume=True, **options).finished
    assert (part / "val.pairs").read_bytes() == listed
    same_end(tmp_path / "whole", part)


@pytest.mark.exports
def test_a_run_with_adapters_is_exported_in_every_format_that_holds_it(
    pairs, tmp_path, monkeypatch
):
    write_declip_file(build("vit"), tmp_path / "vit.safetensors")
    monkeypatch.setattr("declip.interchange.export.export", written := Mock())
    keys = {"finetune.lora": {"rank": 2}, "train.steps": 2, "train.batch_size": 8, **PLAIN}
    start = tmp_path / "vit.safetensors"
    assert declip.finetune(pairs, start, keys, tmp_path / "run", progress=False).finished
    formats = [call.args[1] for call in written.call_args_list]
    assert formats == ["safetensors", "open_clip", "huggingface"]


def test_a_list_of_pairs_is_split_into_lists_of_its_source(pairs, weights, tmp_path):
    write_pair_list(tmp_path / "some.pairs", PairList(str(pairs), Columns(), 40, [*range(4, 40)]))
    start = Start(Request.of(tmp_path / "some.pairs", weights))
    write_lists(training_recipe(start, tmp_path / "run", progress=False)[1].lists)
    train, val = (read_pair_list(tmp_path / "run" / name) for name in SPLIT)
    assert sorted([*train.indices, *val.indices]) == [*range(4, 40)]
    assert train.source == str(pairs)
    assert len(open_source(tmp_path / "run" / SPLIT[1])) == len(val.indices)


def test_a_running_run_keeps_its_folder(pairs, weights, tmp_path):
    other = (
        "import fcntl, pathlib, sys; f = pathlib.Path(sys.argv[1]); f.mkdir(); l = open(f / '.lock', 'ab')"
        "; fcntl.lockf(l, fcntl.LOCK_EX); (f / 'train.pairs').touch(); print('locked', flush=True); input()"
    )
    words = [sys.executable, "-c", other, tmp_path / "run"]
    with subprocess.Popen(words, stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        refuses("in use", declip.finetune, pairs, weights, out=tmp_path / "run", progress=False)
        process.communicate(b"\n")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "train.pairs"]


def test_a_refused_run_removes_only_its_own_files(pairs, weights, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".notes").touch()
    refuses("--val", declip.finetune, pairs, weights, out=run, val=[pairs], progress=False)
    assert {path.name for path in run.iterdir()} - {".lock"} == {".notes"}


def test_pairs_of_the_start_are_not_validated_on(pairs, weights, tmp_path):
    rows = pairs.read_text().splitlines()[1:]
    table = write_table(pairs.with_name("fewer.csv"), rows[:30])
    keys = {**PLAIN, "train.steps": 1, "train.batch_size": 8}
    first = declip.finetune(table, weights, keys, tmp_path / "first", progress=False)
    # the same images with other captions, so that their hashes change
    renamed = write_table(pairs.with_name("renamed.csv"), [f"{row} again" for row in rows])
    start = Start(Request.of(renamed, first.folder))
    write_lists(training_recipe(start, tmp_path / "second", progress=False)[1].lists)
    trained = {rows[index] for index in read_pair_list(tmp_path / "first" / "train.pairs").indices}
    validated = {rows[index] for index in read_pair_list(tmp_path / "second" / "val.pairs").indices}
    assert len(validated) >= 2
    assert not trained & validated


def test_without_weights_three_ways_are_named(pairs, tmp_path, monkeypatch, command):
    monkeypatch.setattr(starter, "installed", lambda: False)
    error = command("finetune", pairs, "--out", tmp_path / "run").err
    assert all(word in error for word in ("builtin:lite2-minilm", "open_clip:", "a file"))


def test_the_table_of_settings():
    for count, size in {1: 2, 3: 3, 20: 8, 200: 16, 5_000: 128}.items():
        assert settings(count, "whole", on_cpu=True)["train.batch_size"] == size
    closed = {("heads", None, True), ("heads", "both", False)}
    trained = {("heads", None, False), ("heads", "image", True), ("whole", None, True)}
    for kind, frozen, on_cpu in closed | trained:
        recipe = load_recipe("finetune", settings(200, kind, on_cpu, frozen, None, False))
        assert closed_form(recipe.finetune) == ((kind, frozen, on_cpu) in closed)
    lora = {"finetune.lora": {"rank": 2}, "train.patience": None}
    adapters = load_recipe("finetune", settings(200, "heads", on_cpu=True, given=lora))
    assert adapters.finetune.freeze_image_blocks == 0
    assert adapters.finetune.layer_decay == 1.0
    assert adapters.train.lr == 0.001
    keys = {"train.steps": 40, "train.batch_size": 10, "train.lr": 1.0}
    given = settings(1_000, "whole", on_cpu=False, given=keys)
    assert "train.epochs" not in given
    expected = {"evaluate_every": 40, "warmup_steps": 4, "warmup_lr": 0.01}
    assert {name: given[f"train.{name}"] for name in expected} == expected


def test_python_objects_are_split_and_validated_on(pairs, tmp_path):
    weights = declip.export(build("conv"), "safetensors", tmp_path / "start").folder
    rows = [line.split(",") for line in pairs.read_text().splitlines()[1:]]
    items = [(str(pairs.parent / name), caption) for name, caption in rows]
    keys = {**PLAIN, "train.steps": 1, "train.batch_size": 8}
    given, out = {"weights": weights, "overrides": keys, "progress": False}, tmp_path / "split"
    split = declip.finetune(items, out=out, **given)
    assert declip.finetune(items, out=out, resume=True, **given).finished
    refuses(["python:list(40)", "data=object"], open_source, out / "train.pairs")
    assert split.finished
    assert split.last()[0].result.images > 0  # type: ignore[union-attr]
    held_out = declip.finetune(items[:30], out=tmp_path / "val", val=items[30:], **given)
    assert [row.result.images for row in held_out.last()] == [10]  # type: ignore[union-attr]
