"""Batches by step: which pairs in which order, their views as tensors, and worker processes that work ahead.

A batch is a pure function of the seed and the step. The seed (seed, epoch, i) belongs to pair i (see `Assembler`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate

from declip.data.batch import IGNORED, PHOTOMETRIC_WIDTH, PairBatch, View
from declip.data.images.views import Crop
from declip.data.order import Order
from declip.data.pair import BrokenPair, LazyImage, PairSource, SkipCounter
from declip.data.plan import Plan
from declip.data.sources.subset import groups_of
from declip.data.text.augment import augment, mask_tokens
from declip.data.text.tokenizer import CaptionTokenizer, padded_length
from declip.errors import UserError
from declip.io.pool import imap, naming_lost_workers

# Pairs, before the fraction of broken ones can stop a run: fewer are too noisy
SEEN_BEFORE_STOPPING = 100


Augment = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]
"""A view (3, S, S) uint8 and the random numbers of its pair → the view (3, S, S) uint8, before color jitter."""


@dataclass(eq=False)
class Assembler:
    """Builds the batch of any step; each of `ranks` builds consecutive pairs of a batch of `batch_size`.

    Everything random about pair i in epoch e comes from a generator seeded by (seed, e, i): texts, mask, each view.
    """

    source: PairSource
    tokenizer: CaptionTokenizer
    plan: Plan
    batch_size: int
    seed: int
    shuffle_buffer: int | None = None
    rank: int = 0
    ranks: int = 1
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if len(self.source) < self.batch_size:
            problem = f"'{self.source.name}' holds {len(self.source)} pairs, fewer than one batch of {self.batch_size}."
            raise UserError(f"{problem} Set a smaller train.batch_size, or add pairs.")
        self.groups = groups_of(self.source) if self.plan.duplicates else None
        order = Order(self.source, self.batch_size, self.seed, self.shuffle_buffer)
        self.steps_per_epoch = order.steps_per_epoch
        self.indices = order.indices

    def __getitem__(self, step: int) -> PairBatch:
        """Build this rank's part of the batch of a step; `skipped` has its broken pairs."""
        samples = list[_Sample]()
        skipped = list[BrokenPair]()
        epoch = step // self.steps_per_epoch
        parts = np.array_split(self.indices(step), self.ranks)
        for index in parts[self.rank].tolist():
            try:
                samples.append(self.sample(index, epoch))
            except BrokenPair as broken:
                skipped.append(broken)
        return self.collate(samples, skipped)

    def _texts(self, captions: Sequence[str], generator: np.random.Generator) -> list[str]:
        chosen = int(generator.integers(len(captions)))
        text = captions[chosen]
        if self.plan.texts == 1:
            return [text]
        if self.plan.text.second_view == "caption" and len(captions) > 1:
            other = int(generator.integers(len(captions) - 1))
            other += other >= chosen
            return [text, captions[other]]
        return [text, augment(text, generator)]

    def sample(self, index: int, epoch: int) -> _Sample:
        """Read a pair, make every random choice about its views, decode it; raises `BrokenPair`."""
        pair = self.source[index]
        captions = pair.captions()
        image = pair.open()
        generator = np.random.default_rng((self.seed, epoch, index))
        # --- texts, mask, then image views: the order in which random numbers are drawn is part of the result
        texts = self._texts(captions, generator)
        rows = [self.tokenizer.encode(text) for text in texts]
        same = list[int]()
        masked = list[int]()
        labels = list[int]()
        if self.groups is not None:
            # A tuple of integers has the same hash in every process.
            same = [hash(tuple(rows[0])), int(self.groups[index])]
        probability = self.plan.mask_probability
        if probability is not None:
            masked, labels = mask_tokens(rows[0], generator, self.tokenizer, probability)
        crops = list[Crop]()
        params = list[list[float]]()
        for transform in self.plan.views:
            crops.append(transform.sample_crop(*image.size, generator))
            params.append(transform.sample_params(generator))
        # --- pixels, only now that their crops are known
        pixels = self._crop(image, crops)
        if self.augment is not None:
            pixels = [_augment(self.augment, view, generator) for view in pixels]
        id = epoch * len(self.source) + index
        return _Sample(pixels, params, rows, masked, labels, id, same)

    def _crop(self, image: LazyImage, crops: list[Crop]) -> list[torch.Tensor]:
        """Decode an image, at a reduced scale where every crop stays at least as large as its view, and crop it."""
        for scale in (*image.scales, 1):
            reduced = [crop.reduced(scale) for crop in crops]
            made = [*zip(self.plan.views, reduced, strict=True)]
            if all(min(crop.width, crop.height) >= transform.size for transform, crop in made):
                break
        pixels = image.pixels(scale)
        return [transform.crop_and_resize(pixels, crop) for transform, crop in made]

    def collate(self, samples: list[_Sample], skipped: list[BrokenPair]) -> PairBatch:
        """Stack the samples; every text is padded to the longest one's length, rounded up."""
        # One tensor for all views, (V, B, PHOTOMETRIC_WIDTH), of which each view has its rows.
        params = torch.tensor([sample.params for sample in samples], dtype=torch.float32)
        shape = len(samples), len(self.plan.views), PHOTOMETRIC_WIDTH
        params = params.reshape(shape).transpose(0, 1).contiguous()
        views = {}
        for number, transform in enumerate(self.plan.views):
            size = transform.size
            pixels = torch.empty(0, 3, size, size, dtype=torch.uint8)
            if samples:
                # In a worker this allocates memory shared with the training process, which copies nothing.
                # (B, 3, S, S)
                pixels = default_collate([sample.pixels[number] for sample in samples])
            views[transform.name] = View(pixels, params[number])
        texts = [[sample.rows[number] for sample in samples] for number in range(self.plan.texts)]
        counts = [[len(ids) for ids in rows] for rows in texts]
        # One length for all texts, since the captions and their augmentations are encoded in one call.
        length = self.tokenizer.context
        if not self.plan.whole_context:
            longest = max(chain.from_iterable(counts), default=1)
            length = padded_length(longest, length, self.plan.length_step)
        padding = self.tokenizer.padding
        batch = PairBatch(
            views=views,
            texts=torch.stack([_pad(rows, length, padding) for rows in texts]),  # (T, B, L)
            lengths=_integers(counts),  # (T, B)
            sample_ids=_integers([sample.id for sample in samples]),
            skipped=skipped,
        )
        if self.plan.mask_probability is not None:
            batch.masked = _pad([sample.masked for sample in samples], length, padding)
            batch.labels = _pad([sample.labels for sample in samples], length, IGNORED)
        if self.plan.duplicates:
            same = [sample.same for sample in samples]
            batch.duplicate_ids = _integers(same).reshape(-1, 2)  # (B, 2)
        return batch


def _augment(augment: Augment, view: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Apply a user's function to a view, (3, S, S) uint8, and check what it returns."""
    changed = augment(view, generator)
    wanted = f"a tensor {tuple(view.shape)} torch.uint8"
    given = f"a {type(changed).__name__}"
    if isinstance(changed, torch.Tensor):
        given = f"a tensor {tuple(changed.shape)} {changed.dtype}"
    if given != wanted:
        raise UserError(f"augment returned {given}; return {wanted}.")
    return changed


class _Sample(NamedTuple):
    """One pair with every random choice made."""

    pixels: list[torch.Tensor]  # one per view, (3, S, S) uint8
    params: list[list[float]]  # of each view, see `ViewTransform.sample_params`
    rows: list[list[int]]  # token ids of each text view
    masked: list[int]
    labels: list[int]
    id: int
    same: list[int]  # `PairBatch.duplicate_ids`


def _integers(values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _pad(rows: Sequence[list[int]], length: int, value: int) -> torch.Tensor:
    padded = np.full((len(rows), length), value, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded)


@dataclass(eq=False)
class PairLoader(Iterator[PairBatch], AbstractContextManager["PairLoader"]):
    """Yields the batches from `step` on; broken pairs are left out, and counted when their batch is yielded."""

    assembler: Assembler
    step: int = 0  # of the next batch
    workers: int = 0
    pin_memory: bool = False
    max_broken_fraction: float = 0.05

    def __post_init__(self) -> None:
        # The broken pairs of the batches yielded so far, and the number of all their pairs
        self.skipped = SkipCounter()
        self.seen = 0
        self.indices = self.assembler.indices
        self._batches: Iterator[PairBatch | UserError] | None = None
        self._closed = False

    def __next__(self) -> PairBatch:
        if self._closed:
            raise StopIteration
        if self._batches is None:
            work = partial(_batch_or_error, self.assembler)
            self._batches = imap(work, count(self.step), self.workers, self.pin_memory)
        with naming_lost_workers(f" at step {self.step}"):
            batch = next(self._batches)
        if isinstance(batch, UserError):
            self.close()
            raise batch
        self.step += 1
        if self.assembler.ranks == 1:
            self.count(len(batch), batch.skipped)
        return batch

    def close(self) -> None:
        """Stop the workers; no more batches follow. Closing twice has no effect."""
        self._closed = True
        # The iterator stops its processes when the last reference to it is deleted.
        self._batches = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def count(self, usable: int, skipped: Sequence[BrokenPair]) -> None:
        """Add a batch of `usable` and `skipped` pairs of all ranks; with one rank `__next__` does it."""
        self.seen += usable + len(skipped)
        for broken in skipped:
            self.skipped.add(broken)
        allowed = self.max_broken_fraction * self.seen
        # Three standard errors are allowed on top: the first pairs may be the broken ones by chance.
        if self.seen >= SEEN_BEFORE_STOPPING and self.skipped.total > allowed + 3 * allowed**0.5:
            self.close()
            self.skipped.refuse(self.seen, self.max_broken_fraction, self.assembler.source.name)


def _batch_or_error(assembler: Assembler, step: int) -> PairBatch | UserError:
    """The batch of a step; a `UserError` is returned, and raised in the main process."""
    try:
        return assembler[step]
    except UserError as error:
        return error
