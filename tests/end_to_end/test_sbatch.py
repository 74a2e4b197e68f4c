"""The SLURM script with SLURM's commands played by small ones."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from conftest import TINY, WEIGHTS
from declip.recipe.load import load_recipe
from declip.training.trainer import Trainer

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.sbatch"
SRUN = '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi\n'


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_asks_to_be_queued_again_and_goes_on(table: Path, tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    torchrun = f'#!/bin/bash\nexec "{sys.executable}" -m torch.distributed.run "$@"\n'
    (commands / "torchrun").write_text(torchrun)
    (commands / "torchrun").chmod(0o755)
    tree = {**TINY, "loss_weights": WEIGHTS["clip"], "data": {"source": str(table), "workers": 0}}
    tree["train"] = {**TINY["train"], "steps": 30000, "checkpoint_every": 10000}
    recipe, run, requeued = tmp_path / "mine.yaml", tmp_path / "run", tmp_path / "requeued"
    recipe.write_text(yaml.safe_dump(tree))
    environment = {
        **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "REQUEUED": str(requeued), "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "1",
        "PORT": "29517",
    }  # fmt: skip
    words = [shutil.which("bash") or "bash", str(SCRIPT), str(recipe), "--quiet", "--out", str(run)]
    job = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    waited = time.monotonic()
    while not metrics.exists() and job.poll() is None and time.monotonic() - waited < 200:
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    assert "exitcode" not in errors, "torchrun takes the stop for a failure"
    assert requeued.read_text() == "requeue 7\n"
    assert not (run / "stop").exists()
    stopped = int(next((run / "checkpoints").glob("step-*")).name.removeprefix("step-"))
    assert 0 < stopped < 30000

    again = Trainer(load_recipe(recipe), run, resume=True, quiet=True)
    assert again.step == stopped


def test_the_script_asks_for_a_run_folder() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "declip"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--out FOLDER" in done.stderr
