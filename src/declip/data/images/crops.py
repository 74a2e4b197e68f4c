"""Image views: what happens to a picture before a tower sees it, in training and in evaluation.

In training a view is MoCo v2's: random resized crop, color jitter in a random order, gray, blur, horizontal
flip, normalisation. Crop and flip are done on single pictures as uint8, by the workers that decode them; the
rest runs on whole batches on the training device, from parameters that the worker drew. The flip may come
first because it commutes with the rest: jitter and gray treat all pixels alike, and the blur's kernel and its
mirrored border are symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from declip.data.batch import Draw, Photometric
from declip.data.checks import check_range, check_span
from declip.data.images import photometric as operations
from declip.errors import UserError

CROP_ATTEMPTS = 10
"""Boxes drawn before the largest central one is taken, as in torchvision's RandomResizedCrop."""

KERNEL_SIGMAS = 3.0
"""The blur's kernel reaches this many of the largest sigma: 99.7 % of the widest Gaussian."""

LARGEST_SIDE = 4096
"""Pixels. No tower takes more; a larger number is a slip, and would end in a lack of memory."""

LONGEST_SHAPE = 10
"""Of a picture longer than this many times its shorter side only the middle is resized: the rest is cut off
anyway, and a line of 1 x 30,000 pixels would become one of 224 x 6,720,000."""


class Crop(NamedTuple):
    """What is cut out of a picture for one view, in pixels."""

    left: int
    top: int
    width: int
    height: int
    flip: bool

    def reduced(self, scale: int) -> Crop:
        """The same in a picture that is `scale` times smaller, to the nearest of its pixels."""
        left, top = round(self.left / scale), round(self.top / scale)
        right, bottom = round((self.left + self.width) / scale), round((self.top + self.height) / scale)
        return Crop(left, top, right - left, bottom - top, self.flip)


class ImageViews:
    """Draws and makes the training views of a picture.

    Args:
        size: Side of a view in pixels.
        scale: Smallest and largest share of the picture's area in a crop.
        ratio: Smallest and largest ratio of a crop's width to its height.
        jitter: Strengths for brightness, contrast, saturation (factors from max(0, 1 - s) to 1 + s) and hue
            (a shift from -s to s turns, at most 0.5).
        color_jitter_prob: Share of the views that are jittered.
        grayscale_prob: Share of the views that become gray.
        blur_prob: Share of the views that are blurred.
        blur_sigma: Smallest and largest sigma of the blur, in pixels of the view.
        hflip_prob: Share of the views that are flipped left to right.
        mean: Of red, green and blue in [0, 1], subtracted last.
        std: Of red, green and blue, divided by last.

    Raises:
        UserError: An option is out of its range.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: Sequence[float] = (0.2, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
        color_jitter_prob: float = 0.8,
        grayscale_prob: float = 0.2,
        blur_prob: float = 0.5,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        hflip_prob: float = 0.5,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        _check_size_and_norm(size, mean, std)
        check_span("scale", scale, 0, 1)
        check_span("ratio", ratio, 0)
        check_span("blur_sigma", blur_sigma, 0)
        if len(jitter) != 4:
            raise UserError(
                f"jitter is {list(jitter)}; it must be four strengths: brightness, contrast, saturation, hue."
            )
        for name, strength in zip(("brightness", "contrast", "saturation"), jitter, strict=False):
            check_range(f"jitter for {name}", strength, 0)
        check_range("jitter for hue", jitter[3], 0, 0.5)
        shares = {
            "color_jitter_prob": color_jitter_prob,
            "grayscale_prob": grayscale_prob,
            "blur_prob": blur_prob,
            "hflip_prob": hflip_prob,
        }
        for name, share in shares.items():
            check_range(name, share, 0, 1)
        self.size = size
        self.scale = tuple(scale)
        self.ratio = tuple(ratio)
        self.jitter = tuple(jitter)
        self.color_jitter_prob, self.grayscale_prob, self.blur_prob, self.hflip_prob = (
            color_jitter_prob,
            grayscale_prob,
            blur_prob,
            hflip_prob,
        )
        self.blur_sigma = tuple(blur_sigma)
        # The mirrored border is at most one pixel narrower than the view.
        self.blur_radius = min(math.ceil(KERNEL_SIGMAS * self.blur_sigma[1]), size - 1)
        self.mean = torch.tensor(tuple(mean), dtype=torch.float32)
        self.std = torch.tensor(tuple(std), dtype=torch.float32)

    def box(self, width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw a crop, distributed as by torchvision's RandomResizedCrop.

        Area uniform, logarithm of the ratio uniform, place uniform among those inside the picture. A box that
        is larger than the picture is drawn again; after ten, it is the largest central one with an allowed
        ratio.

        Returns:
            Left, top, width, height, in pixels.
        """
        low, high = self.scale
        ratio_low, ratio_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(CROP_ATTEMPTS):
            share, shape, across, down = generator.random(4).tolist()
            area = width * height * (low + (high - low) * share)
            ratio = math.exp(ratio_low + (ratio_high - ratio_low) * shape)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
        w, h = width, height
        if width / height < self.ratio[0]:
            h = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            w = max(1, round(height * self.ratio[1]))
        return (width - w) // 2, (height - h) // 2, w, h

    def draw_crop(self, width: int, height: int, generator: np.random.Generator) -> Crop:
        """Draw what is cut out of a picture of this size, and whether it is flipped."""
        return Crop(*self.box(width, height, generator), bool(generator.random() < self.hflip_prob))

    def cut(self, pixels: np.ndarray, crop: Crop) -> Tensor:
        """Crop, resize (bicubic, antialiased) and perhaps flip a picture.

        The resize is torch's on uint8: two to three times as quick as Pillow's and the same but for rounding
        between its two passes (a level or two of 255; more where an edge from black to white overshoots).

        Args:
            pixels: RGB, (H, W, 3) uint8.
            crop: Inside them.

        Returns:
            (3, size, size) uint8.
        """
        left, top, width, height, flip = crop
        # Cut first, so that what is around the box stays out of the filter, as torchvision does.
        part = torch.from_numpy(pixels[top : top + height, left : left + width].copy())
        view = F.interpolate(part.permute(2, 0, 1).unsqueeze(0), (self.size, self.size), mode="bicubic", antialias=True)
        return (view.flip(-1) if flip else view)[0]

    def crop(self, image: Image.Image | np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Draw a crop and cut it out.

        Args:
            image: RGB, or its pixels (H, W, 3) uint8; those save the conversion when several views are made.
            generator: The sample's own.

        Returns:
            (3, size, size) uint8.
        """
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        return self.cut(pixels, self.draw_crop(width, height, generator)).numpy()

    def draw(self, generator: np.random.Generator) -> Draw:
        """Draw the photometric parameters of one view.

        The same number of draws whatever the options, so that a change of one leaves the others' draws alone.
        """
        strength = self.jitter
        *factors, turn, spread, jittered, gray, blurred = generator.random(8).tolist()
        order = generator.random(4).argsort()
        brightness, contrast, saturation = (
            (low := max(0.0, 1 - s)) + (1 + s - low) * u for s, u in zip(strength, factors, strict=False)
        )
        low, high = self.blur_sigma
        return Draw(
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=strength[3] * (2 * turn - 1),
            order=tuple(order.tolist()),
            jitter=jittered < self.color_jitter_prob,
            gray=gray < self.grayscale_prob,
            sigma=low + (high - low) * spread if blurred < self.blur_prob else 0.0,
        )

    def finish(self, images: Tensor, photometric: Photometric) -> Tensor:
        """Apply the drawn parameters and normalize, on the device of the images.

        Args:
            images: (V, B, 3, H, W) uint8.
            photometric: The draws of all of them.

        Returns:
            (V, B, 3, H, W) float32.
        """
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return operations.apply(images, photometric, self.blur_radius, mean, std)


class Preprocess:
    """What evaluation does to a picture, CLIP's way: resize the shorter side, cut the center, normalize.

    Args:
        size: Side of the result in pixels.
        mean: Of red, green and blue in [0, 1].
        std: Of red, green and blue.

    Raises:
        UserError: An option is out of its range.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        _check_size_and_norm(size, mean, std)
        self.size = size
        self.mean = torch.tensor(tuple(mean), dtype=torch.float32)
        self.std = torch.tensor(tuple(std), dtype=torch.float32)

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Prepare pictures.

        Args:
            images: n pictures of any size and mode, or one; what is transparent is seen over white.

        Returns:
            (n, 3, size, size) float32 on the host; n is 1 for one picture.
        """
        pictures = [images] if isinstance(images, Image.Image) else images
        pixels = np.empty((len(pictures), self.size, self.size, 3), dtype=np.uint8)
        for row, picture in enumerate(pictures):
            pixels[row] = np.asarray(self.square(_over_white(picture)))
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
        return batch.sub_(self.mean.view(3, 1, 1)).div_(self.std.view(3, 1, 1)).contiguous()

    def square(self, image: Image.Image) -> Image.Image:
        """Resize the shorter side to `size`, bicubic, and cut out the center, rounding as torchvision does."""
        width, height = image.size
        longest = LONGEST_SHAPE * min(width, height)
        if max(width, height) > longest:
            left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
            image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
            width, height = image.size
        short = min(width, height)
        width, height = (int(self.size * side / short) for side in (width, height))
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + self.size, top + self.size))


def _over_white(image: Image.Image) -> Image.Image:
    """The picture as RGB; what is transparent shows white."""
    if image.mode == "RGB":
        return image
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _check_size_and_norm(size: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Check the options that all views share."""
    check_range("size", size, 1, LARGEST_SIDE)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise UserError(f"{name} is {list(values)}; it must be three numbers: red, green, blue.")
        for value in values:
            check_range(name, value, 1e-6 if name == "std" else -1e6, 1e6)
