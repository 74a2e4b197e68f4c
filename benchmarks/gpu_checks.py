"""What must hold on CUDA: a resumed run equals one never stopped, and two processes equal one. Parts of gpu.py."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from declip.recipe.load import load_recipe
from declip.runs.checkpoint import list_checkpoints, load_checkpoint
from declip.training.step import training_step
from declip.training.trainer import Trainer
from pairs import InMemory, Shapes, texts_of
from parts import build
from step import TOWERS

if TYPE_CHECKING:
    from gpu import Bench


def run_keys(bench: "Bench", source: Path, **train: Any) -> dict[str, Any]:
    """Overrides for a short run on drawn shapes."""
    keys: dict[str, Any] = {
        "data.source": str(source), "data.workers": 0, "train.steps": 6, "train.batch_size": 16, "train.log_every": 1,
        "train.checkpoint_every": 3, "train.keep_checkpoints": 9, "train.device": str(bench.device),
        "train.precision": bench.precision, "evaluation.zero_shot": [], "evaluation.retrieval": [],
        "evaluation.final_zero_shot": [], "evaluation.final_retrieval": [], "nearest_neighbor.queue_size": 64,
    }  # fmt: skip
    if not bench.tiny:
        keys |= {"image.model": TOWERS["ViT-B-32"], "image.size": 224, "train.batch_size": 128}
    return keys | {f"train.{name}": value for name, value in train.items()}


def draw_pairs(folder: Path, count: int = 128) -> Path:
    """Write a table of drawn shapes."""
    shapes, lines = Shapes(), []
    for number in range(count):
        shapes[number].image.save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": shapes.captions(number)[0]}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def train(recipe: str, keys: dict[str, Any], folder: Path, resume: bool = False) -> list[float]:
    """Train a run, and give the loss of each step."""
    run = Trainer(load_recipe(recipe, keys), folder, resume=resume, quiet=True).train()
    return [row["loss"] for row in run.metrics]


def end_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint."""
    last = load_checkpoint(list_checkpoints(folder)[-1])
    return {**last.weights, **last.training}


def resume(bench: "Bench") -> list[dict[str, Any]]:
    """Whether a resumed run equals one never stopped bit for bit in deterministic mode, and what that mode costs."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        keys = run_keys(bench, draw_pairs(folder))
        torch.use_deterministic_algorithms(True)
        try:
            train("demo-declip", keys, folder / "whole")
            shutil.copytree(folder / "whole", folder / "resumed")
            shutil.rmtree(list_checkpoints(folder / "resumed")[-1])
            train("demo-declip", keys, folder / "resumed", resume=True)
            whole, resumed = end_of(folder / "whole"), end_of(folder / "resumed")
            equal = whole.keys() == resumed.keys() and all(torch.equal(whole[n], resumed[n]) for n in whole)
            rows: list[dict[str, Any]] = [{"what": "resumed = never stopped, deterministic mode", "value": equal}]
            built = build(
                load_recipe("demo-declip", keys), InMemory(texts_of(Shapes(), "joined", 256), 64), bench.device
            )
            batch = next(built.loader).to(bench.device)
            slow = bench.seconds(lambda: training_step(built.step, batch))
        finally:
            torch.use_deterministic_algorithms(False)
        fast = bench.seconds(lambda: training_step(built.step, batch))
    return [*rows, {"what": "time of deterministic mode", "value": round(slow / fast, 3)}]


def _rank(rank: int, backend: str, folder: str, keys: dict[str, Any], cuda: bool) -> None:
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        keys = {**keys, "train.device": f"cuda:{rank % torch.cuda.device_count()}"}
    where = f"file://{folder}/meet"
    dist.init_process_group(backend, init_method=where, rank=rank, world_size=2)
    losses = train("demo-declip", keys, Path(folder) / "run")
    if rank == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def two_processes(bench: "Bench") -> list[dict[str, Any]]:
    """DDP with synchronized batch norm, and FSDP2, on two processes against one: the largest difference of the loss.

    On one GPU NCCL may refuse two processes; gloo is tried then, through the host's memory.
    """
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = draw_pairs(folder)
        for strategy, tower in (
            ("ddp", {"image.model": "declip_conv_tiny", "image.size": 32}),
            ("fsdp", {"image.model": "declip_vit_tiny", "image.size": 32}),
        ):
            keys = run_keys(bench, source, strategy=strategy, precision="fp32", steps=4) | tower
            one = train("demo-declip", keys, folder / f"{strategy}-one")
            for backend in ("nccl", "gloo") if bench.cuda else ("gloo",):
                place = folder / f"{strategy}-{backend}"
                place.mkdir()
                row = {"what": f"{strategy} on two processes, {backend}"}
                try:
                    method = "spawn" if bench.cuda else "fork"
                    mp.start_processes(_rank, (backend, str(place), keys, bench.cuda), nprocs=2, start_method=method)
                except Exception as error:  # of NCCL, of a rank
                    rows.append(row | {"note": str(error).strip().splitlines()[-1][:200]})
                    continue
                two = json.loads((place / "losses.json").read_text())
                rows.append(row | {"value": max(abs(a - b) for a, b in zip(one, two, strict=True))})
                break
    return rows
