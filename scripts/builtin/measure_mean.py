"""Measure the mean image feature of the built-in start, which `declip.interchange.starter` reads.

    python scripts/builtin/measure_mean.py src/declip/interchange/lite0_mean.npy

The mean of 1,000 drawings each of builtin:clipart and builtin:emoji, which count
alike. builtin:stamps is left out, so that the model without pairs can be evaluated on it.
"""

import sys

import numpy as np
import torch

from declip.data.sources.open import open_source
from declip.interchange import starter
from declip.models.dual_encoder import DualEncoder
from declip.models.layers import IMAGE
from declip.recipe.finetuning import CPU_SIZE

SETS, IMAGES, BATCH = ("builtin:clipart", "builtin:emoji"), 1_000, 50


def main(out: str) -> None:
    weights = starter.read(starter.NAME)
    image = weights.recipe.image.model_copy(update={"size": CPU_SIZE})
    model = DualEncoder.from_recipe(weights.recipe.model_copy(update={"image": image}), text=False).eval()
    tower = {name.removeprefix(IMAGE): tensor for name, tensor in weights.tensors.items() if name.startswith(IMAGE)}
    model.image_tower.load_state_dict(model.image_tower.state_dict() | tower)
    means = []
    for name in SETS:
        source = open_source(name)
        chosen = np.linspace(0, len(source) - 1, IMAGES).astype(int)
        with torch.inference_mode():
            batches = (model.preprocess([source[int(i)].image for i in rows]) for rows in chosen.reshape(-1, BATCH))
            means.append(torch.cat([model.image_tower.pool(batch) for batch in batches]).mean(dim=0))
    np.save(out, torch.stack(means).mean(dim=0).numpy().astype(np.float16))


if __name__ == "__main__":
    main(sys.argv[1])
