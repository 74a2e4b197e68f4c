"""Image features without gradients, a few images at a time on a CPU, by a compiled tower on a GPU."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from declip.io.text import one_line
from declip.models.device import compiles
from declip.models.dual_encoder import DualEncoder
from declip.models.folding import inference_tower

log = logging.getLogger("declip")

COMPILE_FROM = 100_000
"""Images from which a tower is compiled: that takes about a minute, which fewer images do not
win back."""

PIXELS = 2**18
"""Pixels of a forward pass per thread. Activations of more leave the CPU's caches, and their memory
is returned to the system and requested again in every layer: EfficientNet-Lite0 takes 3 times as
long with 256 images of 128 pixels."""


def chunked(encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Encode images (n, 3, H, W), on a CPU a few at a time."""
    if images.device.type != "cpu":
        return encode(images)
    height, width = images.shape[2:]
    pixels = torch.get_num_threads() * PIXELS
    most = max(1, pixels // (height * width))
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


def compiled_encoder(
    model: Any, images: int, batch_size: int, backend: str = "inductor"
) -> Callable[[Tensor], Tensor] | None:
    """Return `image_encoder` with a compiled tower, for batches of at most `batch_size` of many `images`.

    Call it, and what it returns, in `eval_mode`. None where compiling gains too little: on a CPU, for few images, and
    for transformers, most of whose time is in matrix products. None, with a warning, also for a tower that cannot be
    compiled. timm reports 2.0 times the speed for EfficientNet-Lite2 and 1.95 for ResNet-50.
    """
    if not isinstance(model, DualEncoder) or not model.has_image:
        return None
    if not compiles(model.device) or images < COMPILE_FROM:
        return None
    tower = model.image_tower
    if sum(isinstance(module, nn.Conv2d) for module in tower.modules()) < 2:
        return None
    features = torch.compile(lambda pixels: tower(pixels).pooled, dynamic=False, backend=backend)
    dtype = next(tower.parameters()).dtype

    def encode(part: Tensor) -> Tensor:
        # All batches have one size, so that the tower is compiled once.
        missing = batch_size - len(part)
        whole = pad(part, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else part
        pooled = features(normalized(model, whole).to(dtype))
        return normalize(pooled[: len(part)].float(), dim=-1)

    size = model.preprocessor.size
    black = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=model.device)
    log.info("Compiling the image tower for %d images, about a minute …", images)
    try:
        encode(black.contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        reason = one_line(error, 200)
        log.warning("The image tower cannot be compiled, and is used as it is: %s", reason)
        return None
    return encode


def normalized(model: Any, pixels: Tensor) -> Tensor:
    """Normalize pixels (n, 3, S, S), unless they are normalized."""
    if pixels.dtype == torch.uint8:
        return model.preprocessor.normalize(pixels)
    return pixels
