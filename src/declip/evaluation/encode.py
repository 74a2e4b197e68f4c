"""Features for measuring: every image and caption of a source through the towers, once, without gradient."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from declip.data.pair import BrokenPair, Pair, PairSource, SkipCounter, printable
from declip.errors import UserError
from declip.io.pool import naming_lost_workers
from declip.io.progress import on_terminal, progress_bar

T = TypeVar("T")

LONG = 20  # batches; fewer are over before a progress bar could be read


class Encoder(Protocol):
    """What an evaluation needs of a model: two towers, and the way from files and words to tensors."""

    def encode_image(self, images: Tensor, /) -> Tensor:
        """(n, 3, S, S) normalized pixels to (n, d) features."""
        ...

    def encode_text(self, tokens: Tensor, /) -> Tensor:
        """(n, L) token ids to (n, d) features."""
        ...

    def preprocess(self, images: list[Image.Image], /) -> Tensor:
        """Images to (n, 3, S, S) normalized pixels."""
        ...

    def tokenize(self, texts: list[str], /) -> Tensor:
        """Texts to (n, L) token ids."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """All parts, as `torch.nn.Module.modules`."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights, as `torch.nn.Module.parameters`."""
        ...


@dataclass(frozen=True)
class SourceFeatures:
    """A source as a model sees it; rows that could not be read are left out and counted.

    Attributes:
        name: The source's name.
        indices: (n,) int64, the place of each row in the source.
        images: (n, d) float32 on the CPU, L2-normalized.
        captions: Of each row, its captions.
        texts: (m, d) float32, the features of all captions, row after row; None when they were not asked for.
        owners: (m,) int64, the row of `images` that each caption belongs to.
        skipped: The pairs left out, by reason.
    """

    name: str
    indices: np.ndarray
    images: Tensor
    captions: tuple[tuple[str, ...], ...]
    texts: Tensor | None
    owners: np.ndarray
    skipped: SkipCounter

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def words(self) -> list[str]:
        """The m captions in the order of `texts`."""
        return [caption for captions in self.captions for caption in captions]


@contextmanager
def measuring(model: Encoder) -> Iterator[torch.device]:
    """Put the model into evaluation mode without gradient, and every part back into its own mode afterwards.

    Yields:
        The device that the model's weights are on.
    """
    modes = [(module, module.training) for module in model.modules()]
    first = next(iter(model.parameters()), None)
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield torch.device("cpu") if first is None else first.device
    finally:
        for module, mode in modes:
            module.training = mode


def text_features(model: Encoder, texts: Sequence[str], *, batch: int = 256, progress: bool = False) -> Tensor:
    """Encode texts; equal strings are encoded once, so that their features are equal to the last bit.

    Args:
        model: The model.
        texts: m strings.
        batch: Texts a pass.
        progress: Show a bar when there are many batches.

    Returns:
        (m, d) float32 on the CPU, L2-normalized.

    Raises:
        UserError: the model gives a text features that are not finite.
    """
    distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    strings = list(distinct)
    chunks = [strings[start : start + batch] for start in range(0, len(strings), batch)]
    parts = []
    with measuring(model) as device:
        for chunk in _watched(chunks, len(chunks), "Texts", progress):
            features = normalize(model.encode_text(model.tokenize(chunk).to(device)).float(), dim=-1).cpu()
            _require_finite(features, "text", chunk)
            parts.append(features)
    rows = torch.tensor([distinct[text] for text in texts], dtype=torch.int64)
    return torch.cat(parts)[rows]


def encode_source(
    model: Encoder,
    source: PairSource,
    *,
    texts: bool = True,
    indices: Sequence[int] | None = None,
    batch: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> SourceFeatures:
    """Encode the images of a source, and its captions if asked for, in one pass over the files.

    Args:
        model: The model.
        source: The pairs.
        texts: Whether the captions are encoded too.
        indices: Places in the source to take, in this order; None takes all.
        batch: Images a pass.
        workers: Processes that read and resize; 0 reads in this one.
        progress: Show a bar when there are many batches.

    Raises:
        UserError: not one pair of the source can be read.
    """
    rows = encode_images(
        model,
        source,
        lambda pixels: normalize(model.encode_image(pixels).float(), dim=-1),
        indices=indices,
        batch=batch,
        workers=workers,
        progress=progress,
    )
    captions = rows.captions
    words = [caption for own in captions for caption in own]
    return SourceFeatures(
        name=source.name,
        indices=rows.indices,
        images=rows.features,
        captions=captions,
        texts=text_features(model, words, batch=batch, progress=progress) if texts else None,
        owners=np.repeat(np.arange(len(captions)), [len(own) for own in captions]),
        skipped=rows.skipped,
    )


@dataclass(frozen=True)
class EncodedImages:
    """Images of a source as an encoder sees them; those that could not be read are left out and counted.

    Attributes:
        indices: (n,) int64, the place of each row in the source.
        features: (n, d) float32 on the CPU, as the encoder gave them.
        captions: Of each row, its captions.
        skipped: The pairs left out, by reason.
    """

    indices: np.ndarray
    features: Tensor
    captions: tuple[tuple[str, ...], ...]
    skipped: SkipCounter


def encode_images(
    model: Encoder,
    source: PairSource,
    encode: Callable[[Tensor], Tensor],
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    batch: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> EncodedImages:
    """Run the images of a source through one of a model's encoders, in one pass over the files.

    Args:
        model: The model, for its preprocessing, its device and its mode.
        source: The pairs.
        encode: (n, 3, S, S) normalized pixels on the model's device to (n, d).
        indices: As for `encode_source`.
        batch: As for `encode_source`.
        workers: As for `encode_source`.
        progress: As for `encode_source`.

    Raises:
        UserError: not one pair of the source can be read, or the encoder gives an image features that are not finite.
    """
    places = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    reader = DataLoader(
        _Places(source, places),
        batch_size=batch,
        num_workers=workers,
        collate_fn=_Collate(model),
        generator=torch.Generator(),  # else it draws from the one that dropout in a training run draws from
    )
    kept: list[int] = []
    captions: list[tuple[str, ...]] = []
    parts: list[Tensor] = []
    skipped = SkipCounter()
    with naming_lost_workers(), measuring(model) as device:
        for read in _watched(reader, len(reader), f"Images of {source.name}", progress):
            for broken in read.broken:
                skipped.add(broken)
            if read.pixels is not None:
                features = encode(read.pixels.to(device)).float().cpu()
                _require_finite(features, "image", read.keys)
                parts.append(features)
                kept += read.places
                captions += read.captions
    if not kept:
        raise _nothing_left(source, skipped)
    return EncodedImages(np.asarray(kept, dtype=np.int64), torch.cat(parts), tuple(captions), skipped)


@dataclass
class _Read:
    """A batch as it comes from the files: `pixels` is None when every pair of it is broken."""

    places: list[int]
    keys: list[str]
    pixels: Tensor | None
    captions: list[tuple[str, ...]]
    broken: list[BrokenPair]


class _Places(Dataset[tuple[int, Pair | BrokenPair]]):
    """The chosen places of a source; a broken pair is handed on as a value."""

    def __init__(self, source: PairSource, places: np.ndarray) -> None:
        self.source, self.places = source, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> tuple[int, Pair | BrokenPair]:
        place = int(self.places[row])
        try:
            return place, self.source[place]
        except BrokenPair as broken:
            return place, broken


class _Collate:
    """Turns pairs into pixels, inside the worker."""

    def __init__(self, model: Encoder) -> None:
        # `DualEncoder.preprocessor` stays on the host, where a worker may use it; `preprocess` moves to the device.
        self.preprocess = getattr(model, "preprocessor", model.preprocess)

    def __call__(self, rows: list[tuple[int, Pair | BrokenPair]]) -> _Read:
        good = [(place, pair) for place, pair in rows if isinstance(pair, Pair)]
        return _Read(
            places=[place for place, _ in good],
            keys=[pair.key for _, pair in good],
            pixels=self.preprocess([pair.image for _, pair in good]) if good else None,
            captions=[pair.captions for _, pair in good],
            broken=[pair for _, pair in rows if isinstance(pair, BrokenPair)],
        )


def _watched(items: Iterable[T], total: int, label: str, progress: bool) -> Iterable[T]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), "batches", TimeRemainingColumn())
    shown = progress and (total >= LONG or not on_terminal())  # plain lines come only when it takes long
    with progress_bar(*columns, shown=shown, transient=True) as bar:
        yield from bar.track(items, total, description=label)


def _require_finite(features: Tensor, what: str, names: Sequence[str]) -> None:
    """Raise a `UserError` that names the first row of features (n, d) with a NaN or an infinity."""
    # One number tells for all rows, so that a batch costs a single pass over its features.
    if features.sum().isfinite() or bool((finite := features.isfinite().all(1)).all()):
        return
    first = names[int((~finite).nonzero()[0])]
    raise UserError(
        f"The model's features of the {what} '{printable(first)}' are not finite ({int((~finite).sum())} of "
        f"{len(features)} in its batch), so nothing can be measured with it. Its weights have diverged or are damaged: "
        "take an earlier checkpoint, or train with a lower train.lr."
    )


def _nothing_left(source: PairSource, skipped: SkipCounter) -> UserError:
    reasons = ", ".join(f"{count} × {reason}" for reason, count in skipped.counts.items())
    return UserError(
        f"Nothing to measure on '{source.name}': of its {len(source)} pairs none could be read"
        f"{f' ({reasons})' if reasons else ''}. Check that the paths lead to images and that none lacks a caption."
    )
