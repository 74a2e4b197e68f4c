"""Batches of features that frozen towers gave before: each pair in a few variants of its views, computed once."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from declip.data.assembly import Assembler
from declip.data.batch import PairBatch, View
from declip.data.feature_store import KEY
from declip.data.pair import BrokenPair, LazyPair
from declip.data.sources.origin import Origin


@dataclass(frozen=True)
class CachedFeatures:
    """Features of all pairs of a source in all variants.

    Attributes:
        images: View name → (n, w) pooled features.
        texts: (m, w) pooled features.
        image_rows: (variants, pairs) int64, row of each pair's images; -1 where the pair is broken.
        text_rows: (variants, T, pairs) int64, row of each pair's texts.
        broken: Index → why that pair has no features.
    """

    images: dict[str, Tensor]
    texts: Tensor
    image_rows: np.ndarray
    text_rows: np.ndarray
    broken: dict[int, BrokenPair]


class VariantAssembler(Assembler):
    """Makes batches whose views repeat after `variants` epochs, and are the same in every run.

    The random choices about a pair come from a generator seeded by its content and the variant, not by the run's seed,
    so that features computed for one run serve all others.
    """

    def __init__(self, *args: Any, variants: int, features: CachedFeatures | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.variants, self.features = variants, features

    def __getitem__(self, step: int) -> PairBatch:
        if self.features is None:
            return super().__getitem__(step)
        found, epoch = self.features, self._order.view_epoch(step)
        own = np.array_split(self.indices(step), self.ranks)[self.rank]
        skipped = [found.broken[index] for index in own.tolist() if index in found.broken]
        own = own[found.image_rows[0, own] >= 0] if skipped else own
        rows = torch.from_numpy(found.image_rows[epoch % self.variants, own])
        text_rows = torch.from_numpy(found.text_rows[epoch % self.variants][:, own])
        return PairBatch(
            views={name: View(features[rows].float()) for name, features in found.images.items()},
            texts=found.texts[text_rows].float(),
            sample_ids=torch.from_numpy(epoch * len(self.source) + own),
            skipped=skipped,
        )

    def _generator(self, epoch: int, index: int) -> np.random.Generator:
        key = content_key(self.source.read_lazy(index), self.source.origin(index))
        return np.random.default_rng((epoch % self.variants, int.from_bytes(key)))


def content_key(pair: LazyPair, origin: Origin) -> bytes:
    """Hash a pair: its captions, its keywords, and its image by the stamp of its place or else by its pixels."""
    digest = blake2b(repr((pair.captions, pair.keywords, tuple(origin))).encode("utf-8", "replace"), digest_size=KEY)
    if origin == Origin():
        digest.update(np.ascontiguousarray(pair.image.pixels()).tobytes())
    return digest.digest()
