"""Weights in a recipe: tensors for its sizes of images and texts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.errors import UserError
from declip.interchange.weights import Weights
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import ENTRY
from declip.models.layers import IMAGE, TEXT

SIGLIP_POSITIONS = ".position_embedding.weight"  # end of the names in SigLIP of transformers
TEXT_POSITIONS = ("positional_embedding", SIGLIP_POSITIONS)
IMAGE_POSITIONS = ("pos_embed", *TEXT_POSITIONS)
"""Ends of the names of position embeddings."""


def load_tensors(start: Weights, model: DualEncoder) -> set[str]:
    """Load the tensors of a start into a model of its recipe, resampled where they depend on a size, and name them."""
    model.image_tower.match_projection(start.tensors)
    model.text_tower.match_projection(start.tensors)
    own = model.state_dict()
    fitted: dict[str, Tensor] = {}
    for name, tensor in start.tensors.items():
        if name == ENTRY:  # it also has the length of captions
            fitted[name] = own[name]
        elif tensor.shape == own[name].shape:
            fitted[name] = tensor
        elif name.startswith(TEXT) and name.endswith(TEXT_POSITIONS):
            length = start.recipe.text.context_length
            positions = _stretch(tensor[:length], model.text_tower.context)
            class_token = tensor[length:]  # CoCa's
            fitted[name] = torch.cat([positions, class_token])
        else:
            fitted[name] = _resize(name, tensor, own[name], model)
        if fitted[name].shape != own[name].shape:
            raise UserError(
                f"'{name}' of '{start.origin}' does not fit: this tower has one image size. Leave image.size out."
            )
    model.load_state_dict({**own, **fitted})
    return set(fitted)


def _stretch(positions: Tensor, length: int) -> Tensor:
    """Interpolate position embeddings (n, width) linearly so that both ends stay, or keep the first ones alone."""
    if length <= len(positions):
        return positions[:length]
    longer = F.interpolate(
        positions.float().mT[None], size=length, mode="linear", align_corners=True
    )
    return longer[0].mT.to(positions.dtype)


def _resize(name: str, tensor: Tensor, own: Tensor, model: DualEncoder) -> Tensor:
    """Interpolate the square grid of position embeddings for another image size; the class token's stays."""
    is_position = name.startswith(IMAGE) and name.endswith(IMAGE_POSITIONS)
    if not is_position or tensor.ndim not in (2, 3):
        return tensor
    import timm

    others = _embeddings_of_no_patch(name, tensor, model)
    old = _side(tensor, others)
    new = _side(own, others)
    rows = tensor.float().reshape(1, *tensor.shape[-2:])
    resized = timm.layers.resample_abs_pos_embed(
        rows, [new, new], [old, old], num_prefix_tokens=others
    )
    if tensor.ndim == 3:
        return resized
    return resized[0]


def _embeddings_of_no_patch(name: str, tensor: Tensor, model: DualEncoder) -> int:
    """Number of position embeddings before those of the patches."""
    if name.endswith(SIGLIP_POSITIONS):
        return 0
    if tensor.ndim == 2:  # open_clip's, with a class token
        return 1
    trunk = model.image_tower.trunk
    trunk = getattr(trunk, "trunk", trunk)
    if getattr(trunk, "no_embed_class", False):  # as of DeiT III and of DINOv2 with registers
        return 0
    return int(getattr(trunk, "num_prefix_tokens", 0))


def _side(positions: Tensor, others: int) -> int:
    """Side of the square grid of position embeddings (…, others + side², width)."""
    return round((positions.shape[-2] - others) ** 0.5)
