"""Fingerprint of a model: which vectors belong to it."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from declip.models.dual_encoder import DualEncoder
from declip.models.encoder import Encoder, NoTexts

PROBE = "a photo of two red apples, and a dog"  # its token ids are part of the fingerprint


def fingerprint(model: Encoder, tensors: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256, in hexadecimal, of a model: class, tensors, settings of its towers, preprocessing and tokenizer.

    A model that was converted to another precision has the one of its float32 weights. `tensors` are those of the file,
    in its types, if the model was built in part.
    """
    digest = hashlib.sha256(model.class_name.encode())
    state: Mapping[str, Any] = model.state_dict() if tensors is None else tensors
    if isinstance(model, DualEncoder):
        if model.float32_fingerprint is not None:
            return model.float32_fingerprint
        # equal weights may be applied in several ways
        image = model.recipe.image
        text = model.recipe.text
        digest.update(
            repr(
                (image.model, image.model_kwargs, text.heads, text.activation, text.pooling)
            ).encode()
        )
        # The last digits of computed projections differ between machines: their files stand for them.
        if model.published is not None and _holds(state, model.published.projections):
            digest.update(model.published.files.encode())
            state = {}
    values = {name: value for name, value in sorted(state.items()) if isinstance(value, Tensor)}
    if tensors is not None:  # as models compute
        values = {name: in_float32(value) for name, value in values.items()}
    hash_tensors(digest, values)
    # Preprocessing and tokenizer
    noise = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    pixels = model.preprocess([Image.fromarray(noise)]).float()
    digest.update(str(tuple(pixels.shape)).encode())
    digest.update(pixels.cpu().numpy().tobytes())
    try:
        ids = model.tokenize([PROBE]).tolist()
        digest.update(repr(ids).encode())
    except NoTexts:
        digest.update(b"no text")
    return digest.hexdigest()


def _holds(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state has these tensors, bit for bit."""
    return all(torch.equal(state[name].cpu(), tensor) for name, tensor in tensors.items())


def in_float32(tensor: Tensor) -> Tensor:
    """Convert floating point to float32; integers stay."""
    if tensor.is_floating_point():
        return tensor.float()
    return tensor


def hash_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Update a digest with names, types, shapes and values of tensors."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().data)
