"""Preprocessing for evaluation, as CLIP's: resize the shorter side, center crop, normalize."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LONGEST_SHAPE = 10
"""Of a picture longer than this many times its shorter side only the middle is resized: the rest is cut off
anyway, and a line of 1 x 30,000 pixels would become one of 224 x 6,720,000."""


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
