"""The interface of export formats: how they refuse a model, and what they read back."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder, has_text
from declip.models.text_tower import TextTower

TO_CLIP_VIT = "train with image.model=vit_base_patch32_clip_quickgelu_224"


class Refusal(UserError):
    """A format cannot express a model; the message says why, and which training would be accepted."""


class Reread(NamedTuple):
    """A written model as the foreign library reads it."""

    by: str  # the library and its version
    image: Callable[[Tensor], Tensor]  # (n, 3, S, S) normalized pixels → (n, d) features of any length
    text: Callable[[Tensor], Tensor] | None  # (n, L) our token ids → (n, d) features


def clip_text_tower(model: DualEncoder) -> TextTower:
    """Give the text tower where it is CLIP's."""
    if not has_text(model):
        raise Refusal("it has no text tower; export a model with both towers")
    if not isinstance(model.text_tower, TextTower):
        raise Refusal(f"its text tower is a {type(model.text_tower).__name__}; train without text.hf_model")
    return model.text_tower
