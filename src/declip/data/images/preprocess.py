"""Preprocessing for evaluation, as CLIP's: resize the shorter side, center crop, normalize."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from declip.data.images.decode import apply_exif
from declip.data.pair import LazyImage

# An image with a larger aspect ratio is cropped before it is resized.
LONGEST_SHAPE = 10
# Shorter side of a reduced image, at least, in multiples of `resize`: with 1.0 features differ six times as much.
REDUCED_SIDE = 2.0


class Preprocess:
    """CLIP's preprocessing to `size` x `size` pixels; to squash is to resize both sides instead, as SigLIP does.

    `resize`, by default `size`, is the shorter side before the center crop.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        squash: bool = False,
        resize: int | None = None,
    ) -> None:
        self.resize = resize or size
        # Pixels of the shorter side of a reduced image, see `LazyImage.reduced`
        self.enough = REDUCED_SIDE * self.resize
        self.size = size
        self.squash = squash
        self.filter = Image.Resampling[interpolation.upper()]
        self.mean = torch.tensor(tuple(mean), dtype=torch.float32)
        self.std = torch.tensor(tuple(std), dtype=torch.float32)

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Preprocess n images of any size and mode, or one, to (n, 3, size, size) float32 on the host."""
        if isinstance(images, Image.Image):
            images = [images]
        shape = len(images), self.size, self.size, 3
        pixels = np.empty(shape, np.uint8)
        for row, image in enumerate(images):
            if image.mode != "RGB" or image.info:  # `decode` leaves an image RGB, without info
                image = apply_exif(image)
            pixels[row] = np.asarray(self.square(image))
        channels_last = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return self.normalize(channels_last).contiguous()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize pixels (n, 3, size, size) uint8 as float32, in their memory format and on their device."""
        mean = self.mean.to(pixels.device).view(3, 1, 1)
        std = self.std.to(pixels.device).view(3, 1, 1)
        return pixels.float().div_(255).sub_(mean).div_(std)

    def fast(self, image: LazyImage) -> Tensor:
        """Decode as little of an image as `resized` needs; without reduction it differs from `square` by a level."""
        return self.resized(image.reduced(self.enough))

    def resized(self, pixels: np.ndarray) -> Tensor:
        """Crop and resize (H, W, 3) to (3, size, size) uint8, channels last, in a third of Pillow's time."""
        height, width = pixels.shape[:2]
        short = min(height, width)
        if max(height, width) > LONGEST_SHAPE * short:
            square = np.array(self.square(Image.fromarray(pixels)))
            return torch.from_numpy(square).permute(2, 0, 1)
        inner = (self.size, self.size)
        if not self.squash:
            inner = int(self.resize * height / short), int(self.resize * width / short)
        if not pixels.flags.writeable:
            pixels = pixels.copy()
        given = torch.from_numpy(pixels).permute(2, 0, 1)
        if inner != (height, width):
            mode = self.filter.name.lower()
            given = F.interpolate(given[None], inner, mode=mode, antialias=True)[0]
        top, left = (round((side - self.size) / 2) for side in inner)
        return given[:, top : top + self.size, left : left + self.size]

    def square(self, image: Image.Image) -> Image.Image:
        """Resize the shorter side to `resize` and crop the center, as torchvision rounds; or squash."""
        square = self.size, self.size
        if self.squash:
            return image.resize(square, self.filter)
        short = min(image.size)
        width, height = (int(self.resize * side / short) for side in image.size)
        left = round((width - self.size) / 2)
        top = round((height - self.size) / 2)
        right = left + self.size
        bottom = top + self.size
        if max(image.size) > LONGEST_SHAPE * short:
            across = image.width / width
            down = image.height / height
            box = (left * across, top * down, right * across, bottom * down)
            return image.resize(square, self.filter, box)
        resized = image.resize((width, height), self.filter)
        return resized.crop((left, top, right, bottom))
