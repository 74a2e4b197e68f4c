"""Image towers without gradients on a CPU: small batches, batch norm folded into convolutions, channels last."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower

PIXELS = 2**18
"""Pixels of a forward pass per thread. Activations of more leave the CPU's caches, and their memory is returned to the
system and requested again in every layer: EfficientNet-Lite0 takes 3 times as long with 256 images of 128 pixels."""

PATCHES = 4
"""Times as many for a tower whose only convolution makes patches. ViT-B/32 takes 0.9 to 1 times as long, and its
threads wait for each other less often."""

TOLERANCE = 1e-5
"""Largest difference of a folded tower's features, relative to the largest feature."""


def chunked(encode: Callable[[Tensor], Tensor], images: Tensor, times: int = 1) -> Tensor:
    """Encode images (n, 3, H, W), on a CPU a few at a time, `times` as many as by default."""
    if images.device.type != "cpu":
        return encode(images)
    size = max(1, times * PIXELS * torch.get_num_threads() // images[0, 0].numel())
    return torch.cat([encode(part) for part in images.split(size)])


def image_encoder(model: Any) -> Callable[[Tensor], Tensor]:
    """Return a function like `model.encode_image` for many images, with the model's weights of now.

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


def inference_tower(model: DualEncoder) -> ImageTower:
    """A copy of the image tower that is faster on a CPU, with batch norm folded into convolutions; or the tower itself.

    EfficientNet-Lite0 becomes 1.2 times as fast.
    """
    tower = model.image_tower
    if model.device.type != "cpu" or next(tower.parameters()).dtype != torch.float32:
        return tower  # other types would round the weights again
    return folded(model)


def folded(model: DualEncoder) -> ImageTower:
    """A copy of the float32 image tower, channels last, with batch norm folded into convolutions; or the tower itself.

    Whether a norm follows a convolution is assumed from their order in the module, so the features of two images are
    compared; where they differ, the tower itself is returned.
    """
    tower = model.image_tower
    if not tower.has_batch_norm:
        return tower
    copy = deepcopy(tower).eval().requires_grad_(False)
    _fold(copy)
    copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    images = noise(model)
    with torch.no_grad():
        before, after = deepcopy(tower).eval()(images).pooled, copy(images).pooled
    return copy if bool((before - after).abs().max() <= TOLERANCE * before.abs().max()) else tower


def noise(model: DualEncoder) -> Tensor:
    """Two images (2, 3, S, S) to compare the features of two towers by."""
    size = model.preprocessor.size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(model.device)


def _fold(parent: nn.Module) -> None:
    previous = ""
    for name, child in list(parent.named_children()):
        convolution = getattr(parent, previous, None)
        if (
            isinstance(convolution, nn.Conv2d)
            and isinstance(child, _BatchNorm)
            and child.running_mean is not None
            and child.num_features == convolution.out_channels
        ):
            setattr(parent, previous, fuse_conv_bn_eval(convolution, child))
            setattr(parent, name, getattr(child, "act", nn.Identity()))  # timm's norms end with an activation
        else:
            _fold(child)
        previous = name
