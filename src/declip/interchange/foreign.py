"""What every foreign format shares: what it is given, how it reads a model back, and how it refuses one."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.models.no_text import has_text
from declip.models.text_tower import TextTower


@dataclass(frozen=True)
class Reread:
    """A model as the foreign library reads it.

    Attributes:
        by: The library and its version.
        image: (n, 3, S, S) normalized pixels → (n, d) features; of any length.
        text: (n, L) our token ids → (n, d) features; None where the file has no text tower.
    """

    by: str
    image: Callable[[Tensor], Tensor]
    text: Callable[[Tensor], Tensor] | None


def clip_text_tower(model: DualEncoder, form: str) -> TextTower:
    """Give the text tower where it is CLIP's.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    if not has_text(model):
        raise refusal(form, "it has no text tower", "onnx, safetensors")
    if not isinstance(model.text_tower, TextTower):
        raise refusal(form, f"its text tower is a {type(model.text_tower).__name__}, not CLIP's", "onnx, safetensors")
    return model.text_tower


def refusal(form: str, reason: str, instead: str) -> UserError:
    """Build the error for a model that a format cannot express.

    Args:
        form: The format.
        reason: Why, as the end of a sentence about the model.
        instead: The formats that can.
    """
    return UserError(f"This model cannot be exported as {form}: {reason}. Formats that can: {instead}.")
