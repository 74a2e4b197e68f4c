"""From a step's number to its batch: which pairs, which captions, which views. A pure function of the position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate

from declip.data.batch import IGNORED, Draw, PairBatch, Photometric
from declip.data.checks import check_range
from declip.data.images.lazy import read_lazy
from declip.data.pair import BrokenPair
from declip.data.sampling import build_order, parts_of
from declip.data.text.augment import augment, mask_tokens
from declip.errors import UserError

if TYPE_CHECKING:
    from declip.data.images.crops import Crop, ImageViews
    from declip.data.images.lazy import Picture, UndecodedPair
    from declip.data.pair import PairSource
    from declip.data.text.caption_tokenizer import CaptionTokenizer

SecondText = Literal["eda", "caption", "keywords", "same"]

MOST_KEYWORDS = 3
"""Keywords appended to a caption at most."""

LENGTH_STEP = 8
"""Text lengths are rounded up to a multiple of this, so that few different shapes occur."""


class Assembler:
    """Makes the batch of any step.

    Epoch e shows all pairs in an order drawn from (seed, e), see `order`; step s belongs to epoch
    s // steps_per_epoch, and the pairs that do not fill a last batch wait for another epoch. All that is random about
    pair i in epoch e comes from a generator seeded by (seed, e, i), in this order: caption, keywords, augmentation,
    mask, then crop and photometric parameters of each image view. With `resample` each step counts as an epoch of its
    own there.

    Args:
        source: Where pairs come from.
        tokenizer: Makes ids of captions.
        image_views: Draws the image views.
        batch: Pairs a step.
        seed: Not negative.
        image_view_count: 1 or 2, and one more with a base view.
        text_view_count: 1, or 2 with the EDA augmentation.
        mask: Whether to corrupt the caption for masked-language modelling.
        mask_probability: Share of the tokens chosen for it.
        eda_alpha: Share of the words that the augmentation changes.
        keyword_append_prob: Share of the captions that some of the pair's keywords are appended to.
        keyword_only_prob: Share of the captions that some of the pair's keywords replace.
        second_text: The second text view: "eda", the first one augmented; "caption", another of the pair's captions;
            "keywords", some of its keywords; "same", the first one again. A pair that has no other caption, or no
            keyword, gets "eda".
        base_view: Draws the first view instead, of the same size: SLIP's milder one for the contrast.
        shuffle_buffer: Pairs that are shuffled at a time, shard after shard. None: all pairs, or 50,000 where shards
            have to be fetched.
        resample: Whether each step draws its pairs anew instead of showing each once an epoch.
        scaled_decode: Whether a JPEG may be decoded at 1/2, 1/4 or 1/8 of its sides where every crop then still has the
            view's size or more.
        rank, ranks: Which part of each batch to make, of how many: neighboring places, as many in each as goes.

    Raises:
        UserError: An option is out of its range, or an epoch shows fewer pairs than a batch.
    """

    def __init__(
        self,
        source: PairSource,
        tokenizer: CaptionTokenizer,
        image_views: ImageViews,
        *,
        batch: int,
        seed: int,
        image_view_count: int = 2,
        text_view_count: int = 2,
        mask: bool = True,
        mask_probability: float = 0.15,
        eda_alpha: float = 0.1,
        keyword_append_prob: float = 0.0,
        keyword_only_prob: float = 0.0,
        second_text: SecondText = "eda",
        base_view: ImageViews | None = None,
        shuffle_buffer: int | None = None,
        resample: bool = False,
        scaled_decode: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        check_range("batch", batch, 2)
        check_range("seed", seed, 0)
        check_range("image_view_count", image_view_count, 1, 2 if base_view is None else 3)
        check_range("text_view_count", text_view_count, 1, 2)
        shares = {"mask_probability": mask_probability, "eda_alpha": eda_alpha}
        shares |= {"keyword_append_prob": keyword_append_prob, "keyword_only_prob": keyword_only_prob}
        for name, share in shares.items():
            check_range(name, share, 0, 1)
        shown = sum(part.shown for part in parts_of(source))
        if shown < batch:
            raise UserError(
                f"'{source.name}' holds {shown} pairs, fewer than one batch of {batch}. "
                "Give a smaller batch or more pairs."
            )
        self.source, self.tokenizer, self.image_views = source, tokenizer, image_views
        self.batch, self.seed = batch, seed
        self.drawers = [base_view or image_views] + [image_views] * (image_view_count - 1)
        self.image_view_count, self.text_view_count = image_view_count, text_view_count
        self.mask, self.mask_probability = mask, mask_probability
        self.eda_alpha, self.keyword_append_prob, self.keyword_only_prob = (
            eda_alpha,
            keyword_append_prob,
            keyword_only_prob,
        )
        self.second_text = second_text
        self.scaled_decode = scaled_decode
        self.rank, self.ranks = rank, ranks
        self._order = build_order(source, batch, seed, shuffle_buffer, resample)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches among the pairs that an epoch shows."""
        return self._order.steps_per_epoch

    def __getitem__(self, step: int) -> PairBatch:
        """Make this rank's part of the batch of a step; pairs that cannot be used are in its `skipped`."""
        epoch = self._order.draw(step)
        samples: list[_Sample] = []
        skipped: list[BrokenPair] = []
        for index in np.array_split(self.indices(step), self.ranks)[self.rank].tolist():
            try:
                samples.append(self._sample(read_lazy(self.source, index), epoch, index))
            except BrokenPair as broken:
                skipped.append(broken)
        return self._collate(samples, skipped)

    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step's batch, (batch,) int64 places in the source."""
        return self._order.indices(step)

    def order(self, epoch: int) -> np.ndarray:
        """All pairs of an epoch in their order, int64; the last ones may fill no batch."""
        return self._order.epoch(epoch)

    def words(self, tag: int, view: int) -> str:
        """The text that the pair `tag` (epoch * len(source) + index) showed as text view 0 or 1.

        Raises:
            UserError: There is no such view.
            BrokenPair: The pair can no longer be read.
        """
        check_range("view", view, 0, self.text_view_count - 1)
        epoch, index = divmod(tag, len(self.source))
        if self.keyword_append_prob or self.keyword_only_prob or self.second_text == "keywords":
            pair = read_lazy(self.source, index)
            captions, keywords = pair.captions, pair.keywords
        else:
            captions, keywords = self.source.captions(index), ()
        return self._texts(captions, keywords, self._generator(epoch, index))[view]

    def _generator(self, epoch: int, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, epoch, index))

    def _texts(self, captions: Sequence[str], keywords: Sequence[str], generator: np.random.Generator) -> list[str]:
        """Draw the text views of a pair."""
        place = int(generator.integers(len(captions)))
        text = captions[place]
        if self.keyword_append_prob and keywords and generator.random() < self.keyword_append_prob:
            text = ", ".join((text, *_some(keywords, generator)))
        if self.keyword_only_prob and keywords and generator.random() < self.keyword_only_prob:
            text = ", ".join(_some(keywords, generator))
        if self.text_view_count == 1:
            return [text]
        if self.second_text == "caption" and len(captions) > 1:
            other = int(generator.integers(len(captions) - 1))
            return [text, captions[other + (other >= place)]]
        if self.second_text == "keywords" and keywords:
            return [text, ", ".join(_some(keywords, generator))]
        if self.second_text == "same":
            return [text, text]
        return [text, augment(text, generator, self.eda_alpha)]

    def _sample(self, pair: UndecodedPair, epoch: int, index: int) -> _Sample:
        """Draw everything about one pair, then decode its picture; raises `BrokenPair`."""
        generator = self._generator(epoch, index)
        rows = [self.tokenizer.encode(t) for t in self._texts(pair.captions, pair.keywords, generator)]
        masked: list[int] = []
        labels: list[int] = []
        if self.mask:
            masked, labels = mask_tokens(rows[0], generator, self.tokenizer, self.mask_probability)
        crops: list[Crop] = []
        draws: list[Draw] = []
        for views in self.drawers:
            crops.append(views.draw_crop(*pair.picture.size, generator))
            draws.append(views.draw(generator))
        cut = self._cut(pair.picture, crops)
        return _Sample(cut, draws, rows, masked, labels, tag=epoch * len(self.source) + index)

    def _cut(self, picture: Picture, crops: list[Crop]) -> list[torch.Tensor]:
        """Decode a picture, smaller where no crop falls below the view's size and it is allowed, and cut the views."""
        size = self.image_views.size
        for scale in picture.scales if self.scaled_decode else ():
            reduced = [crop.reduced(scale) for crop in crops]
            if all(min(crop.width, crop.height) >= size for crop in reduced):
                return self._cut_from(picture.pixels(scale), reduced)
        return self._cut_from(picture.pixels(), crops)

    def _cut_from(self, pixels: np.ndarray, crops: list[Crop]) -> list[torch.Tensor]:
        return [views.cut(pixels, crop) for views, crop in zip(self.drawers, crops, strict=True)]

    def _collate(self, samples: list[_Sample], skipped: list[BrokenPair]) -> PairBatch:
        """Stack the samples; every text is padded to the longest, rounded up."""
        size, views = self.image_views.size, range(self.image_view_count)
        crops = [sample.crops[view] for view in views for sample in samples]
        # In a worker this is memory that the training process shares, so that no second copy is made to hand it over.
        images = default_collate(crops) if crops else torch.empty(0, dtype=torch.uint8)
        longest = max((len(ids) for sample in samples for ids in sample.rows), default=1)
        length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, self.tokenizer.context)
        padding = self.tokenizer.padding
        texts = [
            _pad([sample.rows[view] for sample in samples], length, padding) for view in range(self.text_view_count)
        ]
        return PairBatch(
            images=images.view(len(views), len(samples), 3, size, size),
            texts=torch.stack(texts),
            masked=_pad([sample.masked for sample in samples], length, padding) if self.mask else None,
            labels=_pad([sample.labels for sample in samples], length, IGNORED) if self.mask else None,
            lengths=torch.tensor(
                [[len(sample.rows[view]) for sample in samples] for view in range(self.text_view_count)],
                dtype=torch.int64,
            ),
            tags=torch.tensor([sample.tag for sample in samples], dtype=torch.int64),
            photometric=Photometric.stack([[sample.draws[view] for sample in samples] for view in views]),
            skipped=skipped,
        )


def _some(keywords: Sequence[str], generator: np.random.Generator) -> list[str]:
    """One to `MOST_KEYWORDS` of them, in random order."""
    count = generator.integers(1, min(MOST_KEYWORDS, len(keywords)) + 1)
    return [keywords[number] for number in generator.permutation(len(keywords))[:count]]


class _Sample(NamedTuple):
    """One pair with every random choice made."""

    crops: list[torch.Tensor]  # a view each, (3, S, S) uint8
    draws: list[Draw]
    rows: list[list[int]]  # the ids of each text view
    masked: list[int]
    labels: list[int]
    tag: int


def _pad(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    """Make (B, length) int64 of rows of ids, filled up on the right."""
    padded = np.full((len(rows), length), value, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded)
