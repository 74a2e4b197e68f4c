import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import declip
from conftest import WEIGHTS
from declip.api import train
from declip.comparison.outcome import scores
from declip.data.images import photometric
from declip.errors import UserError
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import list_checkpoints, load_checkpoint
from declip.runs.folder import read_rows
from declip.supervision.objective import Objective
from declip.training import trainer as trainer_module
from declip.training import watchdogs
from declip.training.stopping import TRY_AGAIN
from declip.training.trainer import Trainer
from declip.training.watchdogs import ThroughputMonitor
from training.starts import recipe_for, same_end, stop_at


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_recipe_lowers_its_own_loss(table: Path, tmp_path: Path, name: str) -> None:
    recipe = recipe_for(table, name, steps=60, lr=3e-3, log_every=1, checkpoint_every=60)
    run = train(recipe, out=tmp_path, quiet=True)
    totals = [row["loss"] for row in run.metrics]
    assert run.finished
    assert sum(totals[-10:]) < 0.9 * sum(totals[:10]) if min(totals) > 0 else totals[-1] < totals[0]
    assert set(run.metrics[0]["losses"]) == set(WEIGHTS[name])
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(("name", "workers"), [("clip", 1), ("defilip", 0)])
def test_a_resumed_run_equals_one_never_interrupted(table: Path, tmp_path: Path, name: str, workers: int) -> None:
    recipe = with_workers(recipe_for(table, name, ema_decay=0.9), workers)
    train(recipe, out=tmp_path / "whole", quiet=True)
    stop_at(recipe, tmp_path / "parts", 4)
    assert train(recipe, out=tmp_path / "parts", resume=True, quiet=True).finished
    same_end(tmp_path / "whole", tmp_path / "parts")


def test_measuring_on_the_way_changes_nothing_that_dropout_draws(table: Path, tmp_path: Path) -> None:
    tree = recipe_for(table, "clip", log_every=1).model_dump()
    tree["image"]["model_kwargs"]["pos_drop_rate"] = 0.5
    tree["evaluation"]["retrieval"] = [str(table)]
    runs = []
    for every in (0, 2):
        tree["train"]["evaluate_every"] = every
        runs.append(train(Recipe.model_validate(tree), out=tmp_path / str(every), quiet=True, report=False))
    assert len(runs[1].evaluations) > len(runs[0].evaluations) > 0
    assert [row["loss"] for row in runs[0].metrics] == [row["loss"] for row in runs[1].metrics]


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_bits(table: Path, tmp_path: Path) -> None:
    """SIGKILL at moments spread over the run, checkpoint writing included, until it gets through."""
    recipe = recipe_for(table, "declip", steps=60, checkpoint_every=7, log_every=3)
    train(recipe, out=tmp_path / "whole", quiet=True)
    run, kills = tmp_path / "killed", 0
    fork = multiprocessing.get_context("fork")
    for delay in (0.05, 0.3, 0.02, 0.11, 0.0, 0.004):
        process = fork.Process(target=train, args=(recipe,), kwargs={"out": run, "resume": True, "quiet": True})
        before = set((run / "checkpoints").glob("*"))
        process.start()
        while process.is_alive() and set((run / "checkpoints").glob("*")) == before:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 3, "the run was too quick to be killed"
    train(recipe, out=run, resume=True, quiet=True)
    same_end(tmp_path / "whole", run)


def test_ctrl_c_saves_and_a_resume_goes_on(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(table, steps=20, checkpoint_every=100)
    step = trainer_module.training_step

    def interrupted(*arguments: object) -> object:
        if not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer_module, "training_step", interrupted)
    run = train(recipe, out=tmp_path / "run", quiet=True)
    assert (run.finished, run.step) == (False, 1)
    assert len(list_checkpoints(run.folder)) == 1
    assert train(recipe, out=tmp_path / "run", resume=True, quiet=True).step == 20
    train(recipe, out=tmp_path / "whole", quiet=True)
    same_end(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_that_is_said_twice_is_one(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    step = trainer_module.training_step

    def told_twice(*arguments: object) -> object:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer_module, "training_step", told_twice)
    run = train(recipe_for(table), out=tmp_path, quiet=True)
    assert (run.finished, run.step, run.status) == (False, 1, TRY_AGAIN)
    assert len(list_checkpoints(tmp_path)) == 1


def test_a_worker_killed_during_a_step_is_explained(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system does when memory runs out; torch's handler then raises in whatever the main process does."""

    def killed(*_: object) -> object:
        multiprocessing.active_children()[0].kill()
        time.sleep(30)
        return {}

    monkeypatch.setattr(trainer_module, "training_step", killed)
    with pytest.raises(UserError, match=r"lost at step 0: .*killed by signal.*Use fewer workers"):
        train(with_workers(recipe_for(table), 1), out=tmp_path, quiet=True)


def test_the_average_follows_the_weights(table: Path, tmp_path: Path) -> None:
    trainer = Trainer(recipe_for(table, "clip", ema_decay=0.999, steps=3), tmp_path, quiet=True)
    start = trainer.model.logit_scale.item()
    trainer.train()
    end = trainer.model.logit_scale.item()
    averaged = trainer.evaluated_model.logit_scale.item()
    assert trainer.evaluated_model is not trainer.model
    assert min(start, end) < averaged < max(start, end)


def test_the_logit_scale_stays_within_its_limits(table: Path, tmp_path: Path) -> None:
    recipe = recipe_for(table, "clip", lr=1.0, warmup_lr=1.0, steps=4)
    limited = recipe.model_copy(update={"logit_scale": recipe.logit_scale.model_copy(update={"min": 2.0, "max": 2.7})})
    trainer = Trainer(limited, tmp_path, quiet=True)
    trainer.train()
    assert 2.0 <= trainer.model.logit_scale.item() <= 2.7


def test_a_loss_that_is_not_finite_stops_with_all_that_helps(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(recipe_for(table, checkpoint_every=2, log_every=1), tmp_path, quiet=True)
    term = trainer.objective.terms["contrastive"]
    loss = term.loss
    monkeypatch.setattr(term, "loss", lambda *rows: loss(*rows) * (float("nan") if trainer.step == 5 else 1.0))
    with pytest.raises(UserError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "not finite at step 6" in message
    assert "contrastive nan" in message
    assert "step-00000004" in message
    named = {int(word.strip(",")) for word in message.split("pairs ")[1].split(" of ")[0].split()}
    assert named == {int(i) for i in trainer.loader.indices(5)}
    weights = load_checkpoint(list_checkpoints(tmp_path)[-1]).weights
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_another_recipes_run_is_not_resumed(table: Path, tmp_path: Path) -> None:
    train(recipe_for(table), out=tmp_path, quiet=True)
    with pytest.raises(UserError, match="already holds a run"):
        train(recipe_for(table), out=tmp_path, quiet=True)
    with pytest.raises(UserError, match=r"another recipe.*train\.lr was 0\.001, now 0\.002"):
        train(recipe_for(table, lr=2e-3), out=tmp_path, resume=True, quiet=True)
    rows = (tmp_path / "metrics.jsonl").read_text()
    assert train(recipe_for(table, checkpoint_every=3), out=tmp_path, resume=True, quiet=True).finished
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_damaged_lines_are_dropped_with_a_warning_and_block_no_resume(table: Path, tmp_path: Path) -> None:
    stop_at(recipe_for(table, "clip"), tmp_path, 1)
    bad = [b'{"step": 2, "pa', b"\0" * 40, b"\xff\xfe{}", b"17", b"[" * 100_000, b'{"step": 1, "lo']
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (tmp_path / name).write_bytes(b"\n".join([b'{"step": 1}', *bad]))
    train(recipe_for(table, "clip"), out=tmp_path, resume=True, quiet=True, report=False)
    for name, steps in (("metrics.jsonl", [1, 2, 4, 6, 8]), ("evaluations.jsonl", [1])):
        assert [row["step"] for row in read_rows(tmp_path / name)] == steps
        assert f"{tmp_path / name}: 6, the first at line 2" in (tmp_path / "log.txt").read_text()


def test_every_file_of_a_run_and_its_exports_has_the_permissions_of_the_umask(table: Path, tmp_path: Path) -> None:
    """Of safetensors' own they would be for the owner alone."""
    before = os.umask(0o027)
    try:
        run = tmp_path / "run"
        train(recipe_for(table, "clip"), out=run, quiet=True, report=False)
        declip.export(run, "safetensors", tmp_path / "file")
        declip.export(run, "huggingface", tmp_path / "folder")
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors")}
    assert len(modes) == 6
    assert set(modes.values()) == {0o640}, modes


def test_a_folder_in_use_is_refused_and_free_as_soon_as_its_process_is_killed(table: Path, tmp_path: Path) -> None:
    """A worker of the killed process, which lives on for some seconds, holds nothing."""
    recipe = with_workers(recipe_for(table, steps=100_000, checkpoint_every=2), 1)
    process = multiprocessing.get_context("fork").Process(target=train, args=(recipe,), kwargs={"out": tmp_path})
    process.start()
    while process.is_alive() and not list_checkpoints(tmp_path):
        time.sleep(0.01)
    with pytest.raises(UserError, match=rf"in use: process {process.pid} on .*--out"):
        Trainer(recipe, tmp_path, resume=True, quiet=True)
    assert process.is_alive()
    process.kill()
    process.join()
    assert Trainer(recipe, tmp_path, resume=True, quiet=True).step > 0


def test_wrong_runs_are_refused_before_anything_is_made(table: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    small = recipe_for(table).model_dump()
    small["image"] |= {"model": "convnext_atto", "size": 16, "model_kwargs": {}}  # its last grid would be half a cell
    for recipe, folder, message in (
        (recipe_for(table), "file/run", "Cannot write into the run folder"),
        (recipe_for(table, batch_size=64), "run", "24"),
        (recipe_for(table, device="cuda:7"), "run", r"train\.device"),
        (Recipe.model_validate(small), "run", r"'convnext_atto'.*16 × 16.*image\.size"),
    ):
        with pytest.raises(UserError, match=message):
            train(recipe, out=tmp_path / folder, quiet=True)
        assert not (tmp_path / "run").exists()


def test_broken_pairs_are_counted_and_too_many_stop_the_run(table: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for number, row in enumerate(rows[:3]):
        row["image"] = f"missing{number}.png"
    broken = table.with_name("broken.jsonl")
    broken.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_for(broken, steps=30)
    with pytest.raises(UserError, match=r"missing image"):
        train(recipe, out=tmp_path / "strict", quiet=True)
    allowed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_broken_fraction": 0.5})})
    train(allowed, out=tmp_path / "allowed", quiet=True)
    counts = json.loads((tmp_path / "allowed" / "skipped.json").read_text())
    assert counts["seen"] == 240
    assert counts["reasons"]["missing image"]["count"] == 30, "3 of 24 pairs in each of 10 epochs"


def test_measuring_that_a_crash_cut_short_is_done_again_and_only_once(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = recipe_for(table, "clip").model_dump()
    tree["evaluation"]["retrieval"] = [str(table)]
    recipe = Recipe.model_validate(tree)

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as broken:
        broken.setattr(trainer_module, "evaluate_all", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(recipe, out=tmp_path, quiet=True)
    for _ in range(2):
        run = train(recipe, out=tmp_path, resume=True, quiet=True)
        assert [(row["step"], row["task"]) for row in run.evaluations] == [(8, "retrieval")]


def poison(monkeypatch: pytest.MonkeyPatch, at: set[int]) -> None:
    """Make the total of some forward passes not a number; the features that went into the queue are then bad too."""
    forward, calls = Objective.forward, iter(range(1000))

    def bad(self: Objective, *arguments: object) -> dict[str, torch.Tensor]:
        terms = forward(self, *arguments)  # type: ignore[arg-type]
        if next(calls) in at:
            terms["loss"] = terms["loss"] * float("nan")
            assert self.queue is not None
            self.queue.features.fill_(float("nan"))
        return terms

    monkeypatch.setattr(Objective, "forward", bad)


def test_a_bad_step_may_be_left_out_and_changes_nothing(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(table, steps=5, max_nonfinite_steps=1, checkpoint_every=1, log_every=1, keep_checkpoints=9)
    poison(monkeypatch, {2})
    run = train(recipe, out=tmp_path, quiet=True, report=False)
    assert run.finished
    second, third, fourth = (load_checkpoint(path) for path in list_checkpoints(tmp_path)[1:4])
    same = [torch.equal(second.weights[key], third.weights[key]) for key in second.weights]
    assert all(same)
    assert all(torch.equal(second.training[key], third.training[key]) for key in second.training)
    assert not all(torch.equal(third.weights[key], fourth.weights[key]) for key in third.weights)
    assert third.extra["bad_steps"] == [2]
    assert "1 of at most 1" in (tmp_path / "log.txt").read_text()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if row["loss"] is None] == [3]
    assert train(recipe, out=tmp_path, resume=True, quiet=True).report.is_file()


def test_more_bad_steps_than_allowed_end_the_run(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {1, 3})
    with pytest.raises(UserError, match="not finite at step 4"):
        train(recipe_for(table, steps=6, max_nonfinite_steps=1), out=tmp_path, quiet=True, report=False)


def test_a_run_over_other_pairs_is_not_resumed(table: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows = [{**row, "image": str(table.parent / row["image"])} for row in rows]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(recipe_for(pairs, steps=2), out=tmp_path / "run", quiet=True, report=False)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(UserError, match=r"holds 23 pairs; when the run .* it held 24"):
        train(recipe_for(pairs, steps=2), out=tmp_path / "run", resume=True, quiet=True, report=False)


@pytest.mark.parametrize("chunk", [None, 3])
def test_views_are_finished_in_full_precision(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int | None
) -> None:
    seen: list[bool] = []

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return apply(*arguments)

    apply = photometric.apply
    monkeypatch.setattr(photometric, "apply", watched)
    train(recipe_for(table, steps=1, precision="bf16", grad_cache_chunk=chunk), out=tmp_path, quiet=True, report=False)
    assert seen
    assert not any(seen)


def test_workers_added_on_the_way_change_nothing(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """auto: the loader is started anew with as many workers as the waiting asks for, and processors are free."""

    def starved(supply: ThroughputMonitor) -> bool:
        supply.needed, supply.fraction = 3, 0.5
        return True

    recipe = recipe_for(table)
    train(recipe, out=tmp_path / "plain", quiet=True)
    monkeypatch.setattr(ThroughputMonitor, "starved", starved)
    monkeypatch.setattr(trainer_module, "free_cores", lambda training: 2)
    trainer = Trainer(with_workers(recipe, "auto"), tmp_path / "auto", quiet=True)
    assert trainer.workers == 1
    trainer.train()
    assert trainer.workers == 2
    assert caplog.text.count("2 workers") == 1
    same_end(tmp_path / "plain", tmp_path / "auto")


def test_a_loader_that_starves_the_steps_is_named_once(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdogs, "LEAST_STEPS", 1)
    monkeypatch.setattr(watchdogs, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(watchdogs, "STARVED", -1.0)
    monkeypatch.setattr(trainer_module, "free_cores", lambda training: 1)
    trainer = Trainer(with_workers(recipe_for(table), 0), tmp_path, quiet=True)
    trainer.train()
    assert trainer.workers == 0
    assert caplog.text.count("data.workers=1 would keep up") == 1


def with_workers(recipe: Recipe, workers: int | str) -> Recipe:
    tree = recipe.model_dump()
    tree["data"]["workers"] = workers
    return Recipe.model_validate(tree)


def test_held_out_sets_of_the_same_file_name_stay_two_and_are_measured_once(table: Path, tmp_path: Path) -> None:
    lines = table.read_text(encoding="utf-8").splitlines()
    names = []
    for folder, rows in (("coco", lines[:8]), ("flickr", lines)):
        (tmp_path / folder).mkdir()
        own = [{**json.loads(line), "image": str(table.parent / json.loads(line)["image"])} for line in rows]
        path = tmp_path / folder / "test.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
        names.append(str(path))
    tree = {**recipe_for(table, "clip", steps=4).model_dump(), "evaluation": {"retrieval": names}}
    recipe = Recipe.model_validate(tree)
    run = train(recipe, out=tmp_path / "run", quiet=True)
    assert {row["dataset"]: row["images"] for row in run.results} == {names[0]: 8, names[1]: 24}
    assert len(scores(run.results)) == 2
    page = run.report.read_text(encoding="utf-8")
    assert "<td>coco/test.jsonl</td>" in page
    assert "<td>flickr/test.jsonl</td>" in page
    assert str(tmp_path) not in page[page.index("<body") : page.index('id="recipe"')]
    shutil.copy(names[1], names[0])  # what is measured again now shows
    again = train(recipe, out=tmp_path / "run", resume=True, quiet=True)
    assert [row["images"] for row in again.evaluations] == [8, 24]


def test_more_steps_are_allowed_in_the_warmup_and_else_the_way_to_train_longer_is_named(
    table: Path, tmp_path: Path
) -> None:
    keys = {"warmup_steps": 4, "checkpoint_every": 100}
    short, longer = (recipe_for(table, "clip", steps=steps, **keys) for steps in (6, 12))
    for done, run in ((3, tmp_path / "a"), (5, tmp_path / "b")):
        stop_at(short, run, done)
    train(longer, out=tmp_path / "a", resume=True, quiet=True, report=False)
    train(longer, out=tmp_path / "whole", quiet=True, report=False)
    same_end(tmp_path / "a", tmp_path / "whole")
    with pytest.raises(UserError, match=r"finetune\.pretrained='.*b'.*--out.*train\.steps=6"):
        train(longer, out=tmp_path / "b", resume=True, quiet=True)
    assert train(short, out=tmp_path / "b", resume=True, quiet=True, report=False).finished


def test_the_last_checkpoint_is_a_model(table: Path, tmp_path: Path) -> None:
    train(recipe_for(table, "clip"), out=tmp_path, quiet=True, report=False)
    last = tmp_path / "checkpoints" / "last"
    expected = declip.load(list_checkpoints(tmp_path)[-1]).state_dict()  # type: ignore[attr-defined]
    found = declip.load(last).state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    last.unlink()
    last.write_text("step-00000004\n")
    assert declip.export(last, "safetensors", tmp_path / "out").folder.is_dir()
