"""The interface of export formats: what each reads back, and how it refuses a model."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.models.no_text import has_text
from declip.models.text_tower import TextTower

CLIP_TEXT = "train with CLIP's text tower: leave text.hf_model out"
CLIP_VIT = "train with CLIP's vision transformer: image.model=vit_base_patch32_clip_quickgelu_224"
NO_BIAS = "train with text.projection_bias=false"
"""Requests to a new training, for refusals of several formats."""


class Refusal(UserError):
    """A format cannot express a model.

    Attributes:
        reason: Why, as the end of a sentence about the model.
        way_out: What would make the format accept a model, as a request.
    """

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(f"{reason}. Way out: {way_out}.")
        self.reason, self.way_out = reason, way_out


@dataclass(frozen=True)
class Reread:
    """A written model as the foreign library reads it.

    Attributes:
        by: The library and its version.
        image: (n, 3, S, S) normalized pixels → (n, d) features of any length.
        text: (n, L) our token ids → (n, d) features; None where the file has no text tower.
    """

    by: str
    image: Callable[[Tensor], Tensor]
    text: Callable[[Tensor], Tensor] | None


def clip_text_tower(model: DualEncoder) -> TextTower:
    """Give the text tower where it is CLIP's."""
    if not has_text(model):
        raise Refusal("it has no text tower", "export a model with both towers")
    if not isinstance(model.text_tower, TextTower):
        raise Refusal(f"its text tower is a {type(model.text_tower).__name__}, not CLIP's", CLIP_TEXT)
    return model.text_tower
