"""The interface of export formats: how they refuse a model, and what they read back."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.models.heads import MlpHead
from declip.models.no_text import has_text
from declip.models.text_tower import TextTower

TO_CLIP_VIT = "train with image.model=vit_base_patch32_clip_quickgelu_224"

ToFeatures = Callable[[Tensor], Tensor]


class Refusal(UserError):
    """A format cannot express a model; the message says why, and which training would be accepted."""


class Reread(NamedTuple):
    """A written model as the foreign library reads it.

    Attributes:
        by: The library and its version.
        image: (n, 3, S, S) normalized pixels → (n, d) features of any length.
        text: (n, L) our token ids → (n, d) features; None where the file has no text tower.
    """

    by: str
    image: ToFeatures
    text: ToFeatures | None


def refuse_mlp_heads(model: DualEncoder) -> None:
    """Refuse a model whose projections are more than linear maps."""
    if isinstance(model.image_tower.proj, MlpHead):
        raise Refusal("its projections are MLPs; train with finetune.head=linear, or export it as safetensors or onnx")


def clip_text_tower(model: DualEncoder) -> TextTower:
    """Give the text tower where it is CLIP's."""
    if not has_text(model):
        raise Refusal("it has no text tower; export a model with both towers")
    if not isinstance(model.text_tower, TextTower):
        kind = type(model.text_tower).__name__
        raise Refusal(f"its text tower is a {kind}, not CLIP's; train without text.hf_model")
    return model.text_tower
