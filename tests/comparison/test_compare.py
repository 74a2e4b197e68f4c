"""Comparisons from beginning to end: what is run, what goes on after a stop, what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from comparison.conftest import tiny
from conftest import COLOURS, SHAPES, draw
from declip.api import train
from declip.cli.app import app
from declip.comparison import runner as comparing
from declip.comparison.outcome import read_outcome, scores
from declip.comparison.study import read_study
from declip.comparison.trial import folder_of, run_cell
from declip.comparison.worker import FAILURE, RUNS, failure, work
from declip.errors import UserError

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for the workers in /proc")
pytestmark = pytest.mark.usefixtures("no_timing")


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs as given: a test must not depend on the machine's speed."""
    monkeypatch.setattr(
        comparing, "seconds_per_step", lambda arms, *_: {arm.name: {"clip": 0.1}.get(arm.name, 0.2) for arm in arms}
    )


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do the runs in this process: a worker takes seconds to start."""

    monkeypatch.setattr(comparing, "_run", _run_here)


def _run_here(study: comparing.Study, folder: Path, part: str, jobs: int, threads: int, quiet: bool) -> bool:
    return work(folder, part, threads)


@pytest.mark.usefixtures("in_process")
def test_every_run_is_what_declip_train_gives(recipes: dict[str, str], table: Path, tmp_path: Path) -> None:
    outcome = tiny(recipes, table, tmp_path / "out", budgets=["samples", "compute"])
    assert outcome.complete
    assert sorted((row["arm"], row["pairs"], row["steps"]) for row in outcome.rows.values()) == [
        ("clip", 8, 8), ("clip", 8, 16), ("clip", 16, 8), ("clip", 16, 16), ("declip", 8, 8), ("declip", 16, 8),
    ]  # fmt: skip
    alone = train(
        recipes["clip"],
        {"data.max_pairs": 16, "train.steps": 16, "evaluation.retrieval": [str(table)]},
        out=tmp_path / "alone",
        quiet=True,
    )
    own = next(row for row in outcome.rows.values() if (row["arm"], row["pairs"], row["steps"]) == ("clip", 16, 16))
    assert own["loss"] == alone.metrics[-1]["loss"]
    assert own["samples"] == 16 * 8
    (measure,) = outcome.measures
    assert measure == f"{table}: R@1"
    assert outcome.curve("clip", "compute", measure).values[1] == (scores(alone.results)[measure],)
    kept = {path.name for path in folder_of(tmp_path / "out", outcome.study.cells()[0]).iterdir()}
    assert "checkpoints" not in kept
    assert {"result.json", "recipe.yaml", "metrics.jsonl"} <= kept


@pytest.mark.usefixtures("in_process")
def test_few_images_a_class_are_compared_by_one_measure(
    recipes: dict[str, str], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        for color in COLOURS[:3]:
            (tmp_path / "set" / split / color).mkdir(parents=True)
            for shape in SHAPES:
                draw(color, shape).save(tmp_path / "set" / split / color / f"{shape}.png")
    options = {"on": [f"folder:{tmp_path / 'set'}"], "protocols": ["few-shot"], "pairs": (8,), "seeds": 2}
    outcome = tiny(recipes, table, tmp_path / "out", **options)
    assert outcome.complete
    (measure,) = outcome.measures
    assert measure.endswith(": 1-shot, top-1")
    spreads = {row["results"][0]["runs"][0]["std"] for row in outcome.rows.values()}
    assert len(spreads) > 1
    assert [len(values) for values in outcome.curve("declip", "samples", measure).values] == [2]


@pytest.mark.usefixtures("in_process")
def test_it_goes_on_with_what_is_missing_only(recipes: dict[str, str], table: Path, tmp_path: Path) -> None:
    recipes = {"clip": recipes["clip"]}
    first = tiny(recipes, table, tmp_path / "out")
    study = read_study(tmp_path / "out")
    assert study is not None
    lost, kept = (folder_of(tmp_path / "out", cell) / "result.json" for cell in study.cells()[:2])
    written = kept.stat().st_mtime_ns
    lost.unlink()
    assert not read_outcome(tmp_path / "out").complete
    again = tiny(recipes, table, tmp_path / "out")
    assert again.complete
    assert kept.stat().st_mtime_ns == written
    assert again.measures == first.measures
    more = tiny(recipes, table, tmp_path / "out", pairs=(24,), seeds=2)
    assert (more.study.pairs, more.study.seeds, len(more.rows)) == ((8, 16, 24), (0, 1), 6)


@pytest.mark.usefixtures("in_process")
def test_a_recipe_edited_between_two_calls_is_not_averaged_with_its_earlier_self(
    recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    recipes = {"clip": recipes["clip"]}
    tiny(recipes, table, tmp_path / "out", pairs=(8,))
    text = Path(recipes["clip"]).read_text(encoding="utf-8")
    Path(recipes["clip"]).write_text(text.replace("warmup_steps: 2", "warmup_steps: 3"), encoding="utf-8")
    with pytest.raises(UserError, match=r"arm clip: train\.warmup_steps was 2, now 3"):
        tiny(recipes, table, tmp_path / "out", pairs=(8,), seeds=2)
    study = read_study(tmp_path / "out")
    assert study is not None
    assert study.seeds == (0,)
    with pytest.raises(UserError, match=r"train\.warmup_steps"):  # nor does a worker that is still there run it
        run_cell(study, replace(study.cells()[0], seed=1), tmp_path / "out")
    other = tmp_path / "clip-3.yaml"
    Path(recipes["clip"]).rename(other).with_name("clip.yaml").write_text(text, encoding="utf-8")
    both = tiny({**recipes, "clip-3": str(other)}, table, tmp_path / "out", pairs=(8,), reference="clip")
    assert [arm.name for arm in both.study.arms] == ["clip", "clip-3"]


@pytest.mark.usefixtures("in_process")
def test_every_arm_is_tuned_alike_on_pairs_that_no_run_takes(
    recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    validation = tmp_path / "validation.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    validation.write_text("".join(json.dumps({**r, "image": str(table.parent / r["image"])}) + "\n" for r in rows))
    outcome = tiny(
        recipes, table, tmp_path / "out", tune={"train.lr": [0.001, 0.01]}, tune_on=str(validation), tune_steps=4
    )
    assert sorted((row["arm"], row["steps"], row["seed"]) for row in outcome.tuning.values()) == [
        ("clip", 4, 1000), ("clip", 4, 1000), ("declip", 4, 1000), ("declip", 4, 1000),
    ]  # fmt: skip
    for arm in ("clip", "declip"):
        tries = {
            row["overrides"]["train.lr"]: scores(row["results"])[f"{validation}: R@1"]
            for row in outcome.tuning.values()
            if row["arm"] == arm
        }
        assert set(tries) == {0.001, 0.01}
        assert tries[outcome.study.chosen[arm]["train.lr"]] == max(tries.values())
    chosen = {row["arm"]: row["overrides"] for row in outcome.rows.values()}
    assert chosen == dict(outcome.study.chosen)


@pytest.mark.usefixtures("in_process")
def test_seeds_and_sizes_added_later_leave_the_tuning_as_it_was(
    recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    validation = tmp_path / "validation.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    validation.write_text("".join(json.dumps({**r, "image": str(table.parent / r["image"])}) + "\n" for r in rows))
    recipes = {"clip": recipes["clip"]}
    tuning = {"tune": {"train.lr": [0.01]}, "tune_on": str(validation), "tune_steps": 2}
    first = tiny(recipes, table, tmp_path / "out", **tuning)
    more = tiny(recipes, table, tmp_path / "out", pairs=(16, 20, 24), seeds=2, **tuning)
    assert more.study.tuning == first.study.tuning
    assert len(more.tuning) == 1
    assert more.complete
    with pytest.raises(UserError, match="tuning differs"):
        tiny(recipes, table, tmp_path / "out", tune_pairs=24, **tuning)


def test_a_comparison_that_was_stopped_before_its_timing_is_told(
    recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    comparing._open(replace(_study(recipes, table), seconds={}), tmp_path / "out")
    with pytest.raises(UserError, match="before its steps were timed"):
        read_outcome(tmp_path / "out")


@pytest.mark.usefixtures("in_process")
def test_a_run_that_fails_is_told_and_does_not_end_the_others(
    recipes: dict[str, str], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from declip.comparison import worker

    def fail_declip(study, cell, folder, threads):
        if cell.arm == "declip" and cell.pairs == 8:
            raise UserError("The loss is not finite.")
        return run_cell(study, cell, folder, threads)

    monkeypatch.setattr(worker, "run_cell", fail_declip)
    outcome = tiny(recipes, table, tmp_path / "out")
    assert not outcome.complete
    assert len(outcome.rows) == 3
    assert list(outcome.failures.values()) == ["The loss is not finite."]
    monkeypatch.setattr(worker, "run_cell", run_cell)
    again = tiny(recipes, table, tmp_path / "out")
    assert again.complete
    assert not again.failures


@contextmanager
def _once_it_goes_on(out: Path, act: Callable[[], object]) -> Iterator[None]:
    """Act when a run of the comparison in `out` logs its next row, unless the block has ended before."""
    logged, over = _rows_logged(out), threading.Event()

    def watch() -> None:
        while _rows_logged(out) <= logged:
            if over.wait(0.02):
                return
        act()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _rows_logged(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("runs/*/metrics.jsonl"))


def _workers(out: Path) -> list[int]:
    """The comparison's workers that are alive (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode().split("\0")
            if "declip.comparison.worker" in words and str(out) in words:
                found.append(int(path.parent.name))
    return found


def test_without_a_terminal_lines_tell_which_run_ended_and_how_far_the_others_are(
    recipes: dict[str, str],
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("declip.io.progress.FIRST", 0.0)
    monkeypatch.setattr("declip.io.progress.LONGEST", 0.0)
    tiny({"clip": recipes["clip"]}, table, tmp_path / "out", quiet=False)
    printed = capfd.readouterr().err
    assert "Timing a step of clip …" in printed
    first, second = read_study(tmp_path / "out").cells()  # type: ignore[union-attr]
    assert f"run 1 of 2 done: {first.id}" in printed
    assert f"run 2 of 2 done: {second.id}" in printed
    assert re.search(r"comparing +\d+ %  0/2 runs", printed)
    assert re.search(r"comparing +100 %  2/2 runs", printed)
    assert "━" not in printed


@linux
def test_killed_stopped_and_started_again_it_ends_as_if_it_had_gone_through(
    recipes: dict[str, str], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict = {"pairs": (16,), "overrides": {"train.steps": 60, "train.checkpoint_every": 50}}
    run = comparing._run
    monkeypatch.setattr(comparing, "_run", _run_here)
    whole = tiny(recipes, table, tmp_path / "whole", **options)

    out = tmp_path / "out"
    monkeypatch.setattr(comparing, "_run", run)
    with (
        _once_it_goes_on(out, lambda: [os.kill(worker, signal.SIGKILL) for worker in _workers(out)]),
        pytest.raises(UserError, match="ended with status -9"),
    ):
        tiny(recipes, table, out, **options)
    assert not read_outcome(out).complete

    words = [
        "compare", *recipes.values(), "train.steps=60", "train.checkpoint_every=50", "--pairs", "16", "--seeds", "1",
        "--dataset", str(table), "--task", "retrieval", "--budget", "samples", "--jobs", "1", "--quiet",
        "--out", str(out),
    ]  # fmt: skip
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are deaf to it
    try:
        with _once_it_goes_on(out, lambda: os.kill(os.getpid(), signal.SIGINT)):
            done = CliRunner().invoke(app, words)
    finally:
        signal.signal(signal.SIGINT, heard)
    assert done.exit_code == 130, done.output
    assert "Give the same command to go on" in done.output
    assert list(out.glob("runs/*/checkpoints/step-*"))  # the run under way was saved
    assert (out / "results.md").read_text(encoding="utf-8").count("Not finished") == 1
    assert not read_outcome(out).complete

    monkeypatch.setattr(comparing, "_run", _run_here)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = read_outcome(out)
    assert found.complete
    assert [(row["arm"], row["loss"], row["results"]) for _, row in sorted(found.rows.items())] == [
        (row["arm"], row["loss"], row["results"]) for _, row in sorted(whole.rows.items())
    ]


@linux
def test_workers_stop_when_the_process_that_started_them_is_gone(
    recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    comparing._open(replace(_study(recipes, table), steps=100_000), out)
    shell = 'trap "" TERM; "$@" & wait'
    words = ["sh", "-c", shell, "sh", sys.executable, "-m", "declip.comparison.worker", str(out), RUNS, "1"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        deadline = time.time() + 120
        while not _rows_logged(out) and time.time() < deadline:
            time.sleep(0.02)
        parent.kill()
    assert _workers(out)
    while _workers(out) and time.time() < deadline:
        time.sleep(0.1)
    assert time.time() < deadline
    assert list(out.glob("runs/*/checkpoints/step-*"))


def test_a_taken_run_is_left_to_the_one_who_took_it(recipes: dict[str, str], table: Path, tmp_path: Path) -> None:
    comparing._open(_study(recipes, table), tmp_path / "out")
    study = read_study(tmp_path / "out")
    assert study is not None
    (tmp_path / "out" / "runs").mkdir()
    taken = study.cells()[0]
    hold = "import sys, filelock; l = filelock.FileLock(sys.argv[1]); l.acquire(); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, f"{folder_of(tmp_path / 'out', taken)}.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    assert work(tmp_path / "out", RUNS, 1)
    found = read_outcome(tmp_path / "out")
    assert taken.id not in found.rows
    assert len(found.rows) == len(study.cells()) - 1
    holder.kill()  # its lock goes with it
    holder.wait()
    assert work(tmp_path / "out", RUNS, 1)
    assert read_outcome(tmp_path / "out").complete


def test_a_stop_asked_for_at_a_runs_last_step_stops_the_worker_too(
    recipes: dict[str, str], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from declip.training.trainer import Trainer

    take_steps = Trainer._take_steps

    def stopped_at_the_end(self: Trainer, monitor: object) -> None:
        take_steps(self, monitor)  # type: ignore[arg-type]
        self.stop_asked = True

    comparing._open(_study(recipes, table), tmp_path / "out")
    monkeypatch.setattr(Trainer, "_take_steps", stopped_at_the_end)
    assert not work(tmp_path / "out", RUNS, 1)
    assert len(read_outcome(tmp_path / "out").rows) == 1


def test_an_unexpected_error_leaves_its_trace_in_the_runs_folder(
    recipes: dict[str, str], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from declip.comparison import worker

    def broken(*_: object) -> bool:
        raise ZeroDivisionError("a bug")

    comparing._open(_study(recipes, table), tmp_path / "out")
    monkeypatch.setattr(worker, "run_cell", broken)
    assert work(tmp_path / "out", RUNS, 1)
    study = read_study(tmp_path / "out")
    assert study is not None
    reason = failure(tmp_path / "out", study.cells()[0])
    assert reason is not None
    assert "ZeroDivisionError: a bug" in reason
    assert (folder_of(tmp_path / "out", study.cells()[0]) / FAILURE).is_file()


def _study(recipes: dict[str, str], table: Path) -> comparing.Study:
    from declip.comparison.arms import arms_of

    return comparing.Study(
        arms=tuple(arms_of(recipes.values(), {})),
        pairs=(8,),
        seeds=(0,),
        steps=8,
        batch=8,
        on=(str(table),),
        protocols=("retrieval",),
        budgets=("samples",),
        reference="declip",
        seconds={"clip": 0.1, "declip": 0.2},
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": (4, 16)}, "4 pairs are fewer than one batch of 8"),
        ({"pairs": (8, 25)}, "holds 24 pairs, fewer than the 25 asked for"),
        ({"protocols": ["retrievel"]}, "Did you mean 'retrieval'"),
        ({"reference": "declipp"}, "Did you mean 'declip'"),
        ({"budgets": ["sample"]}, "Did you mean 'samples'"),
        ({"on": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"seeds": ()}, "at least one number of pairs and one seed"),
        ({"tune": {"train.lr": [0.1]}}, "Name one with --sweep-dataset"),
        ({"overrides": {"train.stepz": 3}}, "train.steps"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_is_made(
    options: dict, message: str, recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        tiny(recipes, table, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_value_to_tune_that_is_no_yaml_is_the_users_error(recipes: dict[str, str], tmp_path: Path) -> None:
    words = ["compare", recipes["clip"], "--pairs", "8", "--sweep", "train.lr=0.1,[1"]
    with pytest.raises(UserError, match=r"train\.lr=\[1"):
        CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")], catch_exceptions=False)


def test_the_set_that_chooses_is_not_reported_on(recipes: dict[str, str], table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would both choose and be reported"):
        tiny(recipes, table, tmp_path / "out", tune={"train.lr": [0.1]}, tune_on=str(table))


def test_a_folder_with_something_else_in_it_is_left_alone(recipes: dict[str, str], table: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and holds no comparison"):
        tiny(recipes, table, tmp_path / "out")


def test_a_value_that_no_recipe_takes_is_told_before_the_first_run(
    recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"train\.lr=-1"):
        tiny(recipes, table, tmp_path / "out", tune={"train.lr": [0.1, -1]}, tune_on="builtin:emoji-validation")
    assert not (tmp_path / "out").exists()
