"""Measure what `declip.interchange.starter` reads beside the weights: a mean feature, and features of ImageNet's names.

    python scripts/builtin/measure_start.py src/declip/interchange

`lite0_mean.npy` and `lite2_mean.npy` are the means of 1,000 drawings each of builtin:clipart and builtin:emoji, which
count alike. builtin:stamps is left out, so that the model without pairs can be evaluated on it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from declip.data.sources.open import open_source
from declip.interchange import starter
from declip.interchange.classes import texts_digest
from declip.interchange.timm_weights import encode_texts
from declip.models.dual_encoder import DualEncoder
from declip.models.layers import IMAGE
from declip.recipe.starts import STARTS

INT8 = 127  # largest value of a stored feature; rows have scales of their own
SETS, IMAGES, BATCH = ("builtin:clipart", "builtin:emoji"), 1_000, 50


def write_texts(file: Path) -> None:
    """Write the text features of the classes in 8 bits, with the digest of the texts: 0.8 MB instead of 3."""
    weights = starter.read(starter.NAME)
    assert weights.classes is not None
    texts = weights.classes.texts()[0]
    features = encode_texts(weights, texts)  # (t, w)
    scales = features.abs().amax(dim=1, keepdim=True) / INT8
    tensors = {"features": (features / scales).round().to(torch.int8), "scales": scales}
    save_file(tensors, file, {"texts": texts_digest(texts)})


def write_mean(name: str, file: Path) -> None:
    """Write the mean image feature of a start."""
    weights = starter.read(name)
    image = weights.recipe.image.model_copy(update={"size": STARTS[name]})
    model = DualEncoder(weights.recipe.model_copy(update={"image": image}), towers="image").eval()
    tower = {
        name.removeprefix(IMAGE): tensor
        for name, tensor in weights.tensors.items()
        if name.startswith(IMAGE)
    }
    model.image_tower.load_state_dict(model.image_tower.state_dict() | tower)
    means = []
    for set_name in SETS:
        source = open_source(set_name)
        chosen = np.linspace(0, len(source) - 1, IMAGES).astype(int)
        with torch.inference_mode():
            batches = (
                model.preprocess([source[int(i)].open().decoded() for i in rows])
                for rows in chosen.reshape(-1, BATCH)
            )
            means.append(
                torch.cat([model.image_tower.pool(batch) for batch in batches]).mean(dim=0)
            )
    np.save(file, torch.stack(means).mean(dim=0).numpy().astype(np.float16))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in STARTS:
        write_mean(name, folder / starter.MEAN.name.format(starter.image_tower(name)))
    write_texts(folder / starter.NAMES.name)
