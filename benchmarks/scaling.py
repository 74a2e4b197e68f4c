"""What a step moves and computes on W processes: a model on paper, and what two processes on this machine really do.

python benchmarks/scaling.py                  the model: 1 to 512 processes, ViT-B/32 and ResNet-50 at full size
python benchmarks/scaling.py --measure        bytes counted in the collectives, and seconds a step (weak scaling)
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training import distributed
from declip.training.setup import plan_of
from declip.training.trainer import Trainer

FLOAT = 4
FORWARD = {"clip-yfcc15m-vitb32": 14.8e9, "declip-yfcc15m-vitb32": 22.7e9}
"""Operations of the towers a pair, forward, at 224 px (captions cut to 32 tokens for DeCLIP)."""

ASSUMED = {"operations a second": 200e12, "bytes a second": 25e9}
"""A GPU at a fifth of an H100's bfloat16 peak, and 200 Gbit/s a GPU: assumptions, not measurements."""


SIZES = ((1, 512), (2, 512), (8, 512), (64, 512), (64, 64), (512, 64))
"""Processes and pairs of each; 64 × 64 is the papers' batch of 4,096."""


def sizes(recipe: Recipe) -> tuple[int, int]:
    """Learned parameters, and floats of a pair's row in the one gather."""
    with torch.device("meta"):
        model = DualEncoder.from_recipe(recipe)
        objective = Objective(recipe, model)
    parameters = sum(p.numel() for m in (model, objective) for p in m.parameters() if p.requires_grad)
    plan, losses = plan_of(recipe), recipe.active_losses
    row = (len(plan.views) + plan.texts.count) * recipe.embed_dim + 2
    row += 2 * plan.texts.count if "nearest_neighbor" in losses else 0
    row += plan.texts.mask_probability is not None
    row += 2 * recipe.simclr.widths[1] if "simclr" in losses else 0
    return parameters, row


def matrices(recipe: Recipe) -> int:
    """Logit matrices of own rows against all ranks' rows."""
    both_ways = 2 if recipe.nearest_neighbor.symmetric else 1
    count = {"contrastive": 2, "multi_view": 6, "nearest_neighbor": 4 * both_ways}
    return sum(count.get(loss, 0) for loss in recipe.active_losses)


def step_model(name: str, ranks: int, local: int) -> dict[str, float | str | int]:
    """What one process moves, keeps and computes in a step."""
    recipe = load_recipe(name)
    parameters, row = sizes(recipe)
    all_pairs, d = ranks * local, recipe.embed_dim
    features = (ranks - 1) * local * row * FLOAT
    gradients = 2 * (ranks - 1) / ranks * parameters * FLOAT
    towers = 3 * FORWARD[name] * local
    contrast = 3 * 2 * matrices(recipe) * local * all_pairs * d
    queue = (
        2 * plan_of(recipe).texts.count * local * recipe.nearest_neighbor.queue_size * d
        if "nearest_neighbor" in recipe.active_losses
        else 0
    )
    compute = (towers + contrast + queue) / ASSUMED["operations a second"]
    exchange = 2 * features / ASSUMED["bytes a second"]  # nothing overlaps with it
    exposed = max(0.0, gradients / ASSUMED["bytes a second"] - compute * 2 / 3)  # beyond the backward pass
    return {
        "recipe": name, "processes": ranks, "pairs each": local,
        "MB of features (there and back)": round(2 * features / 1e6, 1),
        "MB of gradients": round(gradients / 1e6, 1),
        "MB of logits": round(matrices(recipe) * local * all_pairs * FLOAT / 1e6, 1),
        "contrast / towers %": round(100 * contrast / towers, 2),
        "queue / towers %": round(100 * queue / towers, 2),
        "queue / towers %, were all captions looked up everywhere": round(100 * queue * ranks / towers, 2),
        "efficiency %, assumed": round(100 * compute / (compute + exchange + exposed), 1),
        "ms of towers, assumed": round(1e3 * towers / ASSUMED["operations a second"], 1),
        "ms of features, assumed": round(1e3 * 2 * features / ASSUMED["bytes a second"], 2),
        "ms of gradients, assumed, during the backward pass": round(1e3 * gradients / ASSUMED["bytes a second"], 1),
    }  # fmt: skip


WARM = 5
"""Steps before the clock counts."""

SMALL = {
    "train.steps": 40, "train.log_every": 40, "train.checkpoint_every": 1000, "data.workers": 0,
    "evaluation.zero_shot": [], "evaluation.retrieval": [], "evaluation.final_zero_shot": [],
    "evaluation.final_retrieval": [],
}  # fmt: skip


def measured(rank: int, ranks: int, folder: str, name: str, local: int) -> None:
    """Train some steps and write seconds a step and bytes that each collective received."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet{ranks}{name}", rank=rank, world_size=ranks)
    received: dict[str, int] = defaultdict(int)

    collective = distributed.all_gather_with_gradient

    def counted(own: torch.Tensor) -> Any:
        parts = collective(own)
        received["gather"] += (len(parts) - 1) * own.numel() * own.element_size()
        return parts

    distributed.all_gather_with_gradient = counted  # type: ignore[assignment]
    recipe = load_recipe(name, {**SMALL, "train.batch_size": local * ranks})
    trainer = Trainer(recipe, Path(folder) / f"{name}-{ranks}", quiet=True)
    seconds: list[float] = []
    sync = trainer.hosts.sync_step

    def clocked(*arguments: Any) -> Any:
        seconds.append(time.perf_counter())
        return sync(*arguments)

    trainer.hosts.sync_step = clocked  # type: ignore[method-assign]
    trainer.train()
    steps = [after - before for before, after in pairwise(seconds[WARM:])]
    result = {"seconds a step": round(median(steps), 4), **{k: v / recipe.train.steps for k, v in received.items()}}
    (Path(folder) / f"{name}-{ranks}-{rank}.json").write_text(json.dumps(result))


def weak_scaling(name: str, local: int) -> list[dict[str, Any]]:
    """One and two processes with the same number of pairs each."""
    rows = []
    with TemporaryDirectory() as folder:
        for ranks in (1, 2):
            mp.start_processes(measured, (ranks, folder, name, local), nprocs=ranks, start_method="fork")
            found = json.loads((Path(folder) / f"{name}-{ranks}-0.json").read_text())
            parameters, row = sizes(load_recipe(name))
            rows.append(
                {
                    "recipe": name,
                    "processes": ranks,
                    "pairs each": local,
                    **found,
                    "model: gather bytes": (ranks - 1) * local * row * FLOAT,
                    "model: parameters": parameters,
                }
            )
    return rows


def main() -> None:
    """Print rows of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--local", type=int, default=64)
    options = parser.parse_args()
    if options.measure:
        rows = [row for name in ("demo-clip", "demo-declip-keywords") for row in weak_scaling(name, options.local)]
    else:
        rows = [step_model(name, ranks, local) for name in FORWARD for ranks, local in SIZES]
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
