"""Image towers with timm's weights (Wightman 2019, github.com/huggingface/pytorch-image-models).

``timm:NAME.TAG`` takes published weights, which are downloaded unless they are in the Hub's cache; ``timm:NAME/FILE``
takes a file in timm's format. No code in a file is run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from torch import Tensor

from declip.errors import UserError, unknown
from declip.interchange.files import fetch, read_tensors, unwrapped
from declip.interchange.weights import NO_TEXT, Weights
from declip.models.image_tower import ImageTower
from declip.recipe.load import load_recipe

PREFIX = "timm:"
PUBLISHED, PUBLISHED_BY_OPEN_CLIP = "model.safetensors", "open_clip_model.safetensors"


def matches(where: str) -> bool:
    """Whether this is a name of timm's."""
    return where.startswith(PREFIX)


def read(where: str) -> Weights:
    """Read an image tower; its recipe has the image size and the statistics of its training."""
    name, _, file = where.removeprefix(PREFIX).partition("/")
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise unknown("timm model", architecture, timm.list_models())
    tags = [known for known in timm.list_pretrained(f"{architecture}*") if known.split(".")[0] == architecture]
    if name not in (architecture, *tags):
        raise unknown(f"tag of timm's {architecture}", name, tags)
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise UserError(f"timm does not say how images are prepared for '{architecture}'. Take another model.")
    state = _read_file(where, Path(file).expanduser() if file else _download(where, name, config))
    size = config.input_size[-1]
    tower = _filled(where, architecture, size, state)
    width = tower.pre_logits_width
    keys = {
        "image.model": architecture,
        "image.size": size,
        "image.mean": list(config.mean),
        "image.std": list(config.std),
        "image.model_kwargs": {},
    }
    recipe = load_recipe("clip", {**NO_TEXT, **keys, "embed_dim": width})
    # timm's weights lead into no shared space, so the projection is the identity.
    projection = {"proj.weight": torch.eye(width)}
    if tower.proj.bias is not None:
        projection["proj.bias"] = torch.zeros(width)
    tensors = {f"image_tower.{name}": tensor for name, tensor in (tower.state_dict() | projection).items()}
    return Weights(recipe, tensors | {"logit_scale": torch.tensor(recipe.logit_scale.init)}, where)


def _filled(where: str, architecture: str, size: int, weights: Mapping[str, Tensor]) -> ImageTower:
    """Build the tower with the weights; timm leaves random what they lack, so it is built without them too."""
    with torch.random.fork_rng(devices=[]):
        towers = []
        for given in (weights, None):
            torch.manual_seed(0)
            towers.append(ImageTower(architecture, size, embed_dim=8, weights=given))
    tower, blank = towers[0], towers[1].trunk.state_dict()
    for name, tensor in tower.trunk.state_dict().items():
        if tensor.ndim > 1 and blank[name].std() > 0 and torch.equal(tensor, blank[name]):
            raise UserError(f"The weights of '{where}' are not those of {architecture}: they lack '{name}'.")
    return tower


def _read_file(where: str, path: Path) -> Mapping[str, Tensor]:
    content = unwrapped(read_tensors(path), "state_dict_ema", "model_ema", "state_dict", "model")
    state = {str(name).removeprefix("module."): t for name, t in content.items() if isinstance(t, Tensor)}
    if not state:
        raise UserError(f"'{where}' holds no tensors. Give weights as timm saves them.")
    return state


def _download(where: str, name: str, config: Any) -> Path:
    if not config.hf_hub_id:
        raise UserError(f"timm publishes no weights of '{name}' on the Hub. Give a file, {PREFIX}NAME/FILE.")
    published = PUBLISHED_BY_OPEN_CLIP if config.hf_hub_filename else PUBLISHED
    return Path(
        fetch(where, lambda: huggingface_hub.hf_hub_download(config.hf_hub_id, published), f"{PREFIX}NAME/FILE")
    )
