"""Image towers with batch norm folded into convolutions, which are faster."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import BatchNorm, ImageTower

TOLERANCE = 1e-5
"""Largest difference of a folded tower's features, relative to the largest feature."""


def inference_tower(model: DualEncoder) -> ImageTower:
    """A copy of the image tower that is faster on a CPU, or the tower itself: see `folded`."""
    if model.device.type != "cpu":
        return model.image_tower
    if next(model.image_tower.parameters()).dtype != torch.float32:
        return model.image_tower  # other types would round the weights again
    return folded(model)


def folded(model: DualEncoder) -> ImageTower:
    """A copy of the float32 image tower with batch norm folded into convolutions, or the tower itself.

    The copy is channels last. Whether a norm follows a convolution is assumed from their order in
    the module, so the features of two images are compared; where they differ, the tower itself is
    returned.
    """
    tower = model.image_tower
    if not tower.has_batch_norm:
        return tower
    copy = deepcopy(tower).eval().requires_grad_(False)
    images = noise(model)
    with torch.no_grad():
        before = copy(images).pooled
        _fold(copy)
        copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
        after = copy(images).pooled
    difference = (before - after).abs().max()
    if difference <= TOLERANCE * before.abs().max():
        return copy
    return tower


def noise(model: DualEncoder) -> Tensor:
    """Two images (2, 3, S, S) to compare the features of two towers by."""
    size = model.preprocessor.size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, size, size, generator=generator).to(model.device)


def _fold(parent: nn.Module) -> None:
    """Fold each batch norm of a module into the convolution before it."""
    previous = ""
    for name, child in list(parent.named_children()):
        convolution = getattr(parent, previous, None)
        if (
            isinstance(convolution, nn.Conv2d)
            and isinstance(child, BatchNorm)
            and _fits(child, convolution)
        ):
            setattr(parent, previous, fuse_conv_bn_eval(convolution, child))
            # timm's norms end with an activation
            setattr(parent, name, getattr(child, "act", nn.Identity()))
        else:
            _fold(child)
        previous = name


def _fits(norm: BatchNorm, convolution: nn.Conv2d) -> bool:
    """Whether a norm has running statistics of as many channels as a convolution."""
    return norm.running_mean is not None and norm.num_features == convolution.out_channels
