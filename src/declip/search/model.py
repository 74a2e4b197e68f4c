"""The model of an index: how an index knows it again, and the vectors that it makes."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from declip.data.pair import SkipCounter
from declip.data.sources.image_source import ImageSource
from declip.data.sources.stored_paths import stored_path
from declip.errors import UserError
from declip.evaluation.encode import Batches, Encoder, eval_mode
from declip.io.pool import in_order, naming_lost_workers, pairs_bar
from declip.models.inference import image_encoder
from declip.search.info import ModelInfo

PROBE = "a photo of two red apples, and a dog"  # its token ids are part of the fingerprint
SHORTEST = 1e-6  # length of a weighted sum of two unit vectors below which they cancel


def describe_model(model: Encoder, path: object, index: Path) -> ModelInfo:
    """Describe a model that was loaded from `path`, or is a Python object, for the index in a folder."""
    stored = stored_path(path, index)
    recipe = getattr(model, "recipe", None)
    name = str(path) if stored else f"{type(model).__name__} {getattr(recipe, 'name', '')}".strip()
    return ModelInfo(path=stored, name=name, fingerprint=fingerprint(model))


def fingerprint(model: Encoder, tensors: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256, in hexadecimal, of a model: class, tensors, settings of its towers, preprocessing and tokenizer.

    Args:
        tensors: Tensors of the model in the types of the file, if it was built in part.
    """
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
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor):
            value = value.float() if value.is_floating_point() and tensors is not None else value  # as models compute
            _update(digest, f"{name} {value.dtype} ", value)
    noise = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    _update(digest, "", model.preprocess([Image.fromarray(noise)]).float())
    try:
        digest.update(repr(model.tokenize([PROBE]).tolist()).encode())
    except UserError:  # a model without a text tower
        digest.update(b"no text")
    return digest.hexdigest()


def _update(digest: Any, head: str, tensor: Tensor) -> None:
    digest.update(f"{head}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def encode_images(
    model: Encoder,
    source: ImageSource,
    read: Callable[[ImageSource, int], tuple[Image.Image, Any]],
    batches: Sequence[Sequence[int]],
    workers: int,
    progress: bool,
) -> Iterator[tuple[Tensor, list[Any], SkipCounter]]:
    """Read and encode the images at some places of a source.

    Yields, for each batch: vectors (n, d) float32, of length 1; what `read` returned with the n images; those left out.
    """
    # The workers start before the thread of the bar does: a fork copies no thread.
    stream = in_order(Batches(model, batches, partial(read, source)), len(batches), workers)
    encode = image_encoder(model)
    with naming_lost_workers(), pairs_bar(progress) as bar:
        task = bar.add_task(f"Images of {source.name}", total=sum(map(len, batches)))
        for pixels, rows, broken in stream:
            yield (torch.empty(0, 0) if pixels is None else image_vectors(model, pixels, encode)), rows, broken
            bar.advance(task, len(rows) + broken.total)


def image_vectors(model: Encoder, pixels: Tensor, encode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Encode (n, 3, S, S) normalized pixels to (n, d) float32 on the CPU, of length 1; `encode` is for many images."""
    with eval_mode(model) as device:
        vectors = normalize((encode or model.encode_image)(pixels.to(device)).float(), dim=-1).cpu()
    if not vectors.isfinite().all():
        raise UserError("The model's image features are not finite: its weights are damaged. Try another checkpoint.")
    return vectors


def mix(text: Tensor, image: Tensor, weights: tuple[float, float]) -> Tensor:
    """Normalized weighted sum of two unit vectors (d,); raises `UserError` if they cancel."""
    if len(weights) != 2 or not all(map(math.isfinite, weights)):
        raise UserError(f"weights is {weights}; give two numbers, of text and image, such as 0.7,0.3.")
    both = weights[0] * text + weights[1] * image
    if both.norm() < SHORTEST:
        raise UserError(f"With weights {weights[0]:g} and {weights[1]:g} nothing is left of the query. Give others.")
    return normalize(both, dim=-1)
