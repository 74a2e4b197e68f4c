"""Image towers with weights of timm: ``timm:NAME.TAG``, which is downloaded, or ``timm:NAME/FILE``.

``timm:NAME.TAG+ENCODER`` and ``timm:NAME/FILE+ENCODER`` have a Hugging Face text encoder too, a folder or
``huggingface:NAME``.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import huggingface_hub
import torch
from torch import Tensor

from declip.errors import UserError, unknown
from declip.interchange.classes import Classes
from declip.interchange.weights import Weights, read_tensors, unwrapped
from declip.io.hub import fetch
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import read_encoder
from declip.models.image_tower import ImageTower
from declip.models.layers import PROJECTIONS
from declip.recipe.load import load_recipe

PREFIX = "timm:"
CONTEXT = 64  # tokens of a caption for a text encoder
OFFSET = 2  # RoBERTa's first position


def matches(where: str) -> bool:
    """Whether this is a name of a timm model."""
    return where.startswith(PREFIX)


def read(where: str) -> Weights:
    """Read an image tower, with its image size and statistics."""
    import timm

    image, plus, encoder = where.rpartition("+")
    if plus:
        return _with_text(read(image), encoder, where)
    name, _, file = where.removeprefix(PREFIX).partition("/")
    architecture, config = name.split(".")[0], None
    with suppress(RuntimeError):  # an unknown tag
        config = timm.get_pretrained_cfg(name)
    if config is None:
        raise unknown("timm model or tag", name, {*timm.list_models(), *timm.list_pretrained(f"{architecture}*")})
    state = _read_file(where, Path(file).expanduser() if file else _download(where, name, config))
    size = config.input_size[-1]
    tower, rest = _filled(where, architecture, size, state)
    width = tower.pre_logits_width
    statistics = {"image.mean": list(config.mean), "image.std": list(config.std)}
    keys = {"image.model": architecture, "image.size": size, "image.model_kwargs": {}, **statistics}
    recipe = load_recipe("clip", {**keys, "embed_dim": width})
    # Without a text tower there is no shared space, so the projection is the identity.
    projection = {"proj.weight": torch.eye(width), "proj.bias": torch.zeros(width)}
    tensors = {f"image_tower.{name}": projection.get(name, t) for name, t in tower.state_dict().items()}
    tensors |= {"logit_scale": torch.tensor(recipe.logit_scale.init)}
    return Weights(recipe, tensors, where, classes=_classes(rest, width))


def _with_text(image: Weights, name: str, where: str) -> Weights:
    """Add a text encoder to an image tower, without projections into a shared space."""
    encoder = read_encoder(name, pretrained=True)
    positions = encoder.config.get("max_position_embeddings", CONTEXT + OFFSET) - OFFSET
    text = image.recipe.text.model_copy(update={"hf_model": name, "context_length": min(CONTEXT, positions)})
    with torch.random.fork_rng(devices=[]):
        filled = DualEncoder.from_recipe(image.recipe.model_copy(update={"text": text}), encoder, image=False)
    tensors = {**image.tensors, **filled.state_dict()}
    return replace(
        image,
        recipe=image.recipe.model_copy(update={"text": text.model_copy(update={"pretrained": False})}),
        tensors={name: tensor for name, tensor in tensors.items() if not name.startswith(PROJECTIONS)},
        origin=where,
    )


def _classes(rest: Mapping[str, Tensor], width: int) -> Classes | None:
    """Classes of the tensors that the tower lacks, if these are one linear map of its pooled features."""
    rows = [tensor for name, tensor in rest.items() if name.endswith(".weight")]
    if len(rows) != 1 or any(not name.endswith((".weight", ".bias")) for name in rest) or len(rest) > 2:
        return None  # two classifiers of a distilled model, or layers before the last
    row = rows[0].flatten(1)  # of a 1 × 1 convolution too
    return Classes.of(row) if row.shape[1] == width and len(row) > 1 else None


def _filled(
    where: str, architecture: str, size: int, weights: Mapping[str, Tensor]
) -> tuple[ImageTower, dict[str, Tensor]]:
    """Build the tower with the weights, which must be complete except for the classifier, and return the rest."""
    import timm

    # Names of the classifier's tensors, which the tower lacks
    classifier = getattr(timm.get_pretrained_cfg(architecture), "classifier", None) or ()
    heads = {name.split(".")[0] for name in ([classifier] if isinstance(classifier, str) else classifier)}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        own = ImageTower(architecture, size, embed_dim=8).trunk.state_dict()
    kept = {name: t for name, t in weights.items() if name in own or name.split(".")[0] not in heads}
    try:
        with torch.random.fork_rng(devices=[]):
            tower = ImageTower(architecture, size, embed_dim=8, weights=kept)
    except UserError as error:
        reason = shorten(str(error.__cause__).split("\n\t")[-1], 160)  # the last line of torch's message
        raise UserError(f"The weights of '{where}' are not those of {architecture}: {reason}") from error
    return tower, {name: tensor for name, tensor in weights.items() if name not in kept}


def _read_file(where: str, path: Path) -> Mapping[str, Tensor]:
    content = unwrapped(read_tensors(path), "state_dict_ema", "model_ema", "state_dict", "model")
    state = {str(name).removeprefix("module."): t for name, t in content.items() if isinstance(t, Tensor)}
    if not state:
        raise UserError(f"'{where}' has no tensors. Give weights as timm saves them.")
    return state


def _download(where: str, name: str, config: Any) -> Path:
    if not config.hf_hub_id:
        raise UserError(f"timm publishes no weights of '{name}' on the Hub. Give a file, {PREFIX}NAME/FILE.")
    file = "open_clip_model.safetensors" if config.hf_hub_filename else "model.safetensors"

    def get(offline: bool) -> str:
        return huggingface_hub.hf_hub_download(config.hf_hub_id, file, local_files_only=offline)

    return Path(fetch(where, get, f"{PREFIX}NAME/FILE"))
