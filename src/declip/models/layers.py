"""How deep in its tower each parameter lies: what layer-wise rates and the freezing of blocks count by."""

import re
from collections.abc import Mapping
from typing import Any

from timm.models import group_parameters
from torch import nn

from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower

IMAGE, TEXT = "image_tower.", "text_tower."
"""What the names of a tower's parameters begin with in a `DualEncoder`."""

STEM = re.compile(r"^(token_embedding|positional_embedding|encoder\.embeddings)")
BLOCK = re.compile(r"\.(?:resblocks|layer)\.(\d+)\.")
"""In the names of text towers: CLIP's, and Hugging Face's encoders'."""


def depths(model: DualEncoder) -> dict[str, int]:
    """Depth of every parameter of both towers, by its name in the model.

    The stem (patch or word embedding, positions) has depth 0, block after block has 1, 2, …, and what comes after the
    blocks (last norm, projection) one more than the last. In networks with stages, blocks count through all of them.
    """
    image, text = _image(model.image_tower), _text(model.text_tower)
    return {IMAGE + name: depth for name, depth in image.items()} | {TEXT + n: depth for n, depth in text.items()}


def blocks(found: Mapping[str, int], tower: str) -> int:
    """How many blocks a tower has, by `depths`."""
    return max((depth for name, depth in found.items() if name.startswith(tower)), default=1) - 1


def _image(tower: ImageTower) -> dict[str, int]:
    trunk: Any = tower.trunk
    found: dict[str, int] = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
    inside = {name for name in found if not name.startswith("head.")}  # CLIP's attention pool comes after the blocks
    last = 1 + max(found[name] for name in inside)
    own = {f"trunk.{name}": found[name] if name in inside else last for name in found}
    return own | {name: last for name, _ in tower.named_parameters() if name not in own}


def _text(tower: nn.Module) -> dict[str, int]:
    names = [name for name, _ in tower.named_parameters()]
    numbers = {name: int(found[1]) for name in names if (found := BLOCK.search(name))}
    last = 2 + max(numbers.values(), default=-1)
    return {name: 0 if STEM.search(name) else numbers[name] + 1 if name in numbers else last for name in names}
