"""The commands for several processes, as a user gives them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conftest import TINY, WEIGHTS

DEADLY = """
import os, signal, sys
from pathlib import Path
from declip.training import trainer
from declip.cli.app import main

step, marker = trainer.training_step, Path(sys.argv.pop(1))

def deadly(parts, batch, meeting):
    result = step(parts, batch, meeting)
    if meeting.offset and not marker.exists() and next(calls) == 2:
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return result

calls = iter(range(1000))
trainer.training_step = deadly
main()
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@pytest.fixture
def recipe(table: Path, tmp_path: Path) -> Path:
    tree = {**TINY, "loss_weights": WEIGHTS["clip"], "data": {"source": str(table), "workers": 0}}
    tree["train"] = {**TINY["train"], "steps": 6, "checkpoint_every": 1}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


def family(pid: int) -> Iterator[int]:
    """A process and all that come from it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from family(int(child))


@pytest.mark.slow
def test_torchrun_that_is_told_to_end_with_all_its_processes_saves(recipe: Path, tmp_path: Path) -> None:
    """As a scheduler does it: each rank hears SIGTERM twice, from it and from torchrun, and each worker once."""
    run = tmp_path / "run"
    keys = ["train.steps=100000", "train.checkpoint_every=50000", "data.workers=1", "--out", str(run), "--quiet"]
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "declip", "train", str(recipe), *keys],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        for pid in list(family(process.pid)):
            os.kill(pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "DataLoader worker" not in errors
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert 0 < int(checkpoint.name.removeprefix("step-")) < 100000


@pytest.mark.slow
def test_a_rank_that_dies_is_started_again_and_the_run_goes_on(recipe: Path, tmp_path: Path) -> None:
    script = tmp_path / "deadly.py"
    script.write_text(DEADLY)
    run = tmp_path / "run"
    words = (script, tmp_path / "died", "train", recipe, "--out", run, "--resume", "--quiet")
    done = torchrun("--max-restarts", 1, *words)
    assert done.returncode == 0, done.stderr
    assert "cli.py" not in done.stderr, "no trace of the survivor's"
    assert (tmp_path / "died").exists()
    assert done.stdout.count("Report: ") == 1, "only the first rank speaks"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert "Resuming at step" in (run / "log.txt").read_text()


@pytest.mark.slow
def test_a_mistake_is_one_line_for_each_rank_and_no_trace(tmp_path: Path) -> None:
    done = torchrun("-m", "declip", "train", "declipp", "--out", tmp_path / "run")
    assert done.returncode != 0
    assert re.search(r"Error: rank [01]: Unknown recipe 'declipp'", done.stderr)
    own = [line for line in done.stderr.splitlines() if "cli.py" in line]
    assert own == []
