"""Comparisons from beginning to end: what is run, what continues after a stop, what is refused."""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import yaml
from PIL import Image

from conftest import TINY, refuses, tiny_tree, write_rows
from declip.api import compare, train
from declip.comparison import runner as comparing
from declip.comparison.outcome import by_measure, read_outcome
from declip.comparison.runner import FAILURE, folder_of, run_trial
from declip.comparison.study import Study, read_study
from declip.errors import UserError
from declip.runs.folder import read_rows
from training.starts import UNCOLORED

STEPS = 4


@pytest.fixture
def recipes(table, tmp_path):
    files = {name: tmp_path / f"{name}.yaml" for name in ("clip", "slip")}
    for name, path in files.items():
        train = {**TINY["train"], "steps": STEPS}
        tree = tiny_tree(table, name, train=train, views=UNCOLORED)
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return {name: str(path) for name, path in files.items()}


def tiny(recipes, table, out, **more):
    """Compare them by retrieval: two sizes, one seed, in this process."""
    options = {"pairs": (8, 16), "seeds": 1, "datasets": [str(table)], "tasks": ["retrieval"]}
    options |= {"progress": False, **more}
    return compare(list(recipes.values()), out=out, **options)


def test_every_run_is_what_declip_train_gives(recipes, table, tmp_path):
    patience = {
        "train.patience": 2,
        "train.evaluate_every": 2,
        "evaluation.retrieval": [str(table)],
    }  # of no effect
    outcome = tiny(recipes, table, tmp_path / "out", pairs=(16,), overrides=patience)
    assert outcome.complete
    refuses("no comparison", read_outcome, tmp_path)
    rows = {(row["variant"], row["pairs"], row["steps"]): row for row in outcome.rows.values()}
    assert sorted(rows) == [("clip", 16, STEPS), ("slip", 16, STEPS)]
    overrides = {"data.max_pairs": 16, "evaluation.retrieval": [str(table)]}
    alone = train(recipes["clip"], overrides, out=tmp_path / "alone", progress=False)
    row = rows["clip", 16, STEPS]
    assert (row["loss"], row["samples"]) == (alone.metrics[-1]["loss"], STEPS * 8)
    (measure,) = outcome.facts
    assert measure == f"{table}: R@1"
    assert outcome.curves()[measure]["clip"].values[0] == (
        by_measure(alone.results)[measure].headline.value,
    )
    kept = {path.name for path in folder_of(tmp_path / "out", outcome.study.trials()[0]).iterdir()}
    assert {"result.json", "recipe.yaml", "metrics.jsonl", "checkpoints"} - kept == {"checkpoints"}


def test_few_shot_is_compared(recipes, table, tmp_path):
    for split, color, number in product(("train", "test"), ("red", "blue"), range(4)):
        path = tmp_path / "colors" / split / color / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), color).save(path)
    colors = f"folder:{tmp_path / 'colors'}"
    options = {"pairs": (8,), "datasets": [colors], "tasks": ["few-shot"]}
    outcome = tiny({"clip": recipes["clip"]}, table, tmp_path / "out", **options)
    assert [*outcome.facts] == [f"{colors}: 4 shots, top-1"]


def test_it_continues_with_what_is_missing_only(recipes, table, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    recipes = {"clip": recipes["clip"]}
    first = tiny(recipes, table, tmp_path / "out")
    study = read_study(tmp_path / "out")
    lost, kept = (
        folder_of(tmp_path / "out", trial) / "result.json" for trial in study.trials()[:2]
    )
    written = kept.stat().st_mtime_ns
    lost.unlink()
    assert not read_outcome(tmp_path / "out").complete
    again = tiny(recipes, table, Path("~/out"))
    assert lost.is_file()
    assert (again.complete, [*again.facts], kept.stat().st_mtime_ns) == (
        True,
        [*first.facts],
        written,
    )
    assert "earlier commands" not in caplog.text
    more = tiny(recipes, table, tmp_path / "out", pairs=(16,), seeds=2)
    assert "also lacks 1 run of earlier commands, of clip" in caplog.text, "8 pairs, seed 1"
    assert (more.study.pairs, more.study.seeds, len(more.rows)) == ((8, 16), (0, 1), 4)
    (tmp_path / "moved").mkdir()
    moved = {"clip": str(shutil.move(recipes["clip"], tmp_path / "moved"))}
    assert tiny(moved, table, tmp_path / "out", pairs=(16,), seeds=2).complete


def test_a_recipe_edited_between_two_calls_is_not_averaged_with_its_earlier_self(
    recipes, table, tmp_path
):
    recipes = {"clip": recipes["clip"]}
    tiny(recipes, table, tmp_path / "out", pairs=(8,))
    text = Path(recipes["clip"]).read_text(encoding="utf-8")
    Path(recipes["clip"]).write_text(
        text.replace("warmup_steps: 2", "warmup_steps: 3"), encoding="utf-8"
    )
    changed = r"train\.warmup_steps was 2, now 3"
    refuses(f"clip: {changed}", tiny, recipes, table, tmp_path / "out", pairs=(8,), seeds=2)
    study = read_study(tmp_path / "out")
    assert study.seeds == (0,)
    # Nor does a worker that is still there run it.
    refuses(changed, run_trial, study, replace(study.trials()[0], seed=1), tmp_path / "out")


def test_recipes_whose_runs_would_share_folders_are_refused(recipes, table, tmp_path):
    first, second = (
        {name: str(shutil.copy(recipes["clip"], tmp_path / name))}
        for name in ("a b.yaml", "a-b.yaml")
    )
    refuses("Rename one", tiny, {**first, **second}, table, tmp_path / "both")
    comparing.open_folder(_study(first, table), tmp_path / "out")
    refuses("Rename one", comparing.open_folder, _study(second, table), tmp_path / "out")


def test_a_run_that_fails_leaves_its_reason_and_does_not_end_the_others(
    recipes, table, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def fail(study, trial, folder):
        raise (
            UserError("The loss is not finite.")
            if trial.variant == "clip"
            else ZeroDivisionError("a bug")
        )

    monkeypatch.setattr(comparing, "run_trial", fail)
    outcome = tiny(recipes, table, out, pairs=(8,))
    assert (outcome.complete, len(outcome.rows)) == (False, 0)
    first, second = outcome.failures.values()
    assert first == "The loss is not finite."
    assert re.match(r"(?s)Traceback.*ZeroDivisionError: a bug", second)
    assert len(list(out.glob(f"runs/*/{FAILURE}"))) == 2
    monkeypatch.setattr(comparing, "run_trial", run_trial)
    again = tiny(recipes, table, out, pairs=(8,))
    assert (again.complete, again.failures) == (True, {})


def _rows_logged(out):
    return sum(path.read_bytes().count(b"\n") for path in out.glob("runs/*/metrics.jsonl"))


def _compare_in_a_terminal(*given, **options):
    # A shell's background jobs are deaf to it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tiny(*given, **options)


def test_stopped_and_killed_it_ends_as_if_it_had_gone_through(recipes, table, tmp_path):
    recipes = {"slip": recipes["slip"]}
    options = {"pairs": (16,), "overrides": {"train.steps": 16, "train.checkpoint_every": 4}}
    whole, out = tiny(recipes, table, tmp_path / "whole", **options), tmp_path / "out"
    fork = multiprocessing.get_context("fork")
    for number in (signal.SIGINT, signal.SIGKILL):  # the first saves the running trial
        logged = _rows_logged(out)
        other = fork.Process(
            target=_compare_in_a_terminal, args=(recipes, table, out), kwargs=options
        )
        other.start()
        while _rows_logged(out) <= logged and other.is_alive():
            time.sleep(0.02)
        os.kill(other.pid, number)
        if number == signal.SIGINT:
            other.join()
            assert (other.exitcode, read_outcome(out).complete) == (0, False)
            assert list(out.glob("runs/*/checkpoints/step-*"))
    # Waits for the killed process, and continues its trial
    found = tiny(recipes, table, out, **options)
    other.join()
    assert (other.exitcode, found.complete) == (-signal.SIGKILL, True)
    (row,), (expected,) = found.rows.values(), whole.rows.values()
    assert (row["loss"], row["results"]) == (expected["loss"], expected["results"])


def test_at_equal_compute_steps_are_inverse_to_the_measured_seconds_and_stay(
    recipes, table, tmp_path, monkeypatch
):
    seconds, timed = {"clip": 0.1, "slip": 0.15, "slow-clip": 0.4}, []

    def step_seconds(parts, warm, count):
        timed.append(parts.recipe.name)
        return [seconds[parts.recipe.name]] * count

    monkeypatch.setattr(comparing, "step_seconds", step_seconds)
    options = {"pairs": (8,), "budget": "compute"}
    outcome = tiny(recipes, table, tmp_path / "out", **options)
    assert timed == ["clip", "slip"] * comparing.ROUNDS
    rows = {(row["variant"], row["steps"], row["samples"]) for row in outcome.rows.values()}
    assert rows == {("clip", 4, 32), ("slip", 2, 16)}
    # On a machine half as fast, what was measured stays, and a new recipe is timed in turns with the first.
    seconds["clip"] *= 2
    again = tiny(recipes, table, tmp_path / "out", seeds=2, **options)
    assert len(timed) == 2 * comparing.ROUNDS
    rows = {(row["variant"], row["steps"]) for row in again.rows.values()}
    assert rows == {("clip", 4), ("slip", 2)}
    recipes["slow-clip"] = str(shutil.copy(recipes["clip"], tmp_path / "slow-clip.yaml"))
    study = comparing.open_folder(_study(recipes, table, budget="compute"), tmp_path / "out")
    assert timed[2 * comparing.ROUNDS :] == ["clip", "slow-clip"] * comparing.ROUNDS
    expected = [("clip", 4, 0.1), ("slip", 2, 0.15), ("slow-clip", 2, 0.2)]
    assert [(each.name, each.steps, each.seconds) for each in study.variants] == expected
    assert read_study(tmp_path / "out") == study


def _sharing(name, recipes, table, out, options):
    """Compare in one of two processes; each waits in its first trial until the other has one, too."""

    def run(study, trial, folder):
        with (out / f"{name}.ran").open("a") as file:
            file.write(f"{trial.id}\n")
        until = time.monotonic() + 60
        while len(list(out.glob("*.ran"))) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        return run_trial(study, trial, folder)

    comparing.run_trial = run
    assert tiny(recipes, table, out, **options).complete


def test_two_processes_share_the_runs(recipes, table, tmp_path):
    recipes = {"clip": recipes["clip"]}
    options = {"seeds": 2, "pairs": (8,)}
    alone, out = tiny(recipes, table, tmp_path / "alone", **options), tmp_path / "out"
    fork = multiprocessing.get_context("fork")
    both = [
        fork.Process(target=_sharing, args=(name, recipes, table, out, options)) for name in "ab"
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    ran = [(out / f"{name}.ran").read_text().split() for name in "ab"]
    assert all(ran)
    assert sorted(ran[0] + ran[1]) == sorted(alone.rows)
    rows = read_outcome(out).rows
    assert rows.keys() == alone.rows.keys()
    assert all(
        row[key] == alone.rows[id][key] for id, row in rows.items() for key in ("loss", "results")
    )


OWN = """
from declip import Term


class Uniformity(Term):
    title = "uniformity"

    def loss(self, own, keys, similarity, offset):
        return (own.images[0] @ keys.images[0].T).exp().mean()


TERMS = {"uniformity": Uniformity}
"""


@pytest.fixture
def own(recipes, table, tmp_path):
    """A file with a loss, and recipes of which the second uses it."""
    path = tmp_path / "uniformity.py"
    path.write_text(OWN, encoding="utf-8")
    tree = yaml.safe_load(Path(recipes["clip"]).read_text(encoding="utf-8"))
    tree["loss_weights"]["uniformity"] = 0.5
    uniform = tmp_path / "uniform.yaml"
    uniform.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path, {"clip": recipes["clip"], "uniform": str(uniform)}


def test_a_loss_of_the_users_file_is_tuned_timed_trained_and_compared(
    own, table, rows, tmp_path, command, monkeypatch
):
    monkeypatch.setattr(comparing, "ROUNDS", 1)
    path, recipes = own
    validation = write_rows(tmp_path / "validation.jsonl", rows[:12])
    tune = ["--tune", "train.lr=0.0001,0.01", "--tune-on", validation]
    given = [*recipes.values(), "--pairs", 16, "--seeds", 1, "--dataset", table, "--quiet"]
    given += ["--task", "retrieval", "--budget", "compute", *tune, "--out", tmp_path / "out"]
    done = command("compare", *given, "--terms", path)
    assert done.status == 0, done.err
    for folder in ("out", "out-tuning"):
        (run,) = [*(tmp_path / folder / "runs").glob("uniform*_n16_s0")][:1]
        assert "uniformity" in read_rows(run / "metrics.jsonl")[0]["losses"]
    study = json.loads((tmp_path / "out" / "results.json").read_text())["study"]
    assert study["terms_file"].startswith("uniformity.py (")
    assert study["budget"] == "compute"
    # A changed loss is not averaged with its earlier self, and its recipe needs it again.
    path.write_text(OWN.replace("mean()", "sum()"), encoding="utf-8")
    changed = command("compare", *given, "--terms", path)
    assert (changed.status, changed.err.count("\n")) == (2, 1)
    assert "uniformity.py (" in changed.err
    assert "--out" in changed.err
    without = command("compare", *given)
    assert (without.status, "loss_weights.uniformity" in without.err) == (2, True)


def test_losses_are_given_as_classes_too(own, table, tmp_path):
    path, recipes = own
    terms = runpy.run_path(str(path))["TERMS"]
    outcome = tiny(recipes, table, tmp_path / "out", pairs=(16,), terms=terms)
    losses = {row["variant"]: row["loss"] for row in outcome.rows.values()}
    assert outcome.complete
    assert losses["clip"] < losses["uniform"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, ["own.py' does not exist", "--terms"]),
        ("import nowhere_installed", ["own.py' cannot be run", "nowhere_installed"]),
        ("x = (", ["own.py' cannot be run", "SyntaxError"]),
        ("TERMS = {}", ["own.py' has no losses", "TERMS = {'NAME': YourTerm}"]),
        (OWN.replace('"uniformity": ', '"contrastive": '), ["'contrastive'", "other than"]),
        (OWN.replace(": Uniformity", ": 3"), ["'uniformity' for 3", "Term"]),
        (OWN, ["No recipe uses the loss 'uniformity'", "loss_weights.uniformity"]),
    ],
)
def test_a_file_of_losses_that_cannot_be_used_is_refused(code, message, recipes, table, tmp_path):
    path = tmp_path / "own.py"
    if code is not None:
        path.write_text(code, encoding="utf-8")
    refuses(message, tiny, recipes, table, tmp_path / "out", terms=path)
    assert not (tmp_path / "out").exists()


def _study(recipes, table, **more):
    return Study.of(
        list(recipes.values()), [8], [0], datasets=[str(table)], tasks=["retrieval"], **more
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": (4, 16)}, "4 pairs.*batch of 8.*train.batch_size"),
        ({"pairs": (8, 25)}, "24 pairs.*25.*--pairs"),
        ({"tasks": ["zero-shot"]}, "has no classes"),
        ({"tasks": ["retrievel"]}, "Did you mean 'retrieval'"),
        ({"budget": "computer"}, "budget.*Did you mean 'compute'"),
        ({"seeds": ()}, "one seed"),
        ({"overrides": {"data.max_pairs": 5}}, "--pairs"),
        ({"overrides": {"train.epochs": 2}}, "'clip'.*train.epochs.*train.steps"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_made(
    options, message, recipes, table, tmp_path
):
    refuses(message, tiny, recipes, table, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_each_recipe_gets_its_best_value_and_an_edge_is_warned_of(
    recipes, table, rows, tmp_path, caplog
):
    validation = write_rows(tmp_path / "validation.jsonl", rows[:12])
    options = {"pairs": (16,), "tune": "train.lr=0.0001,0.01", "tune_on": str(validation)}
    outcome = tiny(recipes, table, tmp_path / "out", **options)
    assert outcome.complete
    trials = read_outcome(tmp_path / "out-tuning")
    (curves,) = trials.curves().values()
    for variant in outcome.study.variants:
        scores = {value: curves[f"{variant.name}-{value}"].means[0] for value in ("0.0001", "0.01")}
        assert variant.overrides["train.lr"] == float(max(scores, key=scores.get))
    assert caplog.text.count("lies at the edge of the grid") == 2
    refuses("test set", tiny, recipes, table, tmp_path / "b", **{**options, "tune_on": str(table)})
    refuses("--tune-on", tiny, recipes, table, tmp_path / "b", **{**options, "tune_on": None})
    refuses(
        "two or more", tiny, recipes, table, tmp_path / "b", **{**options, "tune": "train.lr=1"}
    )
