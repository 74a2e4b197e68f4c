"""Reproduce a run of the papers: check the data, estimate the cost, train, and compare the accuracy with the papers'.

    python scripts/reproduce.py yfcc15m --data yfcc15m_clean_open_data.json --root /data/yfcc15m --gpus 8 \\
        --test imagenet:/data/imagenet --test paper11:/data/sets
    python scripts/reproduce.py yfcc15m --method clip --backbone r50 --data '/data/{00000..01538}.tar' --gpus 8
    python scripts/reproduce.py cc3m --method clip --data '/data/{00000..00331}.tar' --check     only checks and cost
    python scripts/reproduce.py synthetic --data runs/shards --gpus 2          small towers, to try this script

KEY=VALUE arguments are keys of the recipe. The same command continues a stopped call.
"""

import argparse
import gc
import json
import math
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import disk_usage
from statistics import fmean, mean
from typing import Any

import numpy as np
import torch
from operations import count_cost
from PIL import Image

import declip
from declip.data.pair import Pair, PairSource
from declip.data.plan import plan_views
from declip.data.text.tokenizer import padded_length
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset, with_classes
from declip.evaluation.protocols import PREFIX, SETS
from declip.evaluation.readers import NAMED
from declip.inspection.results import Inspection
from declip.inspection.scan import inspect_source
from declip.models.device import pick_device
from declip.recipe.load import load_recipe, parse_overrides, recipe_names
from declip.recipe.resolve import Facts, resolve
from declip.recipe.schema import ImageTowerConfig, Recipe, Train
from declip.runs.folder import Run
from declip.supervision.objective import needs_of
from declip.training.estimate import estimate
from declip.training.pairs import open_training_source

TOLERANCE = 0.05
"""Relative distance from the curve that is a problem; another order or precision changes a loss by less."""

PEAKS = {"A100": 312e12, "H100, H200": 989e12}
"""Peak of dense bfloat16 products in FLOP/s, from NVIDIA's data sheets."""

PEAK_FRACTIONS = (0.1, 0.2)
"""OpenCLIP reaches 0.12 to 0.16 on A100; the largest fraction that was found for a CLIP is 0.21."""

PAIRS_PER_CORE = 663
"""Photographs of 500 × 375 pixels that a core loads per second, two views each (docs/speed.md)."""


@dataclass(frozen=True)
class Experiment:
    """The runs of a paper on one set of pairs: recipe by method and image tower, keys, and number of pairs."""

    recipe: str
    pairs: int
    backbone: str = "vitb32"
    keys: dict[str, Any] = field(default_factory=dict)
    clip_keys: dict[str, Any] = field(default_factory=dict)


IMAGES = ImageTowerConfig()
"""CLIP's mean, standard deviation, interpolation and size."""

EXPERIMENTS = {
    "yfcc15m": Experiment("{method}-yfcc15m-{backbone}", 15_388_848),
    # The batch size and the learning rate of the paper's runs on CC3M are unknown: the official repository has
    # configurations for YFCC15M and 88 million pairs only. These are open_clip's for a ResNet-50 on CC3M, which reaches
    # 18.5 to 19 % (mlfoundations/open_clip#448). CLIP gets its views too, so that this number is an anchor.
    "cc3m": Experiment(
        "{method}-yfcc15m-{backbone}",
        3_318_333,
        "r50",
        {
            "data.columns.image": "image", "train.batch_size": 1024, "train.lr": 0.001, "train.weight_decay": 0.1,
            "train.warmup_steps": 2000, "train.epochs": 30,
        },
        {
            "views.image.scale": [0.9, 1.0], "views.image.color_jitter_prob": 0, "views.image.grayscale_prob": 0,
            "views.image.blur_prob": 0, "views.image.hflip_prob": 0, "logit_scale.min": None,
            **{f"image.{key}": getattr(IMAGES, key) for key in ("mean", "std", "interpolation", "crop_pct")},
        },
    ),
    "synthetic": Experiment(
        "demo-declip",
        20_000,
        keys={
            "train.steps": 200, "train.batch_size": 32, "train.log_every": 10, "train.checkpoint_every": 50,
            "train.precision": "fp32", "data.workers": 0, "nearest_neighbor.queue_size": 64,
            "evaluation.zero_shot": [], "evaluation.retrieval": [], "evaluation.final_zero_shot": [],
            "evaluation.final_retrieval": [],
        },
    ),
}  # fmt: skip

BENCHMARK, PAPER = "the authors' benchmark (arXiv 2203.05796)", "DeCLIP's paper (arXiv 2110.05208)"
ALIP = "table 3 of ALIP (arXiv 2308.08428)"
REPORTED: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {
    ("yfcc15m", "clip", "vitb32"): [("32.8", BENCHMARK, "63.7 33.2 34.6 20.1 50.1 35.7 2.6 15.5 59.9 1.2")],
    ("yfcc15m", "slip", "vitb32"): [("34.3", BENCHMARK, "50.7 25.5 33.3 23.5 49.0 34.7 2.8 14.4 59.9 1.7")],
    ("yfcc15m", "filip", "vitb32"): [("39.5", BENCHMARK, "65.5 33.5 43.1 24.1 52.7 50.7 3.3 24.3 68.8 3.2")],
    ("yfcc15m", "declip", "vitb32"): [("43.2", BENCHMARK, "66.7 38.7 52.5 33.8 60.8 50.3 3.8 27.7 74.7 2.1")],
    ("yfcc15m", "defilip", "vitb32"): [("45.0", BENCHMARK, "70.1 46.8 54.5 40.3 63.7 52.4 4.6 30.2 75.0 3.3")],
    ("yfcc15m", "clip", "r50"): [("37.2", BENCHMARK, ""), ("31.3", PAPER, "")],
    ("yfcc15m", "declip", "r50"): [("44.4", BENCHMARK, ""), ("41.9", PAPER, "")],
    ("yfcc15m", "slip", "r50"): [("28.5", BENCHMARK, "")],
    ("yfcc15m", "filip", "r50"): [("21.3", BENCHMARK, "")],
    ("cc3m", "clip", "r50"): [
        ("18.5 to 19", "mlfoundations/open_clip#448, 30 epochs", ""),
        ("20.6", f"{PAPER}, 32 epochs, second-hand", ""),
    ],
    ("cc3m", "declip", "r50"): [("27.2", f"{PAPER}, 32 epochs, second-hand", "")],
}  # fmt: skip
"""Zero-shot accuracy by experiment, method and image tower: on ImageNet, its source, and ALIP's on `SETS` in order."""


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
        part = image.crop((left, top, left + side, top + side)).resize((64, 64))
        return Pair.of(str(index), part, self._said(index))

    def _said(self, index: int) -> tuple[str, ...]:
        """The scene, and the part of it."""
        left, top, side = self._box(index)
        scene = ("an old chinese temple", "a large orange flower")[index % 2]
        place = f"{('top', 'middle', 'bottom')[top * 3 // 427]} {('left', 'center', 'right')[left * 3 // 640]}"
        return (
            f"{'a small' if side < 150 else 'a large'} part of {scene}, {place}, number {index}",
        )

    def _box(self, index: int) -> tuple[int, int, int]:
        generator = np.random.default_rng(index)
        side = int(generator.integers(80, 240))
        return int(generator.integers(0, 640 - side)), int(generator.integers(0, 427 - side)), side


def check_data(
    source: PairSource, recipe: Recipe, pairs: int, options: argparse.Namespace, out: Path
) -> tuple[list[str], Inspection]:
    """Check the number of pairs, broken pairs and copies of test images; return the problems."""
    sizes = {"size": recipe.image.size, "batch_size": recipe.train.batch_size}
    found = inspect_source(
        source, options.sample, check_leakage=options.check_leakage, progress=True, **sizes
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "data.json").write_text(found.to_json(), encoding="utf-8")
    read = f"{found.broken.fraction:.2%} of {found.read:,} broken"
    print(f"{found.total:,} pairs, the paper has {pairs:,}; {read}")
    problems = []
    if abs(found.total / pairs - 1) > 0.05:
        problems.append(f"{found.total:,} pairs instead of {pairs:,}: results do not compare")
    if found.broken.fraction > recipe.data.max_broken_fraction:
        reasons = "; ".join(
            f"{reason}, such as {row['examples'][0]}" for reason, row in found.reasons.items()
        )
        root = ". Is --root right (make: ROOT=)?" if "missing image" in found.reasons else ""
        problems.append(f"{found.broken.fraction:.1%} of the pairs are broken: {reasons}{root}")
    for leak in found.leakages:
        print(
            f"{leak.matches.count} of {leak.matches.of:,} pairs look like an image of {leak.name}"
        )
        if leak.matches.count:
            problems.append(
                f"{leak.matches.fraction:.2%} of the pairs look like images of {leak.name}: see {out}/data.json"
            )
    return problems, found


def tests_there(names: Sequence[str]) -> list[str]:
    """Open the test sets before training, and replace paper11:DIR by those of its eleven that are there."""
    there = [name for name in names if not name.startswith(PREFIX)]
    for name in there:
        with_classes(open_dataset(name).split("test"))
    for folder in (name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)):
        given = {name.partition(":")[0] for name in there}
        for kind in (kind for kind in SETS if kind not in given):
            try:
                there.append(open_dataset(f"{kind}:{Path(folder).expanduser() / kind}").name)
            except UserError as error:
                print(f"Without {kind}: {error}")
    if not there:
        print(
            "WARNING: this run will end without an accuracy, because no test set was given, or none was there. Give "
            "--test imagenet:DIR (make: IMAGENET=DIR) and --test paper11:DIR (SETS=DIR), or run the same command with "
            "them again after training."
        )
    return there


def expected_cost(recipe: Recipe, gpus: int, nodes: int, found: Inspection) -> str:
    """Format an estimate of time, memory and loading, computed from the towers."""
    train, context, processes = recipe.train, recipe.text.context_length, gpus * nodes
    # --- operations; captions are padded to the longest of the batch, or of a quarter of it with four buckets
    spread = (
        found.captions.tokens
        if found.captions
        else dict.fromkeys(("p25", "p50", "p75", "p99"), context)
    )
    longest = fmean(
        spread[name]
        for name in (("p25", "p50", "p75") if train.length_buckets > 1 else ()) + ("p99",)
    )
    plan = plan_views(recipe, needs_of(recipe))
    length = (
        context if plan.whole_context else padded_length(math.ceil(min(longest, context)), context)
    )
    counted, pairs = count_cost(recipe, length), train.steps * train.batch_size
    total = counted.flops * pairs
    # --- memory of a GPU
    share = math.ceil(train.batch_size / processes)
    stored = counted.activations * min(share, train.grad_cache_chunk or share) + counted.states
    # --- loading on a machine; torch's loader holds two batches of each worker in shared memory
    seconds = {
        card: [total / (peak * processes * part) for part in PEAK_FRACTIONS]
        for card, peak in PEAKS.items()
    }
    rate = pairs / seconds["H100, H200"][-1]
    cores = math.ceil(rate / PAIRS_PER_CORE / nodes)
    workers = math.ceil(cores / gpus) if recipe.data.workers == "auto" else recipe.data.workers
    shared = 2 * workers * gpus * share * len(plan.views) * 3 * recipe.image.size**2
    here = (
        f"; here it has {disk_usage('/dev/shm').total / 1e9:,.1f} GB"
        if Path("/dev/shm").is_dir()
        else ""
    )
    rows = {
        f"hours on {processes} GPUs": "".join(f"{part:>8.0%} of peak" for part in PEAK_FRACTIONS),
        **{
            f"  {card}": "".join(f"{s / 3600:>16,.1f}" for s in hours)
            for card, hours in seconds.items()
        },
        "memory of a GPU": f"{stored / 1e9:,.2g} GB for {share:,} pairs, without what torch reserves",
        "loading": f"{rate:,.0f} pairs/s for {PEAK_FRACTIONS[-1]:.0%} of an H100's peak: {cores:,} cores of each "
        f"machine at {PAIRS_PER_CORE} pairs/s",
        "/dev/shm": f"{shared / 1e9:.2g} GB of each machine for {workers} workers of each GPU{here}",
    }
    return "\n".join([
        f"Estimated, not measured: {counted.flops / 1e9:.3g} GFLOP a pair (the towers, captions of {length} tokens), "
        f"{total:.2g} FLOP in {train.steps:,} steps of {train.batch_size:,} pairs",
        *(f"  {name:<18} {row}" for name, row in rows.items()),
    ])  # fmt: skip


def cost(recipe: Recipe, gpus: int) -> str:
    """Format the expected time and memory, measured by a few steps on one GPU with its part of the batch."""
    if pick_device(recipe.train.device).type == "cpu" and recipe.image.size > 64:
        return "There is no GPU here on which a few steps could be measured."
    train = recipe.train.model_copy(update={"batch_size": max(1, recipe.train.batch_size // gpus)})
    text = estimate(recipe.model_copy(update={"train": train}))
    if torch.cuda.is_available():  # else this process would hold the memory that rank 0 needs
        gc.collect()
        torch.cuda.empty_cache()
    return f"on each of {gpus}: {text}"


def read_curve(path: Path, train: Train) -> dict[int, float]:
    """Read the losses of another run by step, and check them before days of training."""
    try:
        curve = {int(step): float(loss) for step, loss in json.loads(path.read_text()).items()}
        if not all(map(math.isfinite, curve.values())):
            raise ValueError("a loss is not finite")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--curve {path} cannot be read: {error}. Give the curve.json of a run folder."
        ) from None
    if not any(
        step % train.log_every == 0 or step == train.steps for step in curve if step <= train.steps
    ):
        raise UserError(
            f"--curve {path} has no step in common with this run, which logs every {train.log_every} of its "
            f"{train.steps:,}. Give another curve, or another train.log_every."
        )
    return curve


def compare_curve(run: Run, curve: dict[int, float] | None) -> list[str]:
    """Compare the loss of pairs with chance, and all losses with those of another run; return the problems."""
    losses = {row["step"]: row["loss"] for row in run.metrics}
    (run.folder / "curve.json").write_text(json.dumps(losses), encoding="utf-8")
    problems = [] if all(map(math.isfinite, losses.values())) else ["a loss is not finite"]
    name = "contrastive" if "contrastive" in run.recipe.active_losses else "late_interaction"
    contrastive = [row["losses"][name] for row in run.metrics]
    chance = math.log(run.recipe.train.batch_size)
    later = mean(contrastive[len(contrastive) // 2 :])
    shown = (
        f"{contrastive[0]:.2f} at step {run.metrics[0]['step']:,}, {later:.2f} in the second half"
    )
    print(f"{name} loss: {shown}; chance is ln({run.recipe.train.batch_size:,}) = {chance:.2f}")
    # An untrained model is at chance. Far above it: wrong scale or learning rate; staying there: nothing is learned.
    if contrastive[0] > chance + 1 or later > chance - 0.02:
        problems.append("the contrastive loss does not begin near chance, or stays there")
    if curve is None:
        return problems
    apart = {
        n: abs(losses[n] - curve[n]) / max(abs(curve[n]), 0.1)
        for n in sorted(curve.keys() & losses.keys())
    }
    if not apart:
        return [*problems, "the curve has no step in common with the run"]
    far = [step for step, distance in apart.items() if not distance <= TOLERANCE]
    print(
        f"{len(apart)} steps in common with the curve; the largest distance is {max(apart.values()):.2%}"
    )
    return problems + (
        [f"the loss leaves the curve at step {far[0]}: {len(far)} of {len(apart)} steps"]
        if far
        else []
    )


def measure(run: Path, tests: list[str], reported: list[tuple[str, str, str]], out: Path) -> None:
    """Evaluate the trained model on the test sets, and print its accuracy beside the reported ones."""
    published = {"imagenet": [f"{number} in {source}" for number, source, _ in reported]}
    for kind, number in zip(SETS, reported[0][2].split() if reported else (), strict=False):
        published[kind] = [f"{number} in {ALIP}"]
    model, rows = declip.load(run), []
    for name in tests:
        row = declip.evaluate(model, name, workers=None).to_dict()
        rows.append(row)
        (out / "accuracy.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        kind = name.partition(":")[0]
        metric = NAMED[kind].metric if kind in NAMED else "top1"
        others = "; reported: " + ", ".join(published[kind]) if published.get(kind) else ""
        print(
            f"zero-shot on {name}: {100 * row[metric]:.1f} % ({metric}, n = {row['n']:,}){others}",
            flush=True,
        )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="the training pairs")
    parser.add_argument(
        "--root", metavar="DIR", help="folder of the image paths of a table (data.image_root)"
    )
    parser.add_argument(
        "--method", default="declip", help="clip, slip, filip, declip (default) or defilip"
    )
    parser.add_argument("--backbone", help="vitb32 (default for yfcc15m) or r50 (default for cc3m)")
    parser.add_argument(
        "--test",
        action="append",
        default=[],
        metavar="SET",
        help="evaluated in the end: imagenet:DIR, paper11:DIR …",
    )
    parser.add_argument(
        "--check-leakage",
        action="append",
        default=[],
        metavar="SOURCE",
        help="test images to look for in the data",
    )
    parser.add_argument("--gpus", type=int, default=1, help="processes on each machine (default 1)")
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        help="machines (default 1); with more, the commands for them are printed",
    )
    parser.add_argument(
        "--sample", type=int, default=20_000, help="pairs that are read for the checks"
    )
    parser.add_argument(
        "--curve",
        type=Path,
        help="curve.json of another run like this one, to compare the loss with; of full size there is none",
    )
    parser.add_argument(
        "--out", type=Path, help="run folder (default runs/EXPERIMENT-METHOD-BACKBONE)"
    )
    parser.add_argument("--check", action="store_true", help="no training")
    parser.add_argument("--anyway", action="store_true", help="train despite problems of the data")
    options = parser.parse_intermixed_args()
    try:
        problems = run(options, EXPERIMENTS[options.experiment])
    except UserError as error:
        parser.exit(2, f"{error}\n")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    sys.exit(1 if problems else 0)


def recipe_of(options: argparse.Namespace, experiment: Experiment) -> Recipe:
    """Build the recipe of an experiment with the keys of the command."""
    names = {"method": options.method, "backbone": options.backbone or experiment.backbone}
    given = parse_overrides(options.keys)
    keys = experiment.keys | (experiment.clip_keys if options.method == "clip" else {}) | given
    if "train.steps" in given:
        keys["train.epochs"] = None
    keys["data.source"] = options.data
    if options.root is not None:
        keys["data.image_root"] = options.root
    name = experiment.recipe.format(**names)
    if name not in recipe_names() and not Path(name).is_file():
        raise UserError(f"There is no published run '{name}'. Give another --method or --backbone.")
    recipe = load_recipe(name, keys)
    processes = options.gpus * options.nodes
    if options.gpus < 1 or options.nodes < 1 or processes > recipe.train.batch_size:
        raise UserError(
            f"--gpus {options.gpus} and --nodes {options.nodes} make {processes} processes; give 1 to "
            f"{recipe.train.batch_size:,}, the pairs of a batch."
        )
    return recipe


def run(options: argparse.Namespace, experiment: Experiment) -> list[str]:
    """Reproduce an experiment and return the problems."""
    which = (options.experiment, options.method, options.backbone or experiment.backbone)
    reported = REPORTED.get(which, [])
    out = options.out or Path("runs") / (
        "synthetic" if which[0] == "synthetic" else "-".join(which)
    )
    # --- checks
    if options.experiment == "synthetic" and not Path(options.data).exists():
        shards = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "shards.py"))
        shards["main"](Crops(experiment.pairs), options.data, 64, pairs=500, workers=0)
    recipe, tests = recipe_of(options, experiment), tests_there(options.test)
    source = open_training_source(recipe.data, recipe.seed)
    recipe = resolve(recipe, Facts(pairs=len(source)))
    curve = None if options.curve is None else read_curve(options.curve, recipe.train)
    baseline = {
        where: number for number, where, _ in REPORTED.get((which[0], "clip", which[2]), [])
    }
    for number, where, _ in reported:
        clip = (
            f" (CLIP there: {baseline[where]} %)"
            if options.method != "clip" and where in baseline
            else ""
        )
        print(
            f"Reported zero-shot top-1 on ImageNet: {number} % in {where}{clip}; not measured here"
        )
    problems, found = check_data(source, recipe, experiment.pairs, options, out)
    print(expected_cost(recipe, options.gpus, options.nodes, found))
    if found.broken.fraction <= recipe.data.max_broken_fraction:
        print(cost(recipe, options.gpus * options.nodes))
    if options.check or (problems and not options.anyway):
        return problems + (
            [] if options.check else ["not trained; add --anyway (make: ARGS=--anyway) to train"]
        )
    # --- training, despite problems if asked to
    for problem in problems:
        print(f"PROBLEM, ignored: {problem}")
    problems = []
    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    words = ["train", str(out / "recipe.yaml"), "--out", str(out / "run"), "--resume"]
    finished = (out / "run").is_dir() and Run(out / "run").step >= recipe.train.steps
    if options.nodes > 1 and not finished:
        print(commands(options, words))
        return problems
    launcher = (
        f"torch.distributed.run --standalone --nproc-per-node {options.gpus} -m declip".split()
    )
    sys.stdout.flush()
    status = call([sys.executable, "-m", *(launcher if options.gpus > 1 else ["declip"]), *words])
    trained = Run(out / "run")
    if status or trained.step < recipe.train.steps:
        raise UserError(
            "The run did not finish; its messages are above. The same command continues it."
        )
    # --- results
    problems += compare_curve(trained, curve)
    if tests:
        measure(out / "run", tests, reported, out)
    return problems


def commands(options: argparse.Namespace, words: list[str]) -> str:
    """Format the commands that train on several machines."""
    nodes, gpus, given = options.nodes, options.gpus, " ".join(words)
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint HOST:29500 --max-restarts 3"
    return (
        f"On each of {nodes} machines that share this folder, of which HOST is one:\n"
        f"  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \\\n"
        f"  torchrun --nnodes {nodes} --nproc-per-node {gpus} {rendezvous} -m declip {given}\n"
        f"or with SLURM:\n"
        f"  sbatch --nodes {nodes} --gpus-per-node {gpus} scripts/train.sbatch {' '.join(words[1:-1])}\n"
        "Then run this command again: it compares the results."
    )


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
