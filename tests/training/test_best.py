"""Epochs, the validation loss, the best checkpoint and early stopping."""

import pytest

import declip
from conftest import in_processes, refuses
from declip.evaluation.results import RecallAtK, RetrievalResult, ZeroShotResult
from declip.interchange.export import with_provenance
from declip.recipe.load import load_recipe
from declip.recipe.schema import Evaluation
from declip.reports.run import measures_table
from declip.runs.checkpoint import list_checkpoints, load_checkpoint, step_of, without_prefix
from declip.runs.folder import Run, append_row, drop_rows, read_rows
from declip.training.assemble import assemble
from declip.training.state import BestEvaluation
from training import starts
from training.starts import ended, last, moved, quiet_train, same_end, stop_at

RIGHT = RecallAtK(9, 9, 1, 1, 1, 0.1, 0.5, 1, 1)


def recipe_for(table, **keys):
    """A run that learns, and then overshoots: evaluated every 2 steps."""
    keys = {"steps": 24, "evaluate_every": 2, "checkpoint_every": 100, **keys}
    return starts.recipe_for(table, "clip", {"evaluation": {"retrieval": (str(table),)}}, **keys)


def best_step(rows):
    """The step of the highest mean R@1, of equal ones that of the lowest loss."""

    def order(row):
        return -(row["text_to_image_r1"] + row["image_to_text_r1"]), row["loss"]

    return int(min((row for row in rows if "best_step" not in row), key=order)["step"])


STALE = {"lr": 0.3, "warmup_lr": 1e-3, "warmup_steps": 12, "patience": 3}


def test_a_run_ends_with_its_best_weights_also_when_it_was_killed(table, tmp_path):
    recipe, whole = recipe_for(table, **STALE), tmp_path / "whole"
    run = quiet_train(recipe, whole)
    assert run.finished
    best = best_step(run.evaluations)
    rows = {row["step"]: row for row in run.evaluations if "best_step" not in row}
    assert 0 < best < run.step < 24, "it was stopped early"
    assert run.step == best + 3 * 2
    assert (whole / "checkpoints/best").resolve().name == f"step-{best:08d}"
    end = run.results[-1]
    assert end["best_step"] == best
    assert end["loss"] == pytest.approx(rows[best]["loss"], rel=1e-6)
    weights = without_prefix("model", load_checkpoint(whole / "checkpoints/best").weights)
    assert not moved(weights, declip.load(whole, device="cpu").state_dict())

    # A test set, of which only the end is known
    held = {**run.evaluations[-1], "dataset": "held.csv"}
    append_row(whole / "evaluations.jsonl", held)
    results = [each for each in with_provenance(whole).results if isinstance(each, RetrievalResult)]
    losses = {result.dataset: result.loss for result in results}
    assert losses.keys() == {str(table), "held.csv"}
    assert losses[str(table)] == pytest.approx(rows[best]["loss"], rel=1e-6)
    assert losses["held.csv"] == held["loss"]
    shown = measures_table(Run(whole, run.step))
    assert {row[shown.columns.index("step")] for row in shown.rows} == {str(best)}
    drop_rows(whole / "evaluations.jsonl", after=run.step - 1)
    append_row(whole / "evaluations.jsonl", run.evaluations[-1])

    parts = tmp_path / "parts"
    stop_at(recipe, parts, best + 3)  # in the middle of what is stale
    for folder in (parts, whole):  # of the whole one nothing is trained or measured again
        assert quiet_train(recipe, folder, resume=True).finished
        assert read_rows(folder / "evaluations.jsonl") == run.evaluations
    same_end(whole, parts)
    assert (parts / "checkpoints/best").resolve().name == f"step-{best:08d}"


def test_the_best_checkpoint_is_kept_and_nothing_changes_without_patience(table, tmp_path):
    keys = {"checkpoint_every": 1, "keep_checkpoints": 1, "steps": 5, "lr": 0.3, "warmup_lr": 0.3}
    quiet_train(recipe_for(table, patience=100, **keys), tmp_path / "watched")
    quiet_train(recipe_for(table, **keys), tmp_path / "plain")
    best = (tmp_path / "watched/checkpoints/best").resolve()
    kept = [step_of(path) for path in list_checkpoints(tmp_path / "watched")]
    assert kept == [step_of(best), 5], "the best is not the last"
    assert [step_of(path) for path in list_checkpoints(tmp_path / "plain")] == [5]
    assert not (tmp_path / "plain/checkpoints/best").exists()
    assert not moved(last(tmp_path / "watched"), last(tmp_path / "plain"))


def test_two_processes_stop_together_with_the_same_best_weights(table, tmp_path):
    recipe = recipe_for(table, **STALE)
    one, other = in_processes(ended, 2, tmp_path / "processes", recipe, tmp_path / "run")
    assert one[:2] == other[:2]
    assert one[1]
    assert one[0] < 24
    best = without_prefix("model", load_checkpoint(tmp_path / "run/checkpoints/best").weights)
    assert not moved(best, one[2]) | moved(best, other[2])


def test_recall_decides_and_then_the_loss():
    best, evaluation = BestEvaluation(), Evaluation(retrieval=("mine",), zero_shot=("classes",))
    better = []
    for step, (score, loss) in enumerate(
        ((0.2, 1.0), (0.2, 1.0), (0.2, 0.9), (0.1, 0.1), (0.3, 2.0))
    ):
        recalls = (RecallAtK(9, 9, score + d, 1, 1, 0.1, 0.5, 1, 1) for d in (0.05, -0.05))
        results = [
            RetrievalResult("mine", 9, 9, *recalls, loss=loss),
            RetrievalResult("other", 9, 9, *[RIGHT] * 2),
        ]
        better.append(best.update(step, results, evaluation))
        assert best.stale == (0 if better[-1] else 1)
    assert better == [True, False, True, False, True]
    accuracy = ZeroShotResult("classes", 9, 3, 0.5, 1.0, 0.5)
    assert BestEvaluation(score=0.4).update(1, [accuracy], evaluation)
    assert not BestEvaluation(score=0.6).update(1, [accuracy], evaluation)


def test_epochs_and_something_to_watch(table, tmp_path):
    train = assemble(recipe_for(table, epochs=2.5), tmp_path / "run").recipe.train
    assert (train.steps, train.epochs) == (8, None)  # 2.5 × 3 batches of 8 of 24 pairs
    (tmp_path / "base.yaml").write_text("train: {epochs: 3}")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\ntrain: {steps: 7}")
    assert load_recipe("finetune", {"train.epochs": 3}).train.epochs == 3
    assert load_recipe(tmp_path / "base.yaml", {"train.steps": 5}).train.epochs is None
    assert load_recipe(tmp_path / "child.yaml").train.epochs is None
    assert load_recipe(tmp_path / "child.yaml", {"train.epochs": 2}).train.epochs == 2
    both = {"train.steps": "7", "train.epochs": "3"}
    refuses(r"train.steps=7 and train.epochs=3", load_recipe, "clip", both)
    unwatched = {"train.patience": 3, "data.source": "other.csv"}
    refuses("train.patience .*evaluate_every", load_recipe, "clip", unwatched)
