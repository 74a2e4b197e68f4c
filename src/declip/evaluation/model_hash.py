"""What tells a model from every other one: its weights, and what its preprocessing makes of a picture."""

import hashlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from declip.evaluation.encode import Encoder


def model_hash(model: Encoder) -> bytes:
    """SHA-256 of every tensor of a model's `state_dict` (name, dtype, shape, bytes), the name of its class, and what
    its preprocessing makes of one fixed picture of noise, which changes with size, crop, filter and norm.

    Args:
        model: With a `state_dict`.
    """
    found = hashlib.sha256(type(model).__qualname__.encode())
    for name, value in sorted(model.state_dict().items()):  # type: ignore[attr-defined]  # the caller looked
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(tensor_bytes(value))
    noise = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    pixels = model.preprocess([Image.fromarray(noise)])
    found.update(f"{tuple(pixels.shape)}".encode())
    found.update(tensor_bytes(pixels.float()))
    return found.digest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory; nothing is copied where it lies on the host in one piece."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
