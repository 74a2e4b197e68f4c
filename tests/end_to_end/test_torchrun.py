"""The commands for several processes, as a user gives them, and the SLURM script with SLURM's commands played."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.run import config_from_args, parse_args

from conftest import tiny_tree
from declip.cli import app as cli
from declip.finetuning import outputs
from declip.interchange.declip_file import write_declip_file
from declip.recipe.load import load_recipe, recipe_names
from declip.runs.folder import read_rows
from declip.training import trainer
from declip.training.assemble import assemble, auto_workers
from interchange.towers import build

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.sbatch"
PLAYED = {
    "srun": 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi\n',
    "torchrun": """
        env -0 > "$ASKED/environment"; printf '%s\\0' "$@" > "$ASKED/part"; mv "$ASKED/part" "$ASKED/words"
        trap 'kill -TERM "$(cat "$ASKED/agent")"' TERM
        until [ -e "$ASKED/ended" ]; do sleep 0.05; done
    """,
}
"""SLURM's commands, and a torchrun that waits for the one below."""


def torchrun(asked):
    """What `torchrun` runs with the words and variables that were written, with ranks forked from this process."""
    os.environ |= dict(
        line.split("=", 1) for line in (asked / "environment").read_text().split("\0")[:-1]
    )
    config, _, words = config_from_args(parse_args((asked / "words").read_text().split("\0")[:-1]))
    config.start_method = "fork"
    try:
        elastic_launch(config, rank_that_exits)(*words[words.index("declip") + 1 :])
    finally:
        (asked / "ended").touch()


def children(pid):
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)


def family(pid):
    yield pid
    for child in children(pid):
        yield from family(child)


def rank(*words):
    # While a rank connects, a thread of the agent holds the C library's lock for names: a rank forked then hangs.
    end = time.monotonic() + 60
    while len(list(children(os.getppid()))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    sys.argv = ["declip", *words]
    cli.main()


def rank_that_exits(*words):
    """A rank that ends with its command; torch would hold a forked one for 30 s until the agent reads its result."""
    try:
        rank(*words)
    finally:
        os._exit(0)


def wait_for(path, alive):
    end = time.monotonic() + 200
    while not path.exists() and alive() and time.monotonic() < end:
        time.sleep(0.05)


def forked(function, *arguments):
    """A process of a function, without the calls of pytest: torch's agent logs the stack of calls at each change."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    forking = threading.Thread(target=process.start)
    forking.start()
    forking.join()
    return process


def mortal(marker, *words):
    """The command on one rank; of the first two, the second kills itself in its third step."""
    step, calls = trainer.training_step, iter(range(1000))
    outputs.write_finetuned = lambda *_: None  # no report and exports, which take seconds

    def deadly(learner, optimizer, batch, sync):
        result = step(learner, optimizer, batch, sync)
        if sync.offset and not marker.exists() and next(calls) == 2:
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    trainer.training_step = deadly
    rank(*words)


def agent(*given):
    """What `torchrun --standalone --nproc-per-node 2 --max-restarts 1` runs, with ranks forked from this process."""
    rendezvous = {
        "run_id": "test",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "local_addr": "127.0.0.1",
    }
    elastic_launch(
        LaunchConfig(1, 1, 2, max_restarts=1, start_method="fork", **rendezvous), mortal
    )(*given)


def test_an_error_of_all_ranks_is_printed_by_one_and_that_of_one_rank_too(
    tmp_path, monkeypatch, command
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    printed = []
    for rank, table in enumerate(("missing.csv", "missing.csv", "another.csv")):
        file = tmp_path / "attempt_0" / str(rank) / "error.json"
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        done = command("train", "demo-clip", "--data", table)
        assert (done.status, table in file.read_text()) == (2, True)
        printed.append(done.err)
    assert [text.count("\n") for text in printed] == [1, 0, 1]
    assert "rank 0: 'missing.csv'" in printed[0]
    assert "rank 2: 'another.csv'" in printed[2]


def test_torchrun_repeats_the_error_below_its_trace(tmp_path, monkeypatch, command):
    file = tmp_path / "0" / "error.json"
    file.parent.mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert command("train", "demo-clip", "--data", "missing.csv").status == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert "traceback : 'missing.csv' does not exist" in str(
        ChildFailedError("declip", {0: failure})
    )


def test_a_rank_that_dies_is_started_again_and_the_run_continues(table, tmp_path, capfd):
    """Of `finetune`, whose folder is locked once for both ranks before they split the pairs."""
    run, died = tmp_path / "run", tmp_path / "died"
    write_declip_file(build("vit"), tmp_path / "start.safetensors")
    words = (
        "finetune",
        table,
        "--from",
        tmp_path / "start.safetensors",
        "--freeze",
        "none",
        "--out",
        run,
        "--resume",
    )
    keys = (
        "train.steps=6",
        "train.batch_size=8",
        "train.log_every=2",
        "train.checkpoint_every=1",
        "data.workers=0",
    )
    keys += ("train.report_to=[]",)
    given = (died, *map(str, words), *keys, "--quiet")
    process = forked(agent, *given)
    process.join()
    printed, errors = capfd.readouterr()
    assert (process.exitcode, died.exists()) == (0, True), errors
    assert "cli/app.py" not in errors, "no trace of the survivor's"
    assert printed.count("Report: ") == 1, "only the first rank speaks"
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [2, 4, 6]
    assert "Resuming at step" in (run / "log.txt").read_text()


def test_a_slurm_job_whose_time_is_up_saves_asks_to_be_queued_again_and_continues(
    table, tmp_path, capfd
):
    """As schedulers do it: each rank hears SIGTERM twice, from outside and from torchrun, and each worker once."""
    commands, run, requeued, recipe, asked = (
        tmp_path / n for n in ("bin", "run", "requeued", "mine.yaml", "asked")
    )
    recipe.write_text(yaml.safe_dump(tiny_tree(table)))
    commands.mkdir()
    asked.mkdir()
    for name, text in PLAYED.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}")
        (commands / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "REQUEUED": str(requeued), "ASKED": str(asked),
        "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "2",
        "PORT": "29517",
    }  # fmt: skip
    words = [shutil.which("bash") or "bash", str(SCRIPT), str(recipe), "--quiet", "--out", str(run)]
    words += ["train.steps=30000", "train.checkpoint_every=10000", "data.workers=1"]
    job = subprocess.Popen(words, env=environment)
    wait_for(asked / "words", lambda: job.poll() is None)
    agent = forked(torchrun, asked)
    try:
        (asked / "agent").write_text(str(agent.pid))
        wait_for(run / "metrics.jsonl", agent.is_alive)
        job.send_signal(signal.SIGUSR1)
        for pid in list(family(agent.pid)):
            os.kill(pid, signal.SIGTERM)
        job.wait(100)
    finally:
        agent.kill()
        agent.join()
        job.kill()
    errors = capfd.readouterr().err
    assert job.returncode == 0, errors
    assert "DataLoader worker" not in errors
    assert requeued.read_text() == "requeue 7\n"
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert 0 < stopped < 30000
    overrides = {"train.steps": 30000, "train.checkpoint_every": 10000, "data.workers": 1}
    assert assemble(load_recipe(recipe, overrides), run, resume=True).progress.step == stopped


def test_srun_gets_the_processors_of_the_job(tmp_path):
    """Since SLURM 22.05 srun gives a step one processor, unless it is asked for more."""
    played = {**PLAYED, "srun": 'echo "${SRUN_CPUS_PER_TASK:-1}" > "$ASKED"\n'}
    for name, text in played.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "ASKED": str(tmp_path / "asked"),
        "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_CPUS_PER_TASK": "64",
    }  # fmt: skip
    subprocess.run(["bash", str(SCRIPT), "declip", "--out", "run"], env=environment, check=True)
    assert (tmp_path / "asked").read_text() == "64\n"


def test_loaders_of_the_published_recipes_fit_the_processors_of_the_job(monkeypatch):
    asked = {
        name: int(number)
        for name, number in re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", SCRIPT.read_text(), re.M)
    }
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(asked["gpus-per-node"]))
    monkeypatch.setattr(
        "declip.io.pool.os.sched_getaffinity", lambda _: range(asked["cpus-per-task"])
    )
    for name in (name for name in recipe_names() if "yfcc15m" in name):
        workers = load_recipe(name).data.workers
        workers = auto_workers(training=1) if workers == "auto" else workers
        assert workers > 1, name
        assert (workers + 1) * asked["gpus-per-node"] <= asked["cpus-per-task"], name


def test_the_slurm_script_asks_for_a_run_folder():
    done = subprocess.run(
        ["bash", str(SCRIPT), "declip"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--out FOLDER" in done.stderr
