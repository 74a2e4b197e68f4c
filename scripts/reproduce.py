"""Reproduce a run of the papers: check the data, estimate the cost, train, evaluate, compare the loss with a curve.

    python scripts/reproduce.py yfcc15m --data '/data/{00000..01538}.tar' --gpus 8 \\
        --test imagenet:/data/imagenet --check-leakage /data/imagenet-val.csv
    python scripts/reproduce.py cc3m --data cc3m.csv --check          only the checks and the cost
    python scripts/reproduce.py synthetic --data runs/shards --gpus 2 small towers, to try this script

KEY=VALUE arguments are keys of the recipe. The same command continues a stopped call.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image

from declip.data.pair import Pair, PairSource
from declip.data.prepare import shard_source
from declip.errors import UserError
from declip.inspection.scan import inspect_source
from declip.models.device import pick_device
from declip.recipe.load import load_recipe, parse_overrides
from declip.recipe.schema import Recipe, Train
from declip.runs.folder import Run
from declip.training.estimate import estimate

TOLERANCE = 0.05
"""Relative distance from the curve that is a problem; another order or precision changes a loss by less."""


@dataclass(frozen=True)
class Experiment:
    """A run of a paper: its recipe, keys, number of pairs, and the reported zero-shot top-1 on ImageNet, in %."""

    recipe: str
    keys: dict[str, Any]
    pairs: int
    reported: str


EXPERIMENTS = {
    "yfcc15m": Experiment(
        "declip-yfcc15m-vitb32", {}, 15_388_848, "43.2 (CLIP: 32.8), ViT-B/32, official README; not measured here"
    ),
    # No source was found for the batch and the learning rate of the paper's runs on CC3M, and the official repository
    # has configurations for YFCC15M and 88 million pairs only. 1,024 pairs at 0.001 with weight decay 0.1 are what
    # open_clip's authors name for a ResNet-50 on CC3M (mlfoundations/open_clip issue 448, CLIP: about 19 %); SLIP's
    # took 4,096 pairs (facebookresearch/SLIP issue 9).
    "cc3m": Experiment(
        "declip-yfcc15m-r50",
        {"train.batch_size": 1024, "train.steps": 32 * 3_318_333 // 1024},
        3_318_333,
        "27.2 (CLIP: 20.6), ResNet-50, 32 epochs, the paper's ablation, second-hand; batch size and learning rate have "
        "another source; not measured here",
    ),
    "synthetic": Experiment(
        "demo-declip",
        {
            "train.steps": 200, "train.batch_size": 32, "train.log_every": 10, "train.checkpoint_every": 50,
            "train.precision": "fp32", "data.workers": 0, "nearest_neighbor.queue_size": 64,
            "evaluation.zero_shot": [], "evaluation.retrieval": [], "evaluation.final_zero_shot": [],
            "evaluation.final_retrieval": [],
        },
        20_000,
        "none",
    ),
}  # fmt: skip


class Crops(PairSource):
    """Random crops of scikit-learn's two photographs, each with a caption that names its place."""

    name = "synthetic photographs"

    def __init__(self, count: int) -> None:
        from sklearn.datasets import load_sample_images

        self.images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        image, (left, top, side) = self.images[index % 2], self._box(index)
        return Pair(str(index), image.crop((left, top, left + side, top + side)).resize((64, 64)), self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """The scene, and the part of it."""
        left, top, side = self._box(index)
        scene = ("an old chinese temple", "a large orange flower")[index % 2]
        place = f"{('top', 'middle', 'bottom')[top * 3 // 427]} {('left', 'center', 'right')[left * 3 // 640]}"
        return (f"{'a small' if side < 150 else 'a large'} part of {scene}, {place}, number {index}",)

    def _box(self, index: int) -> tuple[int, int, int]:
        generator = np.random.default_rng(index)
        side = int(generator.integers(80, 240))
        return int(generator.integers(0, 640 - side)), int(generator.integers(0, 427 - side)), side


def check_data(data: str, experiment: Experiment, tests: list[str], sample: int, out: Path) -> list[str]:
    """Check the number of pairs, broken pairs and copies of test images; return the problems."""
    found = inspect_source(data, sample, workers=0, check_leakage=tests)
    out.mkdir(parents=True, exist_ok=True)
    (out / "data.json").write_text(found.to_json(), encoding="utf-8")
    read = f"{found.broken.fraction:.2%} of {found.read:,} broken"
    print(f"{found.total:,} pairs, the paper has {experiment.pairs:,}; {read}")
    problems = []
    if abs(found.total / experiment.pairs - 1) > 0.05:
        problems.append(f"{found.total:,} pairs instead of {experiment.pairs:,}: results do not compare")
    if found.broken.fraction > 0.05:
        problems.append(f"{found.broken.fraction:.1%} of the pairs are broken: {', '.join(found.reasons)}")
    for leak in found.leakages:
        print(f"{leak.found.count} of {leak.found.of:,} pairs look like an image of {leak.name}")
        if leak.found.count:
            problems.append(
                f"{leak.found.fraction:.2%} of the pairs look like images of {leak.name}: see {out}/data.json"
            )
    return problems


def cost(recipe: Recipe, gpus: int) -> str:
    """Format the expected time and memory, measured by a few steps on one GPU with its part of the batch."""
    if pick_device(recipe.train.device).type == "cpu" and recipe.image.size > 64:
        return "The cost is measured on a GPU only; there is none here."
    train = recipe.train.model_copy(update={"batch_size": max(1, recipe.train.batch_size // gpus)})
    return f"on each of {gpus}: {estimate(recipe.model_copy(update={'train': train}))[1]}"


def read_curve(path: Path, train: Train) -> dict[int, float]:
    """Read the losses of another run by step, and check them before days of training."""
    try:
        curve = {int(step): float(loss) for step, loss in json.loads(path.read_text()).items()}
        if not all(map(math.isfinite, curve.values())):
            raise ValueError("a loss is not finite")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--curve {path} cannot be read: {error}. Give the curve.json of a run folder.") from None
    if not any(step % train.log_every == 0 or step == train.steps for step in curve if step <= train.steps):
        raise UserError(
            f"--curve {path} has no step in common with this run, which logs every {train.log_every} of its "
            f"{train.steps:,}. Give another curve, or another train.log_every."
        )
    return curve


def compare_curve(run: Run, curve: dict[int, float] | None) -> list[str]:
    """Compare the contrastive loss with chance, and all losses with those of another run; return the problems."""
    losses = {row["step"]: row["loss"] for row in run.metrics}
    (run.folder / "curve.json").write_text(json.dumps(losses), encoding="utf-8")
    problems = [] if all(map(math.isfinite, losses.values())) else ["a loss is not finite"]
    contrastive, chance = [row["losses"]["contrastive"] for row in run.metrics], math.log(run.recipe.train.batch_size)
    later = mean(contrastive[len(contrastive) // 2 :])
    shown = f"{contrastive[0]:.2f} at step {run.metrics[0]['step']:,}, {later:.2f} in the second half"
    print(f"contrastive loss: {shown}; chance is ln({run.recipe.train.batch_size:,}) = {chance:.2f}")
    # An untrained model is at chance. Far above it: wrong scale or learning rate; staying there: nothing is learned.
    if contrastive[0] > chance + 1 or later > chance - 0.02:
        problems.append("the contrastive loss does not begin near chance, or stays there")
    if curve is None:
        return problems
    apart = {n: abs(losses[n] - curve[n]) / max(abs(curve[n]), 0.1) for n in sorted(curve.keys() & losses.keys())}
    if not apart:
        return [*problems, "the curve has no step in common with the run"]
    far = [step for step, distance in apart.items() if not distance <= TOLERANCE]
    print(f"{len(apart)} steps in common with the curve; the largest distance is {max(apart.values()):.2%}")
    return problems + ([f"the loss leaves the curve at step {far[0]}: {len(far)} of {len(apart)} steps"] if far else [])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="the training pairs")
    parser.add_argument("--test", action="append", default=[], metavar="SET", help="evaluated in the end")
    parser.add_argument(
        "--check-leakage", action="append", default=[], metavar="SOURCE", help="test images to look for in the data"
    )
    parser.add_argument("--gpus", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--sample", type=int, default=20_000, help="pairs that are read for the checks")
    parser.add_argument(
        "--curve",
        type=Path,
        help="curve.json of another run like this one, to compare the loss with; of full size there is none",
    )
    parser.add_argument("--out", type=Path, help="run folder (default runs/EXPERIMENT)")
    parser.add_argument("--check", action="store_true", help="no training")
    parser.add_argument("--anyway", action="store_true", help="train despite problems of the data")
    options = parser.parse_intermixed_args()
    experiment, out = EXPERIMENTS[options.experiment], options.out or Path("runs") / options.experiment
    try:
        problems = run(options, experiment, out)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    sys.exit(1 if problems else 0)


def run(options: argparse.Namespace, experiment: Experiment, out: Path) -> list[str]:
    """Reproduce an experiment and return the problems."""
    keys = {**experiment.keys, **parse_overrides(options.keys), "data.source": options.data}
    if options.test:
        keys["evaluation.final_zero_shot"] = options.test
    if options.experiment == "synthetic" and not Path(options.data).exists():
        shard_source(Crops(experiment.pairs), options.data, size=64, shard_pairs=500, workers=0)
    recipe = load_recipe(experiment.recipe, keys)
    if not 1 <= options.gpus <= recipe.train.batch_size:
        raise UserError(f"--gpus is {options.gpus}; give 1 to {recipe.train.batch_size:,}, the pairs of a batch.")
    curve = None if options.curve is None else read_curve(options.curve, recipe.train)
    print(f"{experiment.recipe}: reported zero-shot top-1 on ImageNet, %: {experiment.reported}")
    problems = check_data(options.data, experiment, options.check_leakage, options.sample, out)
    print(cost(recipe, options.gpus))
    if options.check or (problems and not options.anyway):
        return problems
    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    launcher = f"torch.distributed.run --standalone --nproc-per-node {options.gpus} -m declip".split()
    words = ["train", str(out / "recipe.yaml"), "--out", str(out / "run"), "--resume"]
    sys.stdout.flush()
    status = call([sys.executable, "-m", *(launcher if options.gpus > 1 else ["declip"]), *words])
    trained = Run(out / "run")
    if status or trained.step < recipe.train.steps:
        raise UserError("The run did not finish; its messages are above. The same command continues it.")
    for result in trained.results:
        print(json.dumps(result))
    return problems + compare_curve(trained, curve)


def call(command: list[str]) -> int:
    """Run a command to its end, also after Ctrl-C, so that it saves a checkpoint; return its exit status."""
    # Handlers first: a signal in between would end this process. Functions, because a command inherits SIG_IGN.
    started: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        for process in started:
            process.terminate()

    earlier = signal.signal(signal.SIGINT, lambda *_: None), signal.signal(signal.SIGTERM, stop)
    try:
        started.append(subprocess.Popen(command))
        if asked:
            started[0].terminate()
        return started[0].wait()
    finally:
        signal.signal(signal.SIGINT, earlier[0])
        signal.signal(signal.SIGTERM, earlier[1])


if __name__ == "__main__":
    main()
