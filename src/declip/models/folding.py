"""Image towers with batch norm folded into convolutions, which are faster on a CPU."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower

TOLERANCE = 1e-5
"""Largest difference of a folded tower's features, relative to the largest feature."""


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
    images = noise(model)
    with torch.no_grad():
        before = copy(images).pooled
        _fold(copy)
        copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        after = copy(images).pooled
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
