"""Heat map of a text over an image: how much each region contributes to their similarity.

python examples/heat_map.py runs/demo photo.jpg "a red apple" map.png

It shows which object is meant, not its outline. Convolutional towers show more detail with a larger size, such as 384.
"""

import math
import sys
from copy import copy

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import declip
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower, grid_tokens

CELLS = 32  # cells that are pooled at a time: attention pools copy the complete map for each
HEAT = (240.0, 80.0, 20.0)  # color of the most similar region
DIMMED = 0.55  # fraction of white in the other regions


def encode_cells(tower: ImageTower, pixels: Tensor) -> Tensor:
    """Embed the patches or grid cells of images (B, 3, H, W), row by row: (B, P, d), not normalized.

    The embedding of a cell is that of a feature map whose cells are all equal to it. Behind a mean or a class token
    that is the projection of the cell, behind attention the path of its value, as in MaskCLIP (arXiv 2112.01071).
    """
    trunk = tower.trunk
    features = trunk.forward_features(pixels)
    cells = grid_tokens(trunk, features)  # (B, P, width)
    rows = cells.flatten(0, 1)  # (B·P, width)
    if features.ndim == 3:  # tokens: (n, prefix tokens + 1, width)
        prefix = getattr(trunk, "num_prefix_tokens", 0)
        alike = rows[:, None].expand(-1, prefix + 1, -1)
    elif features.shape[1] == rows.shape[1]:  # channels first: (n, width, h, w)
        alike = rows[:, :, None, None].expand(-1, -1, *features.shape[2:])
    else:  # channels last: (n, h, w, width)
        alike = rows[:, None, None].expand(-1, *features.shape[1:3], -1)
    pooled = [trunk.forward_head(part, pre_logits=True) for part in alike.split(CELLS)]
    embedded = tower.proj(tower.norm(torch.cat(pooled)))
    return embedded.unflatten(0, cells.shape[:2])


@torch.no_grad()
def similarity_map(
    model: DualEncoder, image: Image.Image, text: str, size: int | None = None
) -> Tensor:
    """Compute how much every pixel of an image contributes to its similarity with a text.

    Returns (H, W) float32 in the size of the image, of any sign. If the tower pools its cells by a mean and its
    projection is linear, the mean of the map is the cosine of text and image. The image is squashed to a square of
    `size` pixels, by default that of training, so that all of it is seen.
    """
    preprocess = copy(model.preprocessor)
    preprocess.size = size or preprocess.size
    preprocess.squash = True
    pixels = preprocess([image]).to(model.device)
    cells = encode_cells(model.image_tower, pixels)[0]  # (P, d)
    # Not cosines: the embedding of an empty background has a direction too, but little length.
    parts = model.encode_text([text]) @ cells.mT / cells.mean(dim=0).norm()  # (1, P)
    side = math.isqrt(len(cells))
    grid = parts.view(1, 1, side, side)
    return F.interpolate(grid, (image.height, image.width), mode="bilinear")[0, 0].cpu()


def draw(image: Image.Image, similarities: np.ndarray) -> Image.Image:
    """Draw similarities (H, W) over an image: in color above their median, strongest at their maximum."""
    lowest, highest = np.median(similarities), similarities.max()
    heat = np.clip((similarities - lowest) / max(highest - lowest, 1e-12), 0, 1)[..., None]
    pixels = np.asarray(image, dtype=np.float32)
    gray = pixels.mean(axis=-1, keepdims=True) * (1 - DIMMED) + 255 * DIMMED
    warm = (pixels + np.array(HEAT)) / 2
    mixed = (1 - heat) * gray + heat * warm
    return Image.fromarray(mixed.astype(np.uint8))


def main(weights: str, file: str, text: str, out: str, size: int | None = None) -> None:
    """Write the heat map of a text over an image file."""
    model = declip.load(weights)
    image = Image.open(file).convert("RGB")
    similarities = similarity_map(model, image, text, size)
    draw(image, similarities.numpy()).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:5])
