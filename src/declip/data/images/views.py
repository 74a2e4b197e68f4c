"""Training views: a random crop of each image, then color jitter, grayscale and blur, by its own parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.batch import View, unpack_photometric
from declip.recipe.schema import ImageView

# Weights of red, green and blue in a gray value, as in torchvision (ITU-R 601-2)
LUMA = (0.2989, 0.587, 0.114)
# Bytes of float32 images processed together on a CPU: they fit its second-level cache
CHUNK_BYTES = 1 << 19
# A tap further out weighs less than 2e-8 of the central one: no effect in float32
SIGMAS_KEPT = 6.0
NEUTRAL = np.array([1.0, 1.0, 1.0, 0.0], np.float32)  # factors without an effect
PEAKS = (0.0, 2.0, 4.0)  # hues of red, green and blue, in sixths of a turn
CROP_ATTEMPTS = 10  # boxes sampled before the largest central one is taken, as in torchvision's RandomResizedCrop
RATIO = (3 / 4, 4 / 3)  # smallest and largest aspect ratio of a box
BLUR_SIGMA = (0.1, 2.0)  # smallest and largest sigma of the blur, in pixels
BLUR_RADIUS = 6  # pixels that the blur's kernel reaches: three of the largest sigma, 99.7 % of the widest Gaussian


def apply(images: Tensor, photometric: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Apply the sampled parameters, then normalize: (n, 3, H, W) uint8 to float32, on the images' device."""
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    mean = mean.view(3, 1, 1)
    std = std.view(3, 1, 1)
    limit = len(images)
    if images.device.type == "cpu" and limit:
        limit = max(1, CHUNK_BYTES // (4 * images[0].numel()))
    for chunk in _chunks(photometric, limit):
        # A blocking copy would synchronize with the device, about a hundred times in a step.
        parts = [part.to(images.device, non_blocking=True) for part in chunk[1:4]]
        rows, factors, grays = parts
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
    columns = [column.numpy() for column in unpack_photometric(photometric.cpu())]
    factors, order, jitter, is_gray, sigma = columns
    # An operation without effect is removed from a sample's order: -1, sorted to the end.
    effective = (factors != NEUTRAL) & jitter[:, None]
    acts = np.take_along_axis(effective, order, axis=1)
    order = np.where(acts, order, -1)
    # (n, 4): the operations that act, in their order, then -1
    acting_first = np.argsort(~acts, axis=1, kind="stable")
    order = np.take_along_axis(order, acting_first, axis=1)
    # One number for each list of operations: equal ones form a chunk
    code = (order + 1) @ np.array([125, 25, 5, 1])
    rows = np.lexsort((sigma, code))
    edges = np.flatnonzero(np.diff(code[rows], prepend=-1, append=-1))
    for start, stop in pairwise(edges):
        operations = tuple(number for number in order[rows[start]].tolist() if number >= 0)
        for first in range(start, stop, limit):
            members = rows[first : min(first + limit, stop)]
            sigmas = sigma[members]
            blurred = sigmas[sigmas > 0]
            grays = np.flatnonzero(is_gray[members])
            own = np.ascontiguousarray(factors[members].T)
            arrays = (members, own, grays, blurred)
            yield _Chunk(operations, *map(torch.from_numpy, arrays))


def brightness(images: Tensor, factor: Tensor) -> None:
    """Multiply (n, 3, H, W) images by their factors (n,), in place; values stay in [0, 1], as in all below."""
    images.mul_(_each(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> None:
    """Move each image away from, or towards, its own mean gray value, in place."""
    level = images.mean(dim=(2, 3)) @ _like(images, LUMA)
    moved = level * (1 - factor)
    images.mul_(_each(factor)).add_(_each(moved)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> None:
    """Move each pixel away from, or towards, its own gray value, in place."""
    level = _luma(images).mul_(_each(1 - factor))
    images.mul_(_each(factor)).add_(level).clamp_(0, 1)


def hue(images: Tensor, shift: Tensor) -> None:
    """Turn the color circle by `shift` (n,), in turns, in place; lightness and chroma of each pixel stay.

    In sixths of a turn: with M and m the largest and smallest channel and C = M - m, a pixel's hue is
    sign(G - B) * (1 + (G + B - R - m) / C) in [-3, 3], and a channel with its peak at hue p has the value
    m + C * clamp(2 - d, 0, 1), where d = 3 - ||hue - p| - 3| is the distance to p around the circle.
    """
    red, green, blue = images.unbind(1)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(low)
    angle = (green + blue).sub_(red).sub_(low)
    angle.div_(chroma.clamp_min(1e-12)).add_(1).copysign_(green - blue)
    peak = _like(images, PEAKS) - 6 * shift[:, None]  # (n, 3)
    peak = peak - 6 * torch.round(peak / 6)
    torch.sub(angle[:, None], peak[:, :, None, None], out=images)
    images.abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
    images.mul_(chroma[:, None]).add_(low[:, None])


def gray(images: Tensor, rows: Tensor) -> None:
    """Replace the colors of the images `rows` (m,) by their gray value, in place."""
    level = _luma(images.index_select(0, rows))
    images.index_copy_(0, rows, level.expand(-1, 3, -1, -1))


def blur(images: Tensor, sigma: Tensor) -> None:
    """Blur (n, 3, H, W) images by a Gaussian of sigma (n,) pixels each, in place; sigma is above 0 and on the host.

    The kernel has 2 * BLUR_RADIUS + 1 taps along each axis and sums to one. The border is mirrored without repeating
    the outermost pixel.
    """
    distance = torch.arange(BLUR_RADIUS + 1, dtype=torch.float32)
    in_sigmas = distance / sigma.view(-1, 1)
    taps = torch.exp(-0.5 * in_sigmas**2)
    taps /= 2 * taps.sum(dim=1, keepdim=True) - 1
    widest = float(sigma.max())
    reach = min(BLUR_RADIUS, math.ceil(SIGMAS_KEPT * widest))
    taps = _each(taps.to(images.device, non_blocking=True))
    both = torch.empty_like(images)
    for axis in (3, 2):
        pad = (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach)
        source = F.pad(images, pad, mode="reflect")
        length = images.shape[axis]
        middle = source.narrow(axis, reach, length)
        torch.mul(middle, taps[..., 0], out=images)
        for k in range(1, reach + 1):
            before = source.narrow(axis, reach - k, length)
            after = source.narrow(axis, reach + k, length)
            torch.add(before, after, out=both)
            images.addcmul_(both, taps[..., k])


def _like(images: Tensor, values: tuple[float, ...]) -> Tensor:
    """Constants on the images' device, without the synchronization of `images.new_tensor`."""
    return torch.tensor(values, dtype=images.dtype).to(images.device, non_blocking=True)


def _each(values: Tensor) -> Tensor:
    """(n, ...) → (n, 1, 1, 1, ...), a number, or several, for each image."""
    return values[:, None, None, None]


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    level = red * LUMA[0]
    return level.add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


# The operations of the color jitter by their number in `Photometric.order`
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
        left = round(self.left / scale)
        top = round(self.top / scale)
        right = round((self.left + self.width) / scale)
        bottom = round((self.top + self.height) / scale)
        return Crop(left, top, right - left, bottom - top, self.flip)


class ViewTransform(NamedTuple):
    """Samples and makes one training view of `size` x `size` pixels, `interpolation` resizes its crop."""

    name: str
    size: int
    augmentation: ImageView
    interpolation: str = "bicubic"

    def box(
        self, width: int, height: int, generator: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Sample left, top, width and height of a box in pixels, as torchvision's RandomResizedCrop does."""
        low, high = self.augmentation.scale
        ratio_low = math.log(RATIO[0])
        ratio_high = math.log(RATIO[1])
        for _ in range(CROP_ATTEMPTS):
            size, shape, across, down = generator.random(4).tolist()
            share = low + (high - low) * size
            area = width * height * share
            ratio = math.exp(ratio_low + (ratio_high - ratio_low) * shape)
            w = round(math.sqrt(area * ratio))
            h = round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left = int(across * (width - w + 1))
                top = int(down * (height - h + 1))
                return left, top, w, h
        w = width
        h = height
        if width / height < RATIO[0]:
            h = max(1, round(width / RATIO[0]))
        elif width / height > RATIO[1]:
            w = max(1, round(height * RATIO[1]))
        left = (width - w) // 2
        top = (height - h) // 2
        return left, top, w, h

    def sample_crop(self, width: int, height: int, generator: np.random.Generator) -> Crop:
        """Sample the crop of an image of this size, and whether it is flipped."""
        box = self.box(width, height, generator)
        flip = generator.random() < self.augmentation.hflip_prob
        return Crop(*box, flip)

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
        if flip:
            view = view.flip(-1)
        return view[0]

    def sample_params(self, generator: np.random.Generator) -> list[float]:
        """Sample the photometric parameters of a view, a row of `unpack_photometric`.

        The number of random numbers does not depend on the options.
        """
        options = self.augmentation
        *draws, turn, spread, jittered, grayed, blurred = generator.random(8).tolist()
        order = generator.random(4).argsort().tolist()
        *strengths, turns = options.color_jitter
        factors = []
        for strength, draw in zip(strengths, draws, strict=True):
            low = max(0.0, 1 - strength)
            factors.append(low + (1 + strength - low) * draw)
        factors.append(turns * (2 * turn - 1))
        is_jittered = jittered < options.color_jitter_prob
        is_gray = grayed < options.grayscale_prob
        sigma = 0.0
        if blurred < options.blur_prob:
            low, high = BLUR_SIGMA
            sigma = low + (high - low) * spread
        return [*factors, *order, is_jittered, is_gray, sigma]


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
