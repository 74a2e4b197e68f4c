"""The batch of any step as a pure function of its number: the choice of pairs, captions, views and masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate

from declip.data.batch import IGNORED, PairBatch, Photometric, View
from declip.data.images.crops import ViewTransform
from declip.data.pair import BrokenPair
from declip.data.sampling import build_order
from declip.data.text.augment import augment, mask_tokens
from declip.data.text.caption_tokenizer import padded_length
from declip.errors import UserError

if TYPE_CHECKING:
    from declip.data.images.crops import Crop
    from declip.data.pair import LazyImage, PairSource
    from declip.data.plan import Plan
    from declip.data.text.caption_tokenizer import CaptionTokenizer


class Assembler:
    """Builds the batch of any step.

    Epoch e shows all pairs in an order sampled from (seed, e), without those that do not fill a last batch. Everything
    random about pair i in epoch e comes from a generator seeded by (seed, e, i): texts, mask, then each image view.
    Each of `ranks` builds consecutive pairs of a batch of `batch_size`.
    """

    def __init__(
        self,
        source: PairSource,
        tokenizer: CaptionTokenizer,
        plan: Plan,
        *,
        batch_size: int,
        seed: int,
        shuffle_buffer: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if len(source) < batch_size:
            raise UserError(
                f"'{source.name}' holds {len(source)} pairs, fewer than one batch of {batch_size}. "
                "Set a smaller train.batch_size, or add pairs."
            )
        self.source, self.tokenizer, self.plan = source, tokenizer, plan
        self.batch_size, self.seed = batch_size, seed
        self.text = plan.texts.augmentation
        self.scaled_decode = True  # a JPEG at 1/2, 1/4 or 1/8 where every crop stays large enough
        self.rank, self.ranks = rank, ranks
        order = build_order(source, batch_size, seed, shuffle_buffer)
        self.steps_per_epoch, self.indices = order.steps_per_epoch, order.indices

    def __getitem__(self, step: int) -> PairBatch:
        """Build this rank's part of the batch of a step; `skipped` has its broken pairs."""
        epoch = step // self.steps_per_epoch
        samples: list[_Sample] = []
        skipped: list[BrokenPair] = []
        for index in np.array_split(self.indices(step), self.ranks)[self.rank].tolist():
            try:
                samples.append(self.sample(index, epoch))
            except BrokenPair as broken:
                skipped.append(broken)
        return self.collate(samples, skipped)

    def _generator(self, epoch: int, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, epoch, index))

    def _texts(self, captions: Sequence[str], generator: np.random.Generator) -> list[str]:
        chosen = int(generator.integers(len(captions)))
        text = captions[chosen]
        if self.plan.texts.count == 1:
            return [text]
        if self.text.second_view == "caption" and len(captions) > 1:
            other = int(generator.integers(len(captions) - 1))
            return [text, captions[other + (other >= chosen)]]
        if self.text.second_view == "same":
            return [text, text]
        return [text, augment(text, generator)]

    def sample(self, index: int, epoch: int) -> _Sample:
        """Read a pair, make every random choice about its views, decode it; raises `BrokenPair`."""
        pair = self.source.read_lazy(index)
        generator = self._generator(epoch, index)
        # --- texts, mask, then image views: the order in which random numbers are drawn is part of the result
        rows = [self.tokenizer.encode(t) for t in self._texts(pair.captions, generator)]
        probability = self.plan.texts.mask_probability
        masked, labels = (
            ([], []) if probability is None else mask_tokens(rows[0], generator, self.tokenizer, probability)
        )
        transforms = [_transform(spec.size, spec.augmentation) for spec in self.plan.views]
        chosen = [(t.sample_crop(*pair.image.size, generator), t.sample_params(generator)) for t in transforms]
        # --- pixels, only now that their crops are known
        pixels = self._crop(pair.image, transforms, [crop for crop, _ in chosen])
        return _Sample(pixels, [params for _, params in chosen], rows, masked, labels, epoch * len(self.source) + index)

    def _crop(self, image: LazyImage, transforms: list[ViewTransform], crops: list[Crop]) -> list[torch.Tensor]:
        """Decode an image, at a reduced scale where every crop stays at least as large as its view, and crop it."""
        best = 1
        for scale in reversed(image.scales) if self.scaled_decode else ():
            reduced = [crop.reduced(scale) for crop in crops]
            if all(min(c.width, c.height) >= t.size for c, t in zip(reduced, transforms, strict=True)):
                best = scale
        pixels = image.pixels(best)
        crops = crops if best == 1 else [crop.reduced(best) for crop in crops]
        return [transform.crop_and_resize(pixels, crop) for transform, crop in zip(transforms, crops, strict=True)]

    def collate(self, samples: list[_Sample], skipped: list[BrokenPair]) -> PairBatch:
        """Stack the samples; every text is padded to the longest one's length, rounded up."""
        views = {}
        for number, spec in enumerate(self.plan.views):
            crops = [sample.pixels[number] for sample in samples]
            # In a worker this allocates memory shared with the training process, which copies nothing.
            pixels = default_collate(crops) if crops else torch.empty(0, 3, spec.size, spec.size, dtype=torch.uint8)
            views[spec.name] = View(pixels, Photometric.stack([sample.params[number] for sample in samples]))
        # One length for all texts, since the captions and their augmentations are encoded in one call.
        longest = max((len(ids) for sample in samples for ids in sample.rows), default=1)
        context = self.tokenizer.context
        length = context if self.plan.texts.whole_context else padded_length(longest, context)
        padding, texts = self.tokenizer.padding, range(self.plan.texts.count)
        masks = self.plan.texts.mask_probability is not None
        return PairBatch(
            views=views,
            texts=torch.stack([_pad([sample.rows[text] for sample in samples], length, padding) for text in texts]),
            masked=_pad([sample.masked for sample in samples], length, padding) if masks else None,
            labels=_pad([sample.labels for sample in samples], length, IGNORED) if masks else None,
            lengths=torch.tensor([[len(sample.rows[text]) for sample in samples] for text in texts], dtype=torch.int64),
            sample_ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
            skipped=skipped,
        )


_transform = cache(ViewTransform)


class _Sample(NamedTuple):
    """One pair with every random choice made."""

    pixels: list[torch.Tensor]  # one per view, (3, S, S) uint8
    params: list[Photometric]
    rows: list[list[int]]  # token ids of each text view
    masked: list[int]
    labels: list[int]
    id: int


def _pad(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    padded = np.full((len(rows), length), value, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded)
