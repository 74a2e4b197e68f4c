"""Features for evaluation: every image and caption of a source through the towers, once, without gradient."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from declip.data.pair import BrokenPair, Pair, PairSource, SkipCounter, printable
from declip.data.text.caption_tokenizer import CaptionTokenizer
from declip.errors import UserError
from declip.io.pool import naming_lost_workers
from declip.io.progress import on_terminal, progress_bar

log = logging.getLogger("declip")

T = TypeVar("T")

LONG = 20
"""Number of batches; fewer are done before a progress bar could be read."""


class Encoder(Protocol):
    """The part of a model that an evaluation uses: two towers, with preprocessing and tokenizer."""

    def encode_image(self, images: Tensor, /) -> Tensor:
        """(n, 3, S, S) normalized pixels → (n, d) features."""

    def encode_text(self, tokens: Tensor, /) -> Tensor:
        """(n, L) token ids → (n, d) features."""

    def preprocess(self, images: list[Image.Image], /) -> Tensor:
        """Images → (n, 3, S, S) normalized pixels."""

    def tokenize(self, texts: list[str], /) -> Tensor:
        """Texts → (n, L) token ids."""

    def modules(self) -> Iterator[nn.Module]:
        """As `torch.nn.Module.modules`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As `torch.nn.Module.parameters`."""


@dataclass(frozen=True)
class SourceFeatures:
    """Features of a source; pairs that could not be read are left out and counted.

    Attributes:
        name: Name of the source.
        indices: (n,) int64, index of each row in the source.
        images: (n, d) float32 on the CPU.
        captions: The captions of each row.
        texts: (m, d) float32, features of all captions, row after row; None where they are not encoded.
        owners: (m,) int64, the row of `images` that each caption belongs to.
        skipped: The pairs left out, by reason.
        truncated: Number of encoded captions longer than the model's context.
    """

    name: str
    indices: np.ndarray
    images: Tensor
    captions: tuple[tuple[str, ...], ...]
    texts: Tensor | None
    owners: np.ndarray
    skipped: SkipCounter
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def words(self) -> list[str]:
        """The m captions in the order of `texts`."""
        return [caption for captions in self.captions for caption in captions]


@contextmanager
def measuring(model: Encoder) -> Iterator[torch.device]:
    """Evaluation mode without gradient; afterwards every module gets its own mode back.

    Yields:
        The device of the model's weights.
    """
    modes = [(module, module.training) for module in model.modules()]
    weight = next(iter(model.parameters()), None)
    try:
        # Not model.eval(), which calls the `train` of frozen modules and cannot be undone module by module.
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield torch.device("cpu") if weight is None else weight.device
    finally:
        for module, mode in modes:
            module.training = mode


def text_features(model: Encoder, texts: Sequence[str], *, batch_size: int = 256, progress: bool = False) -> Tensor:
    """Encode texts; equal strings are encoded once, so that their features are bit-exact copies.

    Returns:
        (m, d) float32 on the CPU, L2-normalized.
    """
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    distinct = list(row_of)
    batches = [distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size)]
    parts = []
    with measuring(model) as device:
        for batch in _watched(batches, len(batches), "Texts", progress):
            features = normalize(model.encode_text(model.tokenize(batch).to(device)).float(), dim=-1).cpu()
            _require_finite(features, "text", batch)
            parts.append(features)
    return torch.cat(parts)[torch.tensor([row_of[text] for text in texts], dtype=torch.int64)]


def encode_source(
    model: Encoder,
    source: PairSource,
    *,
    texts: bool = True,
    batch_size: int = 256,
    progress: bool = False,
    **reading: Any,
) -> SourceFeatures:
    """Encode the images of a source, L2-normalized, and its captions if `texts`.

    Captions longer than the model's context are counted, with a warning once per dataset.

    Args:
        reading: `indices` and `workers` of `encode_images`.
    """

    def encode(pixels: Tensor) -> Tensor:
        return normalize(model.encode_image(pixels).float(), dim=-1)

    features = encode_images(model, source, encode, batch_size=batch_size, progress=progress, **reading)
    if not texts:
        return features
    words = features.words
    truncated = count_truncated(model, words)
    if truncated:
        _say_truncated(source.name, truncated, len(words))
    encoded = text_features(model, words, batch_size=batch_size, progress=progress)
    return replace(features, texts=encoded, truncated=truncated)


def encode_images(
    model: Encoder,
    source: PairSource,
    encode: Callable[[Tensor], Tensor],
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> SourceFeatures:
    """Encode the images of a source in one pass over the files.

    Args:
        encode: (n, 3, S, S) normalized pixels on the model's device → (n, d).
        indices: Indices of the source to encode, in this order; None takes all.
        workers: Processes that read and resize; 0 reads in this one.

    Raises:
        UserError: not one pair of the source can be read, or features of an image are not finite.
    """
    wanted = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    reader = DataLoader(
        _Pairs(source, wanted),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_Collate(model),
        generator=torch.Generator(),  # else it draws from torch's own, which a training run's dropout draws from
    )
    kept: list[int] = []
    captions: list[tuple[str, ...]] = []
    parts: list[Tensor] = []
    skipped = SkipCounter()
    with naming_lost_workers(), measuring(model) as device:
        for pixels, rows, broken in _watched(reader, len(reader), f"Images of {source.name}", progress):
            for each in broken:
                skipped.add(each)
            if pixels is not None:
                features = encode(pixels.to(device)).float().cpu()
                _require_finite(features, "image", [key for _, key, _ in rows])
                parts.append(features)
                kept += [index for index, _, _ in rows]
                captions += [texts for _, _, texts in rows]
    if not kept:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in skipped.counts.items())
        raise UserError(
            f"Nothing to measure on '{source.name}': of its {len(source)} pairs none could be read"
            f"{f' ({reasons})' if reasons else ''}. Check that the paths lead to images and that none lacks a caption."
        )
    owners = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
    rows_of_source = np.asarray(kept, dtype=np.int64)
    return SourceFeatures(source.name, rows_of_source, torch.cat(parts), tuple(captions), None, owners, skipped)


def count_truncated(model: Encoder, texts: Iterable[str]) -> int:
    """Count the texts longer than the model's context; 0 for tokenizers of other libraries."""
    tokenizer = getattr(model, "tokenizer", None)
    if not isinstance(tokenizer, CaptionTokenizer):
        return 0
    longer = copy(tokenizer)
    longer.context += 1
    return sum(len(longer.encode(text)) > tokenizer.context for text in texts)


@cache  # a run evaluates the same dataset many times
def _say_truncated(name: str, truncated: int, total: int) -> None:
    log.warning(
        "%s of the %s captions of %s are longer than the model's context: their ends are not read.",
        f"{truncated:,}", f"{total:,}", name,
    )  # fmt: skip


_Read = tuple[int, Pair | BrokenPair]
_Row = tuple[int, str, tuple[str, ...]]


class _Pairs(Dataset[_Read]):
    """The wanted pairs of a source; a broken one is returned, not raised."""

    def __init__(self, source: PairSource, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> _Read:
        index = int(self.indices[row])
        try:
            return index, self.source[index]
        except BrokenPair as broken:
            return index, broken


class _Collate:
    """Turns pairs into pixels inside the worker, with index, key and captions of each, and the broken pairs."""

    def __init__(self, model: Encoder) -> None:
        # `DualEncoder.preprocessor` stays on the host, where a worker may use it; `preprocess` moves to the device.
        self.preprocess = getattr(model, "preprocessor", model.preprocess)

    def __call__(self, pairs: list[_Read]) -> tuple[Tensor | None, list[_Row], list[BrokenPair]]:
        good = [(index, pair) for index, pair in pairs if isinstance(pair, Pair)]
        pixels = self.preprocess([pair.image for _, pair in good]) if good else None
        rows = [(index, pair.key, pair.captions) for index, pair in good]
        return pixels, rows, [pair for _, pair in pairs if isinstance(pair, BrokenPair)]


def _watched(items: Iterable[T], total: int, label: str, progress: bool) -> Iterable[T]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), "batches", TimeRemainingColumn())
    shown = progress and (total >= LONG or not on_terminal())  # plain lines come only when it takes long
    with progress_bar(*columns, shown=shown, transient=True) as bar:
        yield from bar.track(items, total, description=label)


def _require_finite(features: Tensor, what: str, names: Sequence[str]) -> None:
    """Raise a `UserError` that names the first row of features (n, d) with a NaN or an infinity."""
    # One sum tells for all rows, so that a batch costs a single pass over its features.
    if features.sum().isfinite() or bool((finite := features.isfinite().all(1)).all()):
        return
    first = names[int((~finite).nonzero()[0])]
    raise UserError(
        f"The model's features of the {what} '{printable(first)}' are not finite ({int((~finite).sum())} of "
        f"{len(features)} in its batch), so nothing can be measured with it. Its weights have diverged or are damaged: "
        "take an earlier checkpoint, or train with a lower train.lr."
    )
