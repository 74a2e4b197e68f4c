"""Comparisons from beginning to end: what is run, what goes on after a stop, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from comparison.conftest import tiny
from declip.comparison import compare as comparing
from declip.comparison.cell import folder_of, run_cell
from declip.comparison.outcome import read_outcome, scores
from declip.comparison.study import read_study
from declip.comparison.worker import FAILURE, RUNS, failure, work
from declip.errors import UserError
from declip.training.trainer import train

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

    def run(study, folder, part, jobs, threads, quiet):
        return work(folder, part, threads)

    monkeypatch.setattr(comparing, "_run", run)


@pytest.mark.usefixtures("in_process")
def test_every_run_is_what_declip_train_gives(recipes: dict[str, str], table: Path, tmp_path: Path) -> None:
    outcome = tiny(recipes, table, tmp_path / "out", budgets=["samples", "compute"])
    assert outcome.complete
    assert sorted((row["arm"], row["pairs"], row["steps"]) for row in outcome.rows.values()) == [
        ("clip", 8, 8), ("clip", 8, 16), ("clip", 16, 8), ("clip", 16, 16), ("declip", 8, 8), ("declip", 16, 8),
    ]  # fmt: skip
    alone = train(
        recipes["clip"],
        {"data.pairs": 16, "train.steps": 16, "evaluation.retrieval": [str(table)]},
        out=tmp_path / "alone",
        quiet=True,
    )
    own = next(row for row in outcome.rows.values() if (row["arm"], row["pairs"], row["steps"]) == ("clip", 16, 16))
    assert own["loss"] == alone.metrics[-1]["total"]
    assert own["samples"] == 16 * 8
    (measure,) = outcome.measures
    assert measure == f"{table.name}: R@1"
    assert outcome.curve("clip", "compute", measure).values[1] == (scores(alone.results)[measure],)
    kept = {path.name for path in folder_of(tmp_path / "out", outcome.study.cells()[0]).iterdir()}
    assert "checkpoints" not in kept
    assert {"result.json", "recipe.yaml", "metrics.jsonl"} <= kept


@pytest.mark.usefixtures("in_process")
def test_it_goes_on_with_what_is_missing_only(recipes: dict[str, str], table: Path, tmp_path: Path) -> None:
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
    assert (more.study.pairs, more.study.seeds, len(more.rows)) == ((8, 16, 24), (0, 1), 12)


@pytest.mark.usefixtures("in_process")
def test_every_arm_is_tuned_alike_on_pairs_that_no_run_takes(
    recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    validation = tmp_path / "validation.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    validation.write_text("".join(json.dumps({**r, "image": str(table.parent / r["image"])}) + "\n" for r in rows))
    outcome = tiny(
        recipes, table, tmp_path / "out", tune={"train.lr_peak": [0.001, 0.01]}, tune_on=str(validation), tune_steps=4
    )
    assert sorted((row["arm"], row["steps"], row["seed"]) for row in outcome.tuning.values()) == [
        ("clip", 4, 1000), ("clip", 4, 1000), ("declip", 4, 1000), ("declip", 4, 1000),
    ]  # fmt: skip
    for arm in ("clip", "declip"):
        tries = {
            row["overrides"]["train.lr_peak"]: scores(row["results"])["validation.jsonl: R@1"]
            for row in outcome.tuning.values()
            if row["arm"] == arm
        }
        assert set(tries) == {0.001, 0.01}
        assert tries[outcome.study.chosen[arm]["train.lr_peak"]] == max(tries.values())
    chosen = {row["arm"]: row["overrides"] for row in outcome.rows.values()}
    assert chosen == dict(outcome.study.chosen)


@pytest.mark.usefixtures("in_process")
def test_seeds_and_sizes_added_later_leave_the_tuning_as_it_was(
    recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    validation = tmp_path / "validation.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    validation.write_text("".join(json.dumps({**r, "image": str(table.parent / r["image"])}) + "\n" for r in rows))
    tuning = {"tune": {"train.lr_peak": [0.01]}, "tune_on": str(validation), "tune_steps": 2}
    first = tiny(recipes, table, tmp_path / "out", **tuning)
    more = tiny(recipes, table, tmp_path / "out", pairs=(16, 20, 24), seeds=2, **tuning)
    assert more.study.tuning == first.study.tuning
    assert len(more.tuning) == 2
    assert more.complete
    with pytest.raises(UserError, match="tuning differs"):
        tiny(recipes, table, tmp_path / "out", tune_pairs=24, **tuning)


def test_a_comparison_that_was_stopped_before_its_timing_is_told(
    recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

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


def _command(recipes: dict[str, str], table: Path, out: Path, steps: int = 8) -> list[str]:
    return [
        sys.executable, "-m", "declip", "compare", *recipes.values(), f"train.steps={steps}", "--pairs", "8,16",
        "--seeds", "1", "--on", str(table), "--protocol", "retrieval", "--budget", "samples", "--jobs", "1", "--quiet",
        "--out", str(out),
    ]  # fmt: skip


def _started(command: list[str], out: Path) -> subprocess.Popen[bytes]:
    """Start a comparison and wait until its first run has logged a row."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, preexec_fn=_hear_sigint, **quiet)
    deadline = time.time() + 120
    while not list((out / "runs").glob("*/metrics.jsonl")) and time.time() < deadline:
        time.sleep(0.02)
    return process


def _hear_sigint() -> None:
    """A shell's background jobs, and what they start, are deaf to it: the tests may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _workers(out: Path) -> list[int]:
    """The comparison's workers that are alive (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode().split("\0")
            if "declip.comparison.worker" in words and str(out) in words:
                found.append(int(path.parent.name))
    return found


@linux
def test_killed_and_started_again_it_ends_as_if_never_killed(
    recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    whole = tiny(recipes, table, tmp_path / "whole")
    command = _command(recipes, table, tmp_path / "killed")
    process = _started(command, tmp_path / "killed")
    process.kill()
    for worker in _workers(tmp_path / "killed"):
        os.kill(worker, signal.SIGKILL)
    process.wait()
    assert not read_outcome(tmp_path / "killed").complete
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read_outcome(tmp_path / "killed")
    assert found.complete
    losses = {(row["arm"], row["pairs"]): row["loss"] for row in found.rows.values()}
    assert losses == {(row["arm"], row["pairs"]): row["loss"] for row in whole.rows.values()}
    assert [row["results"] for row in sorted(found.rows.values(), key=str)] == [
        row["results"] for row in sorted(whole.rows.values(), key=str)
    ]


def test_control_c_saves_the_runs_and_says_how_to_go_on(recipes: dict[str, str], table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _started(_command(recipes, table, out, steps=100_000), out)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert list(out.glob("runs/*/checkpoints/step-*"))  # the run under way was saved
    assert (out / "results.md").read_text(encoding="utf-8").count("Not finished") == 1
    assert not read_outcome(out).complete


@linux
def test_workers_stop_when_the_process_that_started_them_is_gone(
    recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = _started(_command(recipes, table, out, steps=100_000), out)
    process.kill()
    process.wait()
    deadline = time.time() + 60
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
        ({"tune": {"train.lr_peak": [0.1]}}, "Name one with --tune-on"),
        ({"overrides": {"train.stepz": 3}}, "train.steps"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_is_made(
    options: dict, message: str, recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        tiny(recipes, table, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_set_that_chooses_is_not_reported_on(recipes: dict[str, str], table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would both choose and be reported"):
        tiny(recipes, table, tmp_path / "out", tune={"train.lr_peak": [0.1]}, tune_on=str(table))


def test_a_folder_with_something_else_in_it_is_left_alone(recipes: dict[str, str], table: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and holds no comparison"):
        tiny(recipes, table, tmp_path / "out")


def test_a_value_that_no_recipe_takes_is_told_before_the_first_run(
    recipes: dict[str, str], table: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"train\.lr_peak=-1"):
        tiny(recipes, table, tmp_path / "out", tune={"train.lr_peak": [0.1, -1]}, tune_on="builtin:emoji-validation")
    assert not (tmp_path / "out").exists()
