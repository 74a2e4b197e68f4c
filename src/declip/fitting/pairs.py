"""Pooled features of all pairs of a source, with the groups of pairs that belong together."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from declip.closed_form.pairs import Pairs
from declip.data.images.preprocess import Preprocess
from declip.data.pair import PairSource, SkipCounter
from declip.evaluation.encode import encode_batches
from declip.fitting.base import BATCH, EncoderBase
from declip.inspection.reading import PairRow, ReadPairs, compared_row
from declip.inspection.split import related_pairs
from declip.io.pool import usual_workers
from declip.models.encoder import Preprocessing

MANY = 200  # pairs from which on processes read the images


@dataclass(frozen=True)
class PairFeatures:
    """Pooled features of the n pairs that can be used, and of their m captions."""

    pairs: Pairs
    groups: np.ndarray  # (n,), equal where images or captions are, or by the source's column
    indices: np.ndarray  # (m,) int64, index in the source of the pair of each caption
    captions: list[str]  # (m,)
    skipped: SkipCounter

    @property
    def image_indices(self) -> list[int]:
        """Index in the source of each image, (n,)."""
        owners = self.pairs.owners.numpy()
        first = np.searchsorted(owners, np.arange(len(self.pairs.images)))
        return self.indices[first].tolist()


def read_features(
    source: PairSource, base: EncoderBase, max_broken: float, progress: bool = False
) -> PairFeatures:
    """Encode all images and captions of a source.

    Args:
        max_broken: Fraction of broken pairs above which a `UserError` is raised.
    """
    # --- one pass over the images, for features and for the hashes that the groups are made of
    indices = np.arange(len(source))
    batches = np.split(indices, range(BATCH, len(source), BATCH))
    workers = 0
    if len(source) > MANY:
        workers = usual_workers()
    images = list[Tensor]()
    rows = list[PairRow]()
    texts = list[tuple[str, ...]]()
    skipped = SkipCounter()
    reader = _Reader(base.model.preprocessor)
    stream = encode_batches(
        base.model, source, reader, batches, workers, progress, base.pool_images
    )
    for encoded, read, broken in stream:
        if read:
            images.append(encoded)
        for row, captions in read:
            rows.append(row)
            texts.append(captions)
        skipped.merge(broken)
    pairs = ReadPairs.of(rows, skipped)
    groups = related_pairs(pairs, source)
    skipped.refuse(len(source), max_broken, source.name)
    # --- captions
    captions = [caption for own in texts for caption in own]
    owners = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
    pooled = base.pool_captions(captions, progress)
    features = Pairs(torch.cat(images), pooled, torch.from_numpy(owners))
    return PairFeatures(features, groups, pairs.pairs["index"][owners], captions, skipped)


class _Reader:
    """Reads a pair, and resizes its image as for a search.

    That takes a tenth of the time of exact pixels for 12 megapixels.
    """

    def __init__(self, preprocess: Preprocessing) -> None:
        self.preprocess = preprocess

    def __call__(
        self, source: PairSource, index: int
    ) -> tuple[Tensor | Image.Image, tuple[PairRow, tuple[str, ...]]]:
        pair = source[index]
        captions = pair.captions()
        if not isinstance(self.preprocess, Preprocess):  # of another library, which takes images
            image = Image.fromarray(pair.image())
            row = compared_row(image, captions, index)
            return image, (row, captions)
        pixels = pair.image(self.preprocess.enough)
        row = compared_row(Image.fromarray(pixels), captions, index)
        return self.preprocess.resized(pixels), (row, captions)
