"""Image features without gradients, computed by several threads on a CPU."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from declip.io.pool import torch_threads
from declip.models.dual_encoder import DualEncoder
from declip.models.folding import inference_tower

PIXELS = 2**18
"""Pixels of a forward pass per thread. Activations of more leave the CPU's caches, and their memory is returned to the
system and requested again in every layer: EfficientNet-Lite0 takes 3 times as long with 256 images of 128 pixels."""

PATCHES = 4
"""Times as many for a tower whose only convolution makes patches. ViT-B/32 takes 0.9 to 1 times as long, and its
threads wait for each other less often."""

MOST_LANES = 8  # batches that are computed at a time: Python starts their layers one after another


def chunked(encode: Callable[[Tensor], Tensor], images: Tensor, times: int = 1) -> Tensor:
    """Encode images (n, 3, H, W), on a CPU a few at a time, `times` as many as by default.

    Several threads encode different images: those that share a layer wait for each other at its end, and as they wait
    busily, ViT-B/32 takes 1.6 times as much processor time with two threads next to other processes.
    """
    if images.device.type != "cpu":
        return encode(images)
    size, threads = max(1, times * PIXELS // images[0, 0].numel()), torch.get_num_threads()
    at_once = min(threads, MOST_LANES, math.ceil(len(images) / size))
    if at_once == 1 or torch.is_autocast_enabled("cpu"):  # which other threads do not inherit
        return torch.cat([encode(part) for part in images.split(size * threads)])
    each = threads // at_once
    rounds = math.ceil(len(images) / (size * each * at_once))
    # New threads for each batch: those of a pool would be missing in a forked process. They do not inherit the mode.
    set_mode = partial(torch.set_grad_enabled, torch.is_grad_enabled())
    with torch_threads(each), ThreadPoolExecutor(at_once, initializer=set_mode) as pool:
        return torch.cat(list(pool.map(encode, images.tensor_split(rounds * at_once))))


def image_encoder(model: Any) -> Callable[[Tensor], Tensor]:
    """Return a function like `model.encode_image` for many images, with the current weights.

    For a model of declip they may also be uint8, not yet normalized.
    """
    if not isinstance(model, DualEncoder):
        return model.encode_image
    tower = inference_tower(model)

    def encode(images: Tensor) -> Tensor:
        images = normalized(model, images)
        if tower is model.image_tower:
            return model.encode_image(images)
        return normalize(tower(images).pooled.float(), dim=-1)

    convolutions = sum(isinstance(module, nn.Conv2d) for module in tower.modules())
    return partial(chunked, encode, times=PATCHES if convolutions == 1 else 1)


def normalized(model: Any, pixels: Tensor) -> Tensor:
    """Normalize pixels (n, 3, S, S), unless they are normalized."""
    return model.preprocessor.normalize(pixels) if pixels.dtype == torch.uint8 else pixels
