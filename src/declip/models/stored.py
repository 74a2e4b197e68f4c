"""Configurations that are stored with a model's weights, as bytes of JSON."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from declip.errors import UserError
from declip.models.hf_encoder import ENTRY, TextEncoder
from declip.models.siglip import MODEL_TYPE, WrappedSiglip
from declip.models.wrapped import WrappedModel, WrappedOpenClip


def encoder_kept_in(weights: Mapping[str, Tensor], path: Path) -> TextEncoder | WrappedModel:
    """Read the encoder, or the wrapped model, stored with a model's weights.

    `text.hf_model` is never read instead: the recipe may be a stranger's.
    """
    try:
        stored = weights[ENTRY]
        content = json.loads(stored.numpy().tobytes())
        if "image" not in content:
            return TextEncoder.from_tensor(stored)
        if content["config"].get("model_type") == MODEL_TYPE:
            return WrappedSiglip(**content)
        return WrappedOpenClip(**content)
    except Exception as error:  # JSON of any shape
        raise UserError(
            f"The text encoder's configuration in '{path}' is missing or damaged."
        ) from error
