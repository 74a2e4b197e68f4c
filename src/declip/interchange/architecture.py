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


def load_tensors(start: Weights, model: DualEncoder) -> set[str]:
    """Load the tensors of a start into a model of its recipe, resampled where they depend on a size, and name them."""
    model.image_tower.match_projection(start.tensors)
    model.text_tower.match_projection(start.tensors)
    own, fitted, old = model.state_dict(), dict[str, Tensor](), start.recipe.text.context_length
    for name, tensor in start.tensors.items():
        if name == ENTRY:  # it also has the length of captions
            fitted[name] = own[name]
        elif tensor.shape == own[name].shape:
            fitted[name] = tensor
        # Behind the rows CoCa's class token
        elif name.startswith(TEXT) and name.endswith(("positional_embedding", SIGLIP_POSITIONS)):
            fitted[name] = torch.cat(
                [_stretched(tensor[:old], model.text_tower.context), tensor[old:]]
            )
        else:
            fitted[name] = _resized(name, tensor, own[name], model)
        if fitted[name].shape != own[name].shape:
            raise UserError(
                f"'{name}' of '{start.origin}' does not fit: this tower has one image size. Leave image.size out."
            )
    model.load_state_dict({**own, **fitted})
    return set(fitted)


def _stretched(positions: Tensor, length: int) -> Tensor:
    """Interpolate position embeddings (n, width) linearly so that both ends stay, or keep the first ones alone."""
    if length <= len(positions):
        return positions[:length]
    longer = F.interpolate(
        positions.float().mT[None], size=length, mode="linear", align_corners=True
    )
    return longer[0].mT.to(positions.dtype)


def _resized(name: str, tensor: Tensor, own: Tensor, model: DualEncoder) -> Tensor:
    """Interpolate the square grid of position embeddings for another image size; the class token's stays."""
    known = ("pos_embed", "positional_embedding", SIGLIP_POSITIONS)
    embeds = name.startswith(IMAGE) and name.endswith(known)
    if not embeds or tensor.ndim not in (2, 3):
        return tensor
    import timm

    trunk = getattr(model.image_tower.trunk, "trunk", model.image_tower.trunk)
    before = 0 if name.endswith(SIGLIP_POSITIONS) else 1  # embeddings of tokens that are no patches
    if tensor.ndim == 3:
        # As of DeiT III and of DINOv2 with registers
        grid_only = getattr(trunk, "no_embed_class", False)
        before = 0 if grid_only else int(getattr(trunk, "num_prefix_tokens", 0))
    old, new = (round((embedding.shape[-2] - before) ** 0.5) for embedding in (tensor, own))
    rows = tensor.float().reshape(1, *tensor.shape[-2:])
    resized = timm.layers.resample_abs_pos_embed(
        rows, [new, new], [old, old], num_prefix_tokens=before
    )
    return resized if tensor.ndim == 3 else resized[0]
