"""The commands for several processes, as a user gives them."""

import json
import os
import re
import subprocess
import sys
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
    if meeting.offset and not marker.exists() and next(calls) == 5:
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
    tree = {**TINY, "weights": WEIGHTS["declip"], "data": {"source": str(table)}}
    tree["evaluation"] = {"retrieval": [str(table)], "zero_shot": []}
    tree["train"] = {**TINY["train"], "steps": 12, "checkpoint_every": 2}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


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
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert "Going on at step" in (run / "log.txt").read_text()
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_a_mistake_is_one_line_for_each_rank_and_no_trace(tmp_path: Path) -> None:
    done = torchrun("-m", "declip", "train", "declipp", "--out", tmp_path / "run")
    assert done.returncode != 0
    assert re.search(r"Error: rank [01]: Unknown recipe 'declipp'", done.stderr)
    own = [line for line in done.stderr.splitlines() if "cli.py" in line]
    assert own == []
