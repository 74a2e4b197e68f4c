"""Image towers without gradients on a CPU: small batches, channels last."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from declip.models.dual_encoder import DualEncoder

PIXELS = 2**18
"""Pixels of a forward pass per thread. Activations of more leave the CPU's caches, and their memory is returned to the
system and requested again in every layer: EfficientNet-Lite0 takes 3 times as long with 256 images of 128 pixels."""


def chunked(encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Encode images (n, 3, H, W), on a CPU a few at a time."""
    if images.device.type != "cpu":
        return encode(images)
    size = max(1, PIXELS * torch.get_num_threads() // images[0, 0].numel())
    return torch.cat([encode(part) for part in images.split(size)])


def image_encoder(model: Any) -> Callable[[Tensor], Tensor]:
    """Return a function like `model.encode_image` for many images."""
    if not isinstance(model, DualEncoder):
        return model.encode_image
    # Convolutions take two thirds of the time with channels last.
    convolves = model.image_tower.has_batch_norm and model.device.type == "cpu"
    memory_format = torch.channels_last if convolves else torch.preserve_format
    return lambda images: chunked(lambda part: model.encode_image(part.to(memory_format=memory_format)), images)
