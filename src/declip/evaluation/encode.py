"""Image and text features of a source for evaluation, without gradients."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from declip.data.images.preprocess import Preprocess
from declip.data.pair import BrokenPair, LazyImage, PairSource, SkipCounter
from declip.errors import UserError, check_range
from declip.io.pool import pairs_bar, parallel_map
from declip.models.encoder import Encoder
from declip.models.inference import image_encoder

T = TypeVar("T")


class Share:
    """The part of the batches that this process encodes: all of them, where it is alone."""

    def own(self, batches: Sequence[T]) -> Sequence[T]:
        """This process's batches, consecutive ones, so that every batch is the same as in one process."""
        return batches

    def gather_parts(self, work: Callable[[], T]) -> list[T]:
        """Do this process's part; return the parts of all processes in order, or raise the error of any of them."""
        return [work()]


ALONE = Share()


@dataclass(frozen=True)
class Batching:
    """How images and texts are read and encoded."""

    batch_size: int = 256  # images and texts per forward pass
    # Processes that read images; 0: this one; None: one per core, at most 8
    workers: int | None = 0
    progress: bool = False
    share: Share = ALONE  # what this process encodes; every process gets all features

    def __post_init__(self) -> None:
        check_range("batch_size", self.batch_size, 1)


USUAL = Batching()
READ_AT_ONCE = 32  # images
Given = Image.Image | LazyImage | Tensor  # an image, or its pixels (3, S, S) uint8


@dataclass(frozen=True)
class SourceFeatures:
    """Features of a source on the CPU; pairs that cannot be read are skipped and counted."""

    name: str
    indices: np.ndarray  # (n,) int64, index of each row in the source
    images: Tensor  # (n, d) float32
    captions: tuple[tuple[str, ...], ...]
    texts: Tensor | None  # (m, d) float32, captions of all rows in order; None if not encoded
    skipped: SkipCounter
    truncated: int = 0  # encoded captions longer than the model's context

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def flat_captions(self) -> list[str]:
        """All m captions in the order of `texts`."""
        return [caption for captions in self.captions for caption in captions]

    @cached_property
    def image_rows(self) -> np.ndarray:
        """(m,) int64, the row of `images` that each caption belongs to."""
        counts = [len(captions) for captions in self.captions]
        return np.repeat(np.arange(len(counts)), counts)


@contextmanager
def eval_mode(model: Encoder) -> Iterator[torch.device]:
    """Evaluation mode without gradients; yields the device of the weights. Restores the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        # Not model.eval(): it calls the overridden `train` of frozen modules, and cannot be undone per module.
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield model.device
    finally:
        for module, mode in modes:
            module.training = mode


def text_features(
    model: Encoder,
    texts: Sequence[str],
    how: Batching = USUAL,
    *,
    encode: Any = None,
) -> Tensor:
    """Encode m texts: (m, d) float32 on the CPU, L2-normalized; features of equal texts are bit-exact copies.

    Features by `encode`, a function of token ids (n, L) on the model's device, are not normalized.
    """
    distinct = sorted(dict.fromkeys(texts), key=len)  # by length: little padding
    row_of = {text: row for row, text in enumerate(distinct)}
    starts = range(0, len(distinct), how.batch_size)
    batches = [distinct[start : start + how.batch_size] for start in starts]

    def encode_own() -> list[Tensor]:
        parts = []
        with eval_mode(model) as device, pairs_bar(how.progress) as bar:
            for batch in bar.track(how.share.own(batches), description="Texts"):
                tokens = model.tokenize(batch).to(device)
                if encode is None:
                    features = normalize(model.encode_text(tokens).float(), dim=-1)
                else:
                    features = encode(tokens).float()
                parts.append(_finite(features.cpu(), "text"))
        return parts

    parts = list(chain(*how.share.gather_parts(encode_own)))
    rows = torch.tensor([row_of[text] for text in texts], dtype=torch.int64)
    return torch.cat(parts)[rows]


def encode_source(
    model: Encoder,
    source: PairSource,
    how: Batching = USUAL,
    indices: Sequence[int] | np.ndarray | None = None,
) -> SourceFeatures:
    """Encode the images and the captions of a source, or those at `indices`, in this order."""
    images = encode_images(model, source, how, indices=indices)
    captions = images.flat_captions
    texts = text_features(model, captions, how)
    return replace(images, texts=texts, truncated=_count_truncated(model, captions))


def encode_images(
    model: Encoder,
    source: PairSource,
    how: Batching = USUAL,
    *,
    encode: Callable[[Tensor], Tensor] | None = None,
    exact: bool = True,
    indices: Sequence[int] | np.ndarray | None = None,
) -> SourceFeatures:
    """Encode the images of a source in one pass over its files; captions are read, and not encoded.

    Args:
        encode: (n, 3, S, S) pixels on the model's device → (n, d); by default L2-normalized embeddings.
        exact: False: images are decoded and resized as for a search; `encode` gets their pixels as uint8.
        indices: Indices of the source to encode, in this order; None: all.
    """
    # --- images of a model with frozen towers, which reads them once
    if encode is None and indices is None and model.source_features is not None:
        encoded: SourceFeatures = model.source_features(source, how)
        return encoded
    # --- images of others, in batches whose pixels may come from worker processes
    if indices is None:
        indices = range(len(source))
    chosen = np.asarray(indices, dtype=np.int64)
    batches = np.split(chosen, range(how.batch_size, len(chosen), how.batch_size))
    read_row = partial(_read_row, exact)

    def encode_own() -> list[tuple[Tensor, list[Any], SkipCounter]]:
        own = how.share.own(batches)
        return list(encode_batches(model, source, read_row, own, how.workers, how.progress, encode))

    rows = list[Any]()
    parts = list[Tensor]()
    skipped = SkipCounter()
    for features, read, broken in chain(*how.share.gather_parts(encode_own)):
        skipped.merge(broken)
        if read:
            parts.append(features)
            rows += read
    if not rows:
        raise UserError(
            f"Cannot evaluate on '{source.name}': none of its {len(source)} pairs could be read. "
            f"{skipped.explanation()} Check the paths and captions."
        )
    read_indices = np.array([index for index, _ in rows])
    captions = tuple(captions for _, captions in rows)
    return SourceFeatures(source.name, read_indices, torch.cat(parts), captions, None, skipped)


def _read_row(
    exact: bool, source: PairSource, index: int
) -> tuple[Given, tuple[int, tuple[str, ...]]]:
    pair = source[index]
    captions = pair.captions()
    image = pair.open()
    return image.decoded() if exact else image, (index, captions)


def _count_truncated(model: Encoder, texts: Sequence[str]) -> int:
    """Count the texts longer than the model's context; 0 for tokenizers of other libraries."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return 0
    longer = copy(tokenizer)
    longer.context += 1
    return sum(len(longer.encode(text)) > tokenizer.context for text in texts)


def encode_batches(
    model: Encoder,
    source: Any,
    read: Callable[[Any, int], tuple[Given, Any]],
    batches: Sequence[Any],
    workers: int | None,
    progress: bool,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, list[Any], SkipCounter]]:
    """Read and encode images of a source: by batch, features (n, d), what `read` returned, and the broken pairs.

    `encode` gets pixels as `read_images` makes them; without it features are embeddings of length 1. Worker processes
    read a part of a batch at a time, so that all of them read the first one.
    """
    pinned = model.device.type == "cuda"
    size = READ_AT_ONCE
    if pinned:  # joining would copy to other memory
        size = max(map(len, batches), default=1)
    parts = []
    for batch in batches:
        for start in range(0, len(batch), size):
            parts.append(batch[start : start + size])
    title = ""
    if progress:
        title = f"Images of {source.name}"
    read_part = partial(read_images, model.preprocessor, partial(read, source))
    stream = parallel_map(read_part, parts, workers, title, pinned)
    encode_all = encode or image_encoder(model)
    for batch in batches:
        pixels = list[Tensor]()
        rows = list[Any]()
        skipped = SkipCounter()
        for part, own, broken in islice(stream, math.ceil(len(batch) / size)):
            if part is not None:
                pixels.append(part)
            rows += own
            skipped.merge(broken)
        features = torch.empty(0)
        if rows:
            whole = pixels[0]
            if len(pixels) > 1:
                whole = torch.cat(pixels)
            features = image_features(model, whole, encode_all, unit=encode is None)
        yield features, rows, skipped


def image_features(
    model: Encoder, pixels: Tensor, encode: Callable[[Tensor], Tensor], unit: bool = True
) -> Tensor:
    """Encode (n, 3, S, S) pixels to (n, d) float32 on the CPU, in evaluation mode; `unit` makes the length 1."""
    with eval_mode(model) as device:
        features = encode(pixels.to(device, non_blocking=True))
        features = _finite(features.float().cpu(), "image")
    if unit:
        features = normalize(features, dim=-1)
    return features


def check_widths(queries: Tensor, candidates: Tensor) -> None:
    """Raise a `UserError` unless embeddings (…, d) of images and texts are as wide, so that they can be compared."""
    one = queries.shape[-1]
    other = candidates.shape[-1]
    if one != other:
        raise UserError(
            f"Embeddings of {one} and {other} numbers cannot be compared: a model needs equal widths for images and "
            "texts. `declip finetune` with frozen towers and `declip.fit` map both into one space."
        )


def _finite(features: Tensor, what: str) -> Tensor:
    if not features.isfinite().all():
        raise UserError(
            f"The model's {what} features are not finite: the weights diverged or are corrupted. Use an earlier "
            "checkpoint, or train with a lower train.lr."
        )
    return features


def read_images(
    preprocess: Any, read: Callable[[int], tuple[Given, Any]], batch: Iterable[int]
) -> tuple[Tensor | None, list[Any], SkipCounter]:
    """Read a batch of images: pixels (n, 3, S, S), what `read` returns with each image, and the broken pairs.

    The pixels are normalized; those of a `LazyImage` and a model of declip are uint8, as `Preprocess.fast` makes them,
    and so are those that `read` returns.
    """
    images = list[Any]()
    rows = list[Any]()
    skipped = SkipCounter()
    for index in batch:
        try:
            image, row = read(int(index))
            if isinstance(image, LazyImage):
                if isinstance(preprocess, Preprocess):
                    image = preprocess.fast(image)
                else:
                    image = Image.fromarray(image.pixels())
            images.append(image)
            rows.append(row)
        except BrokenPair as broken:
            skipped.add(broken)
    if images and isinstance(images[0], Tensor):
        pixels = torch.stack(images).contiguous(memory_format=torch.channels_last)
        return pixels, rows, skipped
    return preprocess(images) if images else None, rows, skipped
