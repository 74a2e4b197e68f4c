"""Training views of images, as MoCo v2's: sampling crops and photometric parameters, and applying them.

Crop and flip are done on single images as uint8, by the workers that decode them; color jitter, grayscale, blur and
normalization run on whole batches on the training device, from parameters that the worker sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.batch import Photometric, View
from declip.data.images import photometric as operations
from declip.recipe.schema import ImageView

CROP_ATTEMPTS = 10  # boxes sampled before the largest central one is taken, as in torchvision's RandomResizedCrop
RATIO = (3 / 4, 4 / 3)  # smallest and largest aspect ratio of a box
BLUR_SIGMA = (0.1, 2.0)  # smallest and largest sigma of the blur, in pixels
KERNEL_SIGMAS = 3.0  # of the largest sigma, which the blur's kernel reaches: 99.7 % of the widest Gaussian


class Crop(NamedTuple):
    """The crop of an image for one view, in pixels, and whether it is flipped."""

    left: int
    top: int
    width: int
    height: int
    flip: bool

    def reduced(self, scale: int) -> Crop:
        """The same crop of an image that is `scale` times smaller, rounded to its pixels."""
        left, top = round(self.left / scale), round(self.top / scale)
        right, bottom = round((self.left + self.width) / scale), round((self.top + self.height) / scale)
        return Crop(left, top, right - left, bottom - top, self.flip)


class ViewTransform:
    """Samples and makes one training view of `size` x `size` pixels."""

    def __init__(self, size: int, augmentation: ImageView) -> None:
        self.size, self.augmentation = size, augmentation
        # The mirrored border is at most one pixel narrower than the view.
        self.blur_radius = min(math.ceil(KERNEL_SIGMAS * BLUR_SIGMA[1]), size - 1)

    def box(self, width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """Sample left, top, width and height of a box in pixels, as torchvision's RandomResizedCrop does."""
        low, high = self.augmentation.scale
        ratio_low, ratio_high = math.log(RATIO[0]), math.log(RATIO[1])
        for _ in range(CROP_ATTEMPTS):
            size, shape, across, down = generator.random(4).tolist()
            area = width * height * (low + (high - low) * size)
            ratio = math.exp(ratio_low + (ratio_high - ratio_low) * shape)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
        w, h = width, height
        if width / height < RATIO[0]:
            h = max(1, round(width / RATIO[0]))
        elif width / height > RATIO[1]:
            w = max(1, round(height * RATIO[1]))
        return (width - w) // 2, (height - h) // 2, w, h

    def sample_crop(self, width: int, height: int, generator: np.random.Generator) -> Crop:
        """Sample the crop of an image of this size, and whether it is flipped."""
        return Crop(*self.box(width, height, generator), bool(generator.random() < self.augmentation.hflip_prob))

    def crop_and_resize(self, pixels: np.ndarray, crop: Crop) -> Tensor:
        """Crop, resize (bicubic, antialiased) and maybe flip (H, W, 3) uint8 pixels to (3, size, size) uint8.

        torch's resize of uint8 takes a third to half of the time of Pillow's and differs by a level or two of 255.
        """
        left, top, width, height, flip = crop
        # Cropped first, so that pixels around the box stay out of the filter, as torchvision does it.
        part = torch.from_numpy(pixels[top : top + height, left : left + width].copy())
        view = F.interpolate(part.permute(2, 0, 1).unsqueeze(0), (self.size, self.size), mode="bicubic", antialias=True)
        return (view.flip(-1) if flip else view)[0]

    def sample_params(self, generator: np.random.Generator) -> Photometric:
        """Sample the photometric parameters of a view; the number of random numbers does not depend on the options."""
        strength = self.augmentation.color_jitter
        *factors, turn, spread, jittered, gray, blurred = generator.random(8).tolist()
        order = generator.random(4).argsort()
        brightness, contrast, saturation = (
            (low := max(0.0, 1 - s)) + (1 + s - low) * u for s, u in zip(strength, factors, strict=False)
        )
        low, high = BLUR_SIGMA
        return Photometric(
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=strength[3] * (2 * turn - 1),
            order=tuple(order.tolist()),
            jitter=jittered < self.augmentation.color_jitter_prob,
            gray=gray < self.augmentation.grayscale_prob,
            sigma=low + (high - low) * spread if blurred < self.augmentation.blur_prob else 0.0,
            radius=self.blur_radius,
        )


def apply_photometric(views: Mapping[str, View], mean: Tensor, std: Tensor) -> dict[str, View]:
    """Apply the sampled parameters and normalize to (B, 3, S, S) float32; finished views are unchanged."""
    finished = dict(views)
    sizes: dict[torch.Size, dict[str, Photometric]] = {}
    for name, view in views.items():
        if view.photometric is not None:
            sizes.setdefault(view.pixels.shape, {})[name] = view.photometric
    for params in sizes.values():
        pixels = torch.cat([views[name].pixels for name in params])
        chunks = operations.apply(pixels, Photometric.cat([*params.values()]), mean, std).chunk(len(params))
        finished |= {name: View(chunk) for name, chunk in zip(params, chunks, strict=True)}
    return finished
