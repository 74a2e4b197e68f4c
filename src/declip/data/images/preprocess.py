"""Preprocessing for evaluation, as CLIP's: resize the shorter side, center crop, normalize."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from declip.data.images.decode import apply_exif

# Of an image longer than this many times its shorter side, only what the crop keeps is resized.
LONGEST_SHAPE = 10


class Preprocess:
    """CLIP's preprocessing to `size` x `size` pixels; mean and std are of red, green and blue in [0, 1].

    Args:
        interpolation: "bicubic" (CLIP) or "bilinear".
        squash: Resize both sides to `size` instead of cropping, as SigLIP does.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        squash: bool = False,
    ) -> None:
        self.size, self.squash = size, squash
        self.filter = Image.Resampling[interpolation.upper()]
        self.mean = torch.tensor(tuple(mean), dtype=torch.float32)
        self.std = torch.tensor(tuple(std), dtype=torch.float32)

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Preprocess n images of any size and mode, or one, to (n, 3, size, size) float32 on the host."""
        images = [images] if isinstance(images, Image.Image) else images
        pixels = np.empty((len(images), self.size, self.size, 3), dtype=np.uint8)
        for row, image in enumerate(images):
            ready = image.mode == "RGB" and not image.info  # as `decode` leaves it
            pixels[row] = np.asarray(self.square(image if ready else apply_exif(image)))
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
        return batch.sub_(self.mean.view(3, 1, 1)).div_(self.std.view(3, 1, 1)).contiguous()

    def square(self, image: Image.Image) -> Image.Image:
        """Resize the shorter side to `size` and crop the center, as torchvision rounds; or squash."""
        if self.squash:
            return image.resize((self.size, self.size), self.filter)
        short = min(image.size)
        width, height = (int(self.size * side / short) for side in image.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        if max(image.size) > LONGEST_SHAPE * short:
            across, down = image.width / width, image.height / height
            box = (left * across, top * down, (left + self.size) * across, (top + self.size) * down)
            return image.resize((self.size, self.size), self.filter, box)
        resized = image.resize((width, height), self.filter)
        return resized.crop((left, top, left + self.size, top + self.size))
