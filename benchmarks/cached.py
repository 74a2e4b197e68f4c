"""Seconds of an epoch over cached features of frozen towers: the heads alone train, on rows of numbers.

    python benchmarks/cached.py [--pairs 100000] [--width 512] [--batch-size 512] [--epochs 3] [--threads 2]

Features are random numbers; the steps are those of `declip train frozen`, FuseMix and reading of rows included. The
last line is JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from declip.data.cached import CachedFeatures
from declip.data.sources.python_items import ItemSource
from declip.recipe.load import load_recipe
from declip.training.step import training_step
from declip.training.trainer import Trainer
from machine import machine

VARIANTS = 8
SMALL = {"image.model": "declip_vit_tiny", "text.bpe_merges": 1000, "text.context_length": 8, "text.heads": 8}
"""Towers that no step runs; their pooled features are as wide as the stored ones."""


def main() -> None:
    """Time whole epochs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pairs", 100_000), ("width", 512), ("batch-size", 512), ("epochs", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    source = ItemSource([(Image.new("RGB", (8, 8)), "a caption")] * given.pairs)
    images, texts = (torch.randn(VARIANTS * given.pairs, given.width).bfloat16() for _ in range(2))
    rows = np.arange(VARIANTS * given.pairs).reshape(VARIANTS, -1)
    seconds = []
    patched = patch("declip.training.trainer.cached_features")
    with tempfile.TemporaryDirectory() as folder, patched as cached_features:
        wide = {"image.model_kwargs": {"embed_dim": given.width, "num_heads": 8}, "text.width": given.width}
        start = load_recipe("demo-clip", {**SMALL, **wide, "train.batch_size": 8, "train.steps": 1})
        Trainer(start, Path(folder) / "start", quiet=True, source=source).train()
        keys = {"finetune.pretrained": f"{folder}/start", "finetune.head_init": "random"}
        recipe = load_recipe("frozen", {**keys, "train.steps": 10**6, "train.batch_size": given.batch_size})
        mixup = recipe.finetune.mixup
        cached_features.return_value = CachedFeatures({"first": images}, texts, rows, rows[:, None], {}, mixup)
        trainer = Trainer(recipe, Path(folder) / "run", quiet=True, source=source)
        steps = given.pairs // given.batch_size
        for _ in range(given.epochs + 1):
            started = time.perf_counter()
            for _ in range(steps):
                loss = training_step(trainer.parts, next(trainer.loader))["loss"]
            loss.item()
            seconds.append(round(time.perf_counter() - started, 2))
    print(json.dumps({**vars(given), "seconds": seconds[1:], "precision": trainer.recipe.train.precision, **machine()}))


if __name__ == "__main__":
    main()
