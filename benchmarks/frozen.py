"""Compare ways to train the heads of frozen towers on few pairs.

    python benchmarks/frozen.py OUT.jsonl SETS ARMS PAIRS SEEDS [KEY=VALUE]…

Each line of the result is one run on one set: arm, number of pairs, seed, top-1, top-5 and R@10. Runs that the file
has are not repeated.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from declip.evaluation.encode import Encoder
from declip.evaluation.protocols import Options, evaluate_all
from declip.recipe.load import load_recipe
from declip.training.trainer import Trainer

FROZEN = {
    "data.source": "builtin:emoji",
    "image.size": 128,
    "finetune": {
        "pretrained": "builtin:lite0-minilm",
        "freeze_image_blocks": "all",
        "freeze_text_blocks": "all",
        "cached_views": 8,
    },
    "views.image": {"scale": [0.8, 1.0], "color_jitter": [0.13, 0.13, 0.13, 0.03], "grayscale_prob": 0, "blur_prob": 0},
    "train.batch_size": 256,
    "train.steps": 500,
    "train.lr": 0.001,
    "train.warmup_steps": 50,
    "train.precision": "bf16",
    "train.channels_last": True,
    "train.checkpoint_every": 100_000,
    "train.log_every": 100,
    "train.grad_cache_chunk": None,
    "train.grad_clip_norm": None,
    "train.weight_decay": 0.1,
    "contrastive.label_smoothing": 0,
}
CCA = {"finetune.head_init": "cca"}
STRUCTURE = {"loss_weights.structure": 10.0}
ARMS = {
    "linear": {},
    "cca alone": {**CCA, "train.steps": 1, "train.lr": 1e-9, "train.warmup_lr": 0, "train.warmup_steps": 0},
    "cca": CCA,
    "structure": STRUCTURE,
    "mixup": {"finetune.mixup": 1.0},
    "mlp": {"finetune.head": "mlp"},
    "cca + structure": {**CCA, **STRUCTURE},
    "cca + mixup": {**CCA, "finetune.mixup": 1.0},
    "cca + mixup + mean": {**CCA, "finetune.mixup": 1.0, "train.ema_decay": 1.0},
    "cca + mlp": {**CCA, "finetune.head": "mlp"},
    "cca + structure + mixup": {**CCA, **STRUCTURE, "finetune.mixup": 1.0},
}


def measure(encoder: Encoder, name: str) -> dict[str, float]:
    """Measure a model on a set, whose images go through the frozen tower once for all runs."""
    zero_shot, retrieval = evaluate_all(encoder, name, ["zero-shot", "retrieval"], Options(progress=False))
    result = {**zero_shot.to_dict(), **retrieval.to_dict()}
    return {n: result[n] for n in ("top1", "top5", "text_to_image_r10", "image_to_text_r10", "n", "texts")}


def run(sets: list[str], arm: str, pairs: int, seed: int, **keys) -> list[dict]:
    """Train one arm and measure it on every set."""
    given = {**FROZEN, **ARMS[arm], "seed": seed, "data.max_pairs": pairs, **keys}
    tune = given.pop("finetune")
    recipe = load_recipe("clip", {**{f"finetune.{n}": v for n, v in tune.items()}, **given})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, Path(folder), quiet=True)
        begun = time.process_time()
        trainer.train()
        seconds = round(time.process_time() - begun, 1)
        row = {"arm": arm, "pairs": pairs, "seed": seed, **keys, "seconds": seconds}
        return [{"set": name, **row, **measure(trainer.encoder, name)} for name in sets]


def main(out: Path, names: list[str], arms: list[str], pairs: list[int], seeds: list[int], **keys) -> None:
    """Run the arms that the file lacks and append their lines."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["arm"], row["pairs"], row["seed"]) for row in rows if keys.items() <= row.items()}
    sets = [f"builtin:{name}" for name in names]
    for seed in seeds:
        for count in pairs:
            for arm in arms:
                if (arm, count, seed) in done:
                    continue
                lines = [json.dumps(row) + "\n" for row in run(sets, arm, count, seed, **keys)]
                with out.open("a") as file:
                    file.writelines(lines)


if __name__ == "__main__":
    if len(sys.argv) < 6 or "--help" in sys.argv:
        sys.exit(__doc__)
    out, names, arms, pairs, seeds, *rest = sys.argv[1:]
    keys = {key: json.loads(value) for key, value in (pair.split("=") for pair in rest)}
    numbers = [[int(n) for n in given.split(",")] for given in (pairs, seeds)]
    main(Path(out), names.split(","), list(ARMS) if arms == "all" else arms.split(","), *numbers, **keys)
