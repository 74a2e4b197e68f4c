"""Image towers with timm's weights (Wightman 2019, github.com/huggingface/pytorch-image-models).

``timm:NAME.TAG`` takes published weights, which are downloaded unless they are in the hub's cache; ``timm:NAME/FILE``
takes a file in timm's format. Files are read without running code in them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from declip.errors import UserError, unknown
from declip.interchange.weights_file import read_weights
from declip.models.image_tower import ImageTower
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe

PREFIX = "timm:"
PUBLISHED, OF_OPEN_CLIP = "model.safetensors", "open_clip_model.safetensors"
WRAPPINGS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where a checkpoint of timm's training keeps the weights, the averaged ones first."""


def read_timm(where: str) -> tuple[Recipe, Mapping[str, Tensor]]:
    """Read an image tower.

    Args:
        where: See the module.

    Returns:
        A recipe whose section `image` describes the tower, with the statistics and the size of its training, and the
        tensors by the names of a `DualEncoder`, without projection.

    Raises:
        UserError: an unknown name, no such file, weights of another model, or no network.
    """
    name, _, file = where.removeprefix(PREFIX).partition("/")
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise unknown("timm model", architecture, timm.list_models())
    tags = [known for known in timm.list_pretrained(f"{architecture}*") if known.split(".")[0] == architecture]
    if name not in (architecture, *tags):
        raise unknown(f"tag of timm's {architecture}", name, tags)
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise UserError(f"timm does not say how pictures are prepared for '{architecture}'. Take another model.")
    found = _read_file(where, Path(file).expanduser()) if file else _download(where, name, config)
    size = config.input_size[-1]
    tower = _filled(where, architecture, size, found)
    recipe = load_recipe(
        "clip",
        {
            "image.model": architecture,
            "image.size": size,
            "image.mean": list(config.mean),
            "image.std": list(config.std),
            "image.model_kwargs": {},
        },
    )
    tensors = {f"image_tower.{n}": t for n, t in tower.state_dict().items() if not n.startswith("proj.")}
    return recipe, tensors


def _filled(where: str, architecture: str, size: int, weights: Mapping[str, Tensor]) -> ImageTower:
    """Build the tower with the weights; timm leaves random what they lack, so it is built without them too."""
    towers = []
    for each in (weights, None):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            towers.append(ImageTower(architecture, size, embed_dim=8, weights=each))
    tower, blank = towers[0], towers[1].trunk.state_dict()
    for name, tensor in tower.trunk.state_dict().items():
        if tensor.ndim > 1 and blank[name].std() > 0 and torch.equal(tensor, blank[name]):
            raise UserError(f"The weights of '{where}' are not those of {architecture}: they lack '{name}'.")
    return tower


def _read_file(where: str, path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UserError(f"There is no file '{path}'. Give {PREFIX}NAME/FILE, or {PREFIX}NAME.TAG to download.")
    try:
        found = read_weights(path)
        for wrapping in WRAPPINGS:
            if isinstance(found, Mapping) and isinstance(found.get(wrapping), Mapping):
                found = found[wrapping]
                break
        found = {n.removeprefix("module."): t for n, t in found.items() if isinstance(t, Tensor)}
    except UserError:
        raise
    except Exception as error:  # of whatever kind torch has for a damaged file
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"Cannot read '{where}': it is no file of tensors, or it is cut ({type(error).__name__}: {said})."
        ) from error
    if not found:
        raise UserError(f"'{path}' holds no tensors. Give weights as timm saves them.")
    return found


def _download(where: str, name: str, config: Any) -> Mapping[str, Tensor]:
    if not config.hf_hub_id:
        raise UserError(f"timm publishes no weights of '{name}' on the hub. Give a file, {PREFIX}NAME/FILE.")
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(config.hf_hub_id, OF_OPEN_CLIP if config.hf_hub_filename else PUBLISHED)
    except Exception as error:  # hub, network and disk each have errors of their own
        said = " ".join(str(error).split())[:180]
        raise UserError(
            f"Cannot fetch '{where}': {said} Check the network and the name; a file on this machine is given as "
            f"{PREFIX}NAME/FILE."
        ) from error
    return _read_file(where, Path(file))
