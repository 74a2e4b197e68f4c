"""Training views: a random crop of each image, then color jitter, grayscale and blur, by its own parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.batch import Photometric, View, unpack_photometric
from declip.recipe.schema import ImageView

LUMA = (
    0.2989,
    0.587,
    0.114,
)  # of red, green and blue in a gray value, as torchvision has it (ITU-R 601-2)
# Of the float32 images processed together on a CPU: they fit its second-level cache
CHUNK_BYTES = 1 << 19
# A tap further out weighs less than 2e-8 of the central one: no effect in float32
SIGMAS_KEPT = 6.0
CROP_ATTEMPTS = 10  # boxes sampled before the largest central one is taken, as in torchvision's RandomResizedCrop
RATIO = (3 / 4, 4 / 3)  # smallest and largest aspect ratio of a box
BLUR_SIGMA = (0.1, 2.0)  # smallest and largest sigma of the blur, in pixels
BLUR_RADIUS = 6  # pixels that the blur's kernel reaches: three of the largest sigma, 99.7 % of the widest Gaussian


def apply(images: Tensor, photometric: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Apply the sampled parameters, then normalize: (n, 3, H, W) uint8 to float32, on the images' device."""
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    mean, std = mean.view(3, 1, 1), std.view(3, 1, 1)
    limit = len(images)
    if images.device.type == "cpu" and limit:
        limit = max(1, CHUNK_BYTES // (4 * images[0].numel()))
    for chunk in _chunks(photometric, limit):
        # A blocking copy would synchronize with the device, about a hundred times in a step.
        rows, factors, grays = (part.to(images.device, non_blocking=True) for part in chunk[1:4])
        pixels = images.index_select(0, rows).float().div_(255)
        for number in chunk.operations:
            JITTER[number](pixels, factors[number])
        if grays.numel():
            gray(pixels, grays)
        if chunk.sigma.numel():
            blur(pixels[-len(chunk.sigma) :], chunk.sigma)
        out.index_copy_(0, rows, pixels.sub_(mean).div_(std))
    return out


class _Chunk(NamedTuple):
    """Samples that are processed together: they have the same operations in the same order."""

    operations: tuple[int, ...]
    rows: Tensor  # (n,) int64, the samples among all n
    factors: Tensor  # (4, n) float32, by number of operation
    gray: Tensor  # (m,) int64, which of the n become gray
    sigma: Tensor  # (k,) float32, of the last k of the n; the others are not blurred


def _chunks(photometric: Tensor, limit: int) -> Iterator[_Chunk]:
    """Group the samples by their operations, at most `limit` in a chunk, those with the widest blur last."""
    params = unpack_photometric(photometric.cpu())
    jitter = params.jitter.numpy()
    is_gray = params.gray.numpy()
    sigma = params.sigma.numpy()
    factors = params.factors.T.contiguous().numpy()  # (4, n)
    order = params.order.numpy()
    neutral = np.array([[1.0], [1.0], [1.0], [0.0]], dtype=np.float32)
    # An operation without effect is removed from a sample's order: -1, sorted to the end.
    acts = np.take_along_axis((factors != neutral).T & jitter[:, None], order, axis=1)
    order = np.where(acts, order, -1)
    # (n, 4): the operations that act, in their order, then -1
    order = np.take_along_axis(order, np.argsort(~acts, axis=1, kind="stable"), axis=1)
    # One number for each list of operations: equal ones form a chunk
    code = (order + 1) @ np.array([125, 25, 5, 1])
    rows = np.lexsort((sigma, code))
    edges = np.flatnonzero(np.diff(code[rows], prepend=-1))
    for start, stop in zip(edges, [*edges[1:], len(rows)], strict=True):
        operations = tuple(number for number in order[rows[start]].tolist() if number >= 0)
        for first in range(start, stop, limit):
            members = rows[first : min(first + limit, stop)]
            blurred = sigma[members][sigma[members] > 0]
            arrays = members, factors[:, members], np.flatnonzero(is_gray[members]), blurred
            yield _Chunk(operations, *map(torch.from_numpy, arrays))


def brightness(images: Tensor, factor: Tensor) -> None:
    """Multiply (n, 3, H, W) images by their factors (n,), in place; values stay in [0, 1], as in all below."""
    images.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> None:
    """Move each image away from, or towards, its own mean gray value, in place."""
    level = images.mean(dim=(2, 3)) @ _like(images, LUMA)
    images.mul_(factor.view(-1, 1, 1, 1)).add_((level * (1 - factor)).view(-1, 1, 1, 1)).clamp_(
        0, 1
    )


def saturation(images: Tensor, factor: Tensor) -> None:
    """Move each pixel away from, or towards, its own gray value, in place."""
    level = _luma(images).mul_((1 - factor).view(-1, 1, 1, 1))
    images.mul_(factor.view(-1, 1, 1, 1)).add_(level).clamp_(0, 1)


def hue(images: Tensor, shift: Tensor) -> None:
    """Turn the color circle by `shift` (n,), in turns, in place; lightness and chroma of each pixel stay.

    In sixths of a turn: with M and m the largest and smallest channel and C = M - m, a pixel's hue is
    sign(G - B) * (1 + (G + B - R - m) / C) in [-3, 3], and a channel with its peak at hue p has the value
    m + C * clamp(2 - d, 0, 1), where d = 3 - ||hue - p| - 3| is the distance to p around the circle.
    """
    red, green, blue = images.unbind(1)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(low)
    angle = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(1e-12)).add_(1)
    angle.copysign_(green - blue)
    peak = _like(images, (0.0, 2.0, 4.0)) - 6 * shift.view(-1, 1)
    peak = peak - 6 * torch.round(peak / 6)
    torch.sub(angle.unsqueeze(1), peak.view(-1, 3, 1, 1), out=images)
    images.abs_().sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma.unsqueeze(1)).add_(
        low.unsqueeze(1)
    )


def gray(images: Tensor, rows: Tensor) -> None:
    """Replace the colors of the images `rows` (m,) by their gray value, in place."""
    images.index_copy_(0, rows, _luma(images.index_select(0, rows)).expand(-1, 3, -1, -1))


def blur(images: Tensor, sigma: Tensor) -> None:
    """Blur (n, 3, H, W) images by a Gaussian of sigma (n,) pixels each, in place; sigma is above 0 and on the host.

    The kernel has 2 * BLUR_RADIUS + 1 taps along each axis and sums to one. The border is mirrored without repeating
    the outermost pixel.
    """
    distance = torch.arange(BLUR_RADIUS + 1, dtype=torch.float32)
    taps = torch.exp(-0.5 * (distance / sigma.view(-1, 1)) ** 2)
    taps /= 2 * taps.sum(dim=1, keepdim=True) - 1
    reach = min(BLUR_RADIUS, math.ceil(SIGMAS_KEPT * float(sigma.max())))
    taps = taps.to(images.device, non_blocking=True).view(len(images), 1, 1, 1, BLUR_RADIUS + 1)
    both = torch.empty_like(images)
    for axis in (3, 2):
        pad = (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach)
        source, length = F.pad(images, pad, mode="reflect"), images.shape[axis]
        torch.mul(source.narrow(axis, reach, length), taps[..., 0], out=images)
        for k in range(1, reach + 1):
            torch.add(
                source.narrow(axis, reach - k, length),
                source.narrow(axis, reach + k, length),
                out=both,
            )
            images.addcmul_(both, taps[..., k])


def _like(images: Tensor, values: tuple[float, ...]) -> Tensor:
    """Constants on the images' device, without the synchronization of `images.new_tensor`."""
    return torch.tensor(values, dtype=images.dtype).to(images.device, non_blocking=True)


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


# The operations of the color jitter by their number in `Photometric.order`.
JITTER = (brightness, contrast, saturation, hue)


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
        right = round((self.left + self.width) / scale)
        bottom = round((self.top + self.height) / scale)
        return Crop(left, top, right - left, bottom - top, self.flip)


class ViewTransform:
    """Samples and makes one training view of `size` x `size` pixels."""

    def __init__(self, size: int, augmentation: ImageView, interpolation: str = "bicubic") -> None:
        self.size, self.augmentation, self.interpolation = size, augmentation, interpolation

    def box(
        self, width: int, height: int, generator: np.random.Generator
    ) -> tuple[int, int, int, int]:
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
        return Crop(
            *self.box(width, height, generator),
            bool(generator.random() < self.augmentation.hflip_prob),
        )

    def crop_and_resize(self, pixels: np.ndarray, crop: Crop) -> Tensor:
        """Crop, resize (antialiased) and maybe flip (H, W, 3) uint8 to (3, size, size) uint8."""
        left, top, width, height, flip = crop
        # Cropped first, so that pixels around the box stay out of the filter, as torchvision does it. torch's resize of
        # uint8 takes a third to half of the time of Pillow's and differs by a level or two of 255.
        cropped = torch.from_numpy(pixels[top : top + height, left : left + width].copy())
        cropped = cropped.permute(2, 0, 1).unsqueeze(0)
        view = F.interpolate(
            cropped, (self.size, self.size), mode=self.interpolation, antialias=True
        )
        return (view.flip(-1) if flip else view)[0]

    def sample_params(self, generator: np.random.Generator) -> Photometric:
        """Sample the photometric parameters of a view; the number of random numbers does not depend on the options."""
        strength = self.augmentation.color_jitter
        *factors, turn, spread, jittered, gray, blurred = generator.random(8).tolist()
        order = generator.random(4).argsort()
        brightness, contrast, saturation = (
            (low := max(0.0, 1 - s)) + (1 + s - low) * u
            for s, u in zip(strength, factors, strict=False)
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
        )


Finish = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Images (n, 3, H, W), packed parameters (n, PHOTOMETRIC_WIDTH), mean and std → finished images."""


def apply_photometric(
    views: Mapping[str, View], mean: Tensor, std: Tensor, finish: Finish = apply
) -> dict[str, View]:
    """Apply the sampled parameters and normalize to (B, 3, S, S) float32; finished views are unchanged."""
    finished = dict(views)
    # Views of one size are finished in one call.
    names_of: dict[torch.Size, list[str]] = {}
    for name, view in views.items():
        if view.photometric is not None:
            names_of.setdefault(view.pixels.shape, []).append(name)
    for names in names_of.values():
        pixels = torch.cat([views[name].pixels for name in names])
        params = [views[name].photometric for name in names]
        packed = torch.cat([some for some in params if some is not None])
        chunks = finish(pixels, packed, mean, std).chunk(len(names))
        for name, chunk in zip(names, chunks, strict=True):
            finished[name] = View(chunk)
    return finished
