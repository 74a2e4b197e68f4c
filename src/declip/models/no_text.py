"""Models whose file holds an image tower alone."""

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor, nn

from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder


def refuse_text(texts: str | Sequence[str] | Tensor = ()) -> NoReturn:
    """Stand in for a missing tokenizer or text tower: raise a `UserError`."""
    raise UserError(
        "This model has an image tower alone: its file holds no text tower, so captions and class names cannot be "
        "encoded. Use its image features (--task linear, knn or few-shot), or give a file with both towers."
    )


class NoTextTower(nn.Module):
    """Placeholder for a missing text tower."""

    forward = staticmethod(refuse_text)


def drop_text(model: DualEncoder) -> DualEncoder:
    """Take the text tower and the tokenizer out of a model, in place; using them raises a `UserError` then."""
    model.text_tower = NoTextTower()  # type: ignore[assignment]
    model.tokenizer = refuse_text  # type: ignore[assignment]
    return model


def has_text(model: DualEncoder) -> bool:
    """Whether the model can encode captions."""
    return not isinstance(model.text_tower, NoTextTower)
