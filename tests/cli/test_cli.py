"""The commands, as a shell starts them, also in a project folder that was moved."""

import gc
import json
import sys
from pathlib import Path

import pytest
import yaml

import declip.__main__
from conftest import refuses, texture, tiny_tree, write_table
from declip.api import train
from declip.evaluation.held_out import HeldOutSets
from declip.recipe.checks import load_for_training
from declip.recipe.resolve import Facts, resolve
from declip.runs.folder import read_rows
from interchange.towers import build


def test_trains_evaluates_and_resumes(table, tmp_path, command, caplog):
    recipe, out, both = tmp_path / "mine.yaml", tmp_path / "run", tmp_path / "both.json"
    recipe.write_text(yaml.safe_dump(tiny_tree("replaced by --data", "declip")))
    words = [
        "train",
        recipe,
        "train.steps=6",
        "--data",
        table,
        "--val",
        table,
        "--out",
        out,
        "--quiet",
    ]
    printed = command(*words).out
    assert "48 samples" in printed
    assert str(out / "report.html") in printed, "a path is not broken into lines"
    assert (out / "report.html").is_file()
    assert command(*words, "--resume").status == 0, "a finished run is shown again"

    evaluate = [
        "evaluate",
        out,
        "--dataset",
        table,
        "--task",
        "retrieval",
        "--batch-size",
        8,
        "--json",
    ]
    assert command(*evaluate, tmp_path / "result.json").status == 0
    assert f"was trained on pairs of '{table}'" in caplog.text
    patience = [
        "train.patience=2",
        "train.evaluate_every=2",
        "--dry-run",
    ]  # which need the sets of --val
    assert command("train", recipe, *patience, "--data", table, "--val", table).status == 0
    result = json.loads((tmp_path / "result.json").read_text())
    last = json.loads((out / "evaluations.jsonl").read_text().splitlines()[-1])
    assert result == {
        "declip": declip.__version__,
        **{key: value for key, value in last.items() if key != "step"},
    }

    other = write_table(
        tmp_path / "other.csv",
        [f"{table.parent}/{color}-bar.png,a {color} bar" for color in ("red", "blue")],
    )
    printed = command(*evaluate, both, "--dataset", other).out
    assert [name for name in ("shapes.jsonl", "other.csv") if name not in printed] == []
    rows = json.loads(both.read_text())
    assert [(row["dataset"], row["images"]) for row in rows] == [(str(table), 24), (str(other), 2)]
    assert rows[0] == result
    caplog.clear()
    assert command("evaluate", out, "--dataset", other, "--task", "retrieval").status == 0
    assert "trained on" not in caplog.text


def test_the_run_folder_has_the_name_of_the_recipe_also_in_python(
    table, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    tree = tiny_tree(table, "clip", name="other", train={"batch_size": 8, "steps": 1})
    Path("mine.yaml").write_text(yaml.safe_dump(tree))
    assert command("train", "mine.yaml", "--quiet").status == 0
    assert [path.name for path in Path("runs").iterdir()] == ["other"]
    refuses("runs/other' already holds a run", train, "mine.yaml")


@pytest.mark.parametrize("name", ["train", "data inspect", "recipes show"])
def test_the_help_shows_no_type_for_flags(name, command):
    printed = command(*name.split(), "--help").out
    assert ("--help" in printed, "<bool>" in printed) == (True, False)


def test_held_out_sets_are_evaluated_by_what_they_have(table, tmp_path):
    both, classes = tmp_path / "both.csv", tmp_path / "classes.csv"
    images = [f"{table.parent}/{color}-bar.png" for color in ("red", "blue", "green", "black")]
    both.write_text(
        "image,caption,label\n"
        + "".join(f"{image},bar {n},{n % 2}\n" for n, image in enumerate(images))
    )
    classes.write_text(
        "image,label\n" + "".join(f"{image},{n % 2}\n" for n, image in enumerate(images))
    )
    loaded = load_for_training(
        "demo-clip", data="a [b]: c.csv", val=list(map(str, (both, classes, table)))
    )
    sets = HeldOutSets(loaded.data).by_task(loaded.evaluation.val)
    recipe = resolve(loaded, Facts(sets=sets))
    refuses(
        "generator is not a source",
        train,
        "demo-clip",
        data=(pair for pair in ()),
        out=tmp_path / "run",
    )
    assert recipe.data.source == "a [b]: c.csv"
    assert recipe.evaluation.zero_shot == (str(both), str(classes))
    assert recipe.evaluation.retrieval == (str(both), str(table))
    assert recipe.evaluation.val == ()
    assert recipe.evaluation.final_zero_shot == (), "the demo's sets go with the demo's pairs"


OWN = """
from declip import Term


class Spread(Term):
    title = "spread"

    def loss(self, own, keys, similarity, offset):
        return (own.images[0] @ keys.images[0].T).exp().mean()


TERMS = {"spread": Spread}
"""


def test_a_run_has_the_losses_of_a_file(table, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("spread.py").write_text(OWN)
    tree = tiny_tree(table) | {"loss_weights": {"contrastive": 1.0, "spread": 0.5}}
    Path("mine.yaml").write_text(yaml.safe_dump(tree))
    words = ("train", "mine.yaml", "train.steps=2", "train.log_every=1", "--out", "run", "--quiet")
    assert "GiB of memory" in command(*words, "--terms", "spread.py", "--dry-run").out
    done = command(*words, "--terms", "spread.py")
    assert done.status == 0, done.err
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [*rows[0]["losses"]] == ["contrastive", "spread"]
    without = command(*words, "--resume")
    assert (without.status, "loss_weights.spread" in without.err) == (2, True)


def test_recipes_are_listed_and_shown(command):
    assert [
        line.split()[0] for line in command("recipes").out.splitlines()
    ] == declip.recipe.load.recipe_names()
    assert (
        yaml.safe_load(command("recipes", "show", "clip", "train.steps=7").out)["train"]["steps"]
        == 7
    )
    assert command("--version").out == f"declip {declip.__version__}\n"


def nothing_to_encode(model, source, read, batches, *options):
    assert not batches, "vectors are in the cache, also of a folder that was moved"
    return iter(())


def test_a_project_works_after_it_was_moved(tmp_path, monkeypatch, command):
    project = tmp_path / "before"
    (project / "images").mkdir(parents=True)
    for number in range(40):
        texture(number).save(project / "images" / f"{number}.png")
    write_table(
        project / "pairs.csv", [f"{number}.png,texture number {number}" for number in range(40)]
    )
    declip.export(build("conv"), "safetensors", project / "start")
    monkeypatch.chdir(project)
    keys = {"train.steps": 4, "train.batch_size": 8, "data.workers": 0, "train.report_to": []}
    keys["data.image_root"] = "images"
    run = project / "runs" / "tuned"  # an absolute path, which the recipe of the run holds
    first = declip.finetune("pairs.csv", "start", keys, run, progress=False)
    embed = ["embed", "start/declip.safetensors", "images", "--out", "indices/images", "--quiet"]
    assert command(*embed).status == 0
    monkeypatch.chdir(tmp_path)
    moved = project.rename(tmp_path / "after")
    monkeypatch.chdir(moved)
    split = moved / "runs" / "tuned" / "val.pairs"
    assert declip.evaluate("runs/tuned", split, "retrieval", batch_size=8).images > 0
    again = declip.finetune("pairs.csv", "start", out="runs/tuned", resume=True, progress=False)
    assert (again.finished, again.step) == (True, first.step)
    assert command("search", "indices/images", "red", "--json", "hits.json").status == 0
    assert str(moved / "images") in Path("hits.json").read_text()
    assert declip.Index.open("indices/images").image(0).size == (48, 48)
    with monkeypatch.context() as patched:
        patched.setattr("declip.search.embed.encode_batches", nothing_to_encode)
        assert command(*embed).status == 0
    away = (moved / "indices/images").rename(tmp_path / "away")
    assert "--model" in command("search", away, "red").err
    refuses("--source", declip.Index.open(away).image, 0)


def test_garbage_is_not_searched_at_the_end_of_a_command(monkeypatch):
    monkeypatch.setattr("declip.cli.app.main", lambda: sys.exit(2))
    monkeypatch.setattr("gc.set_threshold", lambda *_: None)
    with pytest.raises(SystemExit):
        declip.__main__.main()
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    assert frozen > 1_000
