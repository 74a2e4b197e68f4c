"""Layer index of every parameter, for layer-wise learning-rate decay and freezing."""

import re
from collections.abc import Mapping
from typing import Any

from timm.models import group_parameters
from torch import nn

from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower

IMAGE, TEXT = "image_tower.", "text_tower."
"""Prefixes of the towers' parameter names in a `DualEncoder`."""

STEM = re.compile(r"^(token_embedding|positional_embedding|encoder\.embeddings)")
BLOCK = re.compile(r"\.(?:resblocks|layer)\.(\d+)\.")
"""Numbers of the blocks in the names of CLIP's text tower and of Hugging Face's encoders."""


def depths(model: DualEncoder) -> dict[str, int]:
    """Layer index of every parameter of both towers, by its name in the model.

    The stem (patch or word embedding, positions) has index 0, block after block has 1, 2, …, and the last norm and
    projection one more than the last block. In networks with stages, blocks count through all of them.
    """
    image, text = _image(model.image_tower), _text(model.text_tower)
    return {IMAGE + n: depth for n, depth in image.items()} | {TEXT + n: depth for n, depth in text.items()}


def blocks(depth_of: Mapping[str, int], tower: str) -> int:
    """Number of blocks of a tower, `IMAGE` or `TEXT`, from `depths`."""
    return max((depth for name, depth in depth_of.items() if name.startswith(tower)), default=1) - 1


def _image(tower: ImageTower) -> dict[str, int]:
    trunk: Any = tower.trunk
    groups: dict[str, int] = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
    inside = {name for name in groups if not name.startswith("head.")}  # CLIP's attention pool comes after the blocks
    last = 1 + max(groups[name] for name in inside)
    depth_of = {f"trunk.{name}": groups[name] if name in inside else last for name in groups}
    return depth_of | {name: last for name, _ in tower.named_parameters() if name not in depth_of}


def _text(tower: nn.Module) -> dict[str, int]:
    names = [name for name, _ in tower.named_parameters()]
    numbers = {name: int(match[1]) for name in names if (match := BLOCK.search(name))}
    last = 2 + max(numbers.values(), default=-1)
    return {name: 0 if STEM.search(name) else numbers[name] + 1 if name in numbers else last for name in names}
