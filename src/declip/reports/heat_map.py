"""A map of similarities drawn over its image."""

import numpy as np
from PIL import Image

HEAT = (240, 80, 20)  # the color of the most similar place
DIMMED = 0.55  # how far the image is mixed with white where the map is at its median or below


def heat_map(image: Image.Image, similarities: np.ndarray) -> Image.Image:
    """Draw similarities (H, W) over an image (H, W): in color above their median, the strongest at their maximum."""
    lowest, highest = np.median(similarities), similarities.max()
    heat = np.clip((similarities - lowest) / max(highest - lowest, 1e-12), 0, 1)[..., None]
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    gray = pixels.mean(-1, keepdims=True) * (1 - DIMMED) + 255 * DIMMED
    # What is similar keeps its own colors, under half of the heat.
    mixed = (1 - heat) * gray + heat * (pixels + np.array(HEAT)) / 2
    return Image.fromarray(mixed.astype(np.uint8))
