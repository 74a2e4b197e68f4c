"""Image features without gradients, a few images at a time on a CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.models.dual_encoder import DualEncoder
from declip.models.folding import inference_tower

PIXELS = 2**18
"""Pixels of a forward pass per thread. Activations of more leave the CPU's caches, and their memory
is returned to the system and requested again in every layer: EfficientNet-Lite0 takes 3 times as
long with 256 images of 128 pixels."""


def chunked(encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Encode images (n, 3, H, W), on a CPU a few at a time."""
    if images.device.type != "cpu":
        return encode(images)
    height, width = images.shape[2:]
    most = max(1, torch.get_num_threads() * PIXELS // (height * width))
    return torch.cat([encode(part) for part in images.split(most)])


def image_encoder(model: Any) -> Callable[[Tensor], Tensor]:
    """Return a function like `model.encode_image` for many images, with the current weights.

    For a model of declip they may also be uint8, not yet normalized.
    """
    if not isinstance(model, DualEncoder):
        encode: Callable[[Tensor], Tensor] = model.encode_image
        return encode
    tower = inference_tower(model)

    def encode_part(images: Tensor) -> Tensor:
        pixels = normalized(model, images)
        if tower is model.image_tower:
            return model.encode_image(pixels)
        return normalize(tower(pixels).pooled.float(), dim=-1)

    return partial(chunked, encode_part)


def normalized(model: Any, pixels: Tensor) -> Tensor:
    """Normalize pixels (n, 3, S, S), unless they are normalized."""
    return model.preprocessor.normalize(pixels) if pixels.dtype == torch.uint8 else pixels
