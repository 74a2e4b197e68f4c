"""Fingerprint of a model: which vectors belong to it."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from declip.errors import UserError

PROBE = "a photo of two red apples, and a dog"  # its token ids are part of the fingerprint


def fingerprint(model: Any, tensors: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256, in hexadecimal, of a model: class, tensors, settings of its towers, preprocessing and tokenizer.

    A model that was converted to another precision has the one of its float32 weights. `tensors` are those of the file,
    in its types, if the model was built in part.
    """
    if converted := getattr(model, "fingerprint", ""):
        return str(converted)
    if not hasattr(model, "state_dict"):
        raise UserError(f"{type(model).__name__} has no `state_dict`, so it cannot be distinguished from other models.")
    digest = hashlib.sha256(type(model).__qualname__.encode())
    if (recipe := getattr(model, "recipe", None)) is not None:  # equal weights may be applied in several ways
        image, text = recipe.image, recipe.text
        digest.update(repr((image.model, image.model_kwargs, text.heads, text.activation, text.pooling)).encode())
    state = model.state_dict() if tensors is None else tensors
    # The last digits of computed projections differ between machines, so what they are computed from stands for them.
    published, projections = getattr(model, "computed", ("", {}))
    if published and all(torch.equal(state[name].cpu(), tensor) for name, tensor in projections.items()):
        digest.update(published.encode())
        state = {}
    floats = tensors is not None  # as models compute
    values = {name: value for name, value in sorted(state.items()) if isinstance(value, Tensor)}
    hash_tensors(digest, {n: v.float() if floats and v.is_floating_point() else v for n, v in values.items()})
    noise = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    pixels = model.preprocess([Image.fromarray(noise)]).float()
    digest.update(str(tuple(pixels.shape)).encode() + pixels.cpu().numpy().tobytes())
    try:
        digest.update(repr(model.tokenize([PROBE]).tolist()).encode())
    except UserError:  # a model without a text tower
        digest.update(b"no text")
    return digest.hexdigest()


def hash_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Update a digest with names, types, shapes and values of tensors."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
