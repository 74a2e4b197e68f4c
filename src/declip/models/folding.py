"""Image towers with batch norm and activations folded into convolutions, which are faster on a CPU."""

import math
from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower

TOLERANCE = 1e-5
"""Largest difference of a folded tower's features, relative to the largest feature."""

ACTIVATIONS = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}
"""What oneDNN computes together with a convolution: its name there, and its constants."""


class FusedConvolution(nn.Module):
    """A convolution with its activation in one pass over memory, and without a padded copy of its input.

    A third of EfficientNet-Lite's time would be spent on both. It calls the function that torch.compile calls; as that
    is private, `folded` compares its features and can do without.
    """

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module) -> None:
        from declip.models.timm_import import timm  # a second, but it is imported: the norm is its own

        super().__init__()
        self.convolution, self.activation = convolution, ACTIVATIONS[type(activation)]
        self.same = isinstance(convolution, timm.layers.Conv2dSame)

    def forward(self, images: Tensor) -> Tensor:
        """(n, C, H, W) → (n, D, h, w)."""
        own = self.convolution
        weight, padding = own.weight, own.padding
        if self.same:
            sizes = zip(images.shape[2:], own.kernel_size, own.stride, strict=True)
            height, width = (max((math.ceil(n / step) - 1) * step + side - n, 0) for n, side, step in sizes)
            # TensorFlow pads by one more at the end: as much at the start is not seen by filters that begin with a 0.
            weight = pad(weight, (width % 2, 0, height % 2, 0))
            padding = (height + 1) // 2, (width + 1) // 2
        return torch.ops.mkldnn._convolution_pointwise(
            images, weight, own.bias, padding, own.stride, own.dilation, own.groups, *self.activation, ""
        )


def inference_tower(model: DualEncoder) -> ImageTower:
    """A copy of the image tower that is faster on a CPU, with batch norm folded into convolutions; or the tower itself.

    The towers of the built-in starts become about 2 times as fast.
    """
    tower = model.image_tower
    if model.device.type != "cpu" or next(tower.parameters()).dtype != torch.float32:
        return tower  # other types would round the weights again
    return folded(model)


def folded(model: DualEncoder) -> ImageTower:
    """A copy of the float32 image tower, channels last, with batch norm folded into convolutions; or the tower itself.

    On a CPU, activations after batch norm too. Whether a norm follows a convolution is assumed from their order in the
    module, so the features of two images are compared; where they differ, the tower itself is returned.
    """
    tower = model.image_tower
    if not tower.has_batch_norm:
        return tower
    images = noise(model)
    fusable = model.device.type == "cpu" and torch.backends.mkldnn.is_available()
    before = None
    with torch.no_grad():
        for fused in (True, False) if fusable else (False,):
            copy = deepcopy(tower).eval().requires_grad_(False)
            before = copy(images).pooled if before is None else before
            _fold(copy, fused)
            copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
            try:
                after = copy(images).pooled
            except (RuntimeError, AttributeError):  # of a processor or a torch whose oneDNN is another
                continue
            if (before - after).abs().max() <= TOLERANCE * before.abs().max():
                return copy
    return tower


def noise(model: DualEncoder) -> Tensor:
    """Two images (2, 3, S, S) to compare the features of two towers by."""
    size = model.preprocessor.size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(model.device)


def _fold(parent: nn.Module, fused: bool) -> None:
    previous = ""
    for name, child in list(parent.named_children()):
        convolution = getattr(parent, previous, None)
        if (
            isinstance(convolution, nn.Conv2d)
            and isinstance(child, _BatchNorm)
            and child.running_mean is not None
            and child.num_features == convolution.out_channels
        ):
            merged: nn.Module = fuse_conv_bn_eval(convolution, child)
            activation: nn.Module = getattr(child, "act", nn.Identity())  # timm's norms end with one
            if fused and hasattr(child, "act") and type(activation) in ACTIVATIONS and max(convolution.dilation) == 1:
                merged, activation = FusedConvolution(cast(nn.Conv2d, merged), activation), nn.Identity()
            setattr(parent, previous, merged)
            setattr(parent, name, activation)
        else:
            _fold(child, fused)
        previous = name
