"""The model of an index: how an index knows it again, and the vectors that it makes."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.data.pair import LazyImage, SkipCounter
from declip.data.sources.open import ImageSource
from declip.data.sources.shard_files import stored_path
from declip.errors import UserError
from declip.evaluation.encode import BatchReader, Encoder, eval_mode, read_batches
from declip.models.inference import fingerprint, image_encoder, normalized
from declip.search.info import ModelInfo

SHORTEST = 1e-6  # length of a weighted sum of two unit vectors below which they cancel


def describe_model(model: Encoder, path: object, index: Path) -> ModelInfo:
    """Describe a model that was loaded from `path`, or is a Python object, for the index in a folder."""
    stored = stored_path(path, index)
    recipe = getattr(model, "recipe", None)
    name = str(path) if stored else f"{type(model).__name__} {getattr(recipe, 'name', '')}".strip()
    return ModelInfo(path=stored, name=name, fingerprint=fingerprint(model))


def encode_images(
    model: Encoder,
    source: ImageSource,
    read: Callable[[ImageSource, int], tuple[LazyImage, Any]],
    batches: Sequence[Sequence[int]],
    workers: int | None,
    progress: bool,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, list[Any], SkipCounter]]:
    """Read and encode images of a source: by batch, unit vectors (n, d), what `read` returned, and those left out."""
    pinned = next(model.parameters()).device.type == "cuda" if hasattr(model, "parameters") else False
    title = f"Images of {source.name}" if progress else ""
    stream = read_batches(BatchReader(model, partial(read, source)), batches, workers, title, pinned)
    whole = image_encoder(model) if encode is None else lambda pixels: encode(normalized(model, pixels))
    for pixels, rows, broken in stream:
        yield (torch.empty(0, 0) if pixels is None else image_vectors(model, pixels, whole)), rows, broken


def image_vectors(model: Encoder, pixels: Tensor, encode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Encode (n, 3, S, S) normalized pixels to (n, d) float32 on the CPU, of length 1; `encode` is for many images."""
    with eval_mode(model) as device:
        vectors = normalize((encode or model.encode_image)(pixels.to(device, non_blocking=True)).float(), dim=-1).cpu()
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
