"""Batches of cached features of frozen towers: each pair in a few variants of its views."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from declip.data.assembly import Assembler
from declip.data.batch import PairBatch, View
from declip.data.feature_store import KEY
from declip.data.pair import BrokenPair, Origin, PairSource


@dataclass(frozen=True)
class CachedFeatures:
    """Features of all pairs of a source in all variants."""

    images: dict[str, Tensor]  # view name → (n, w) pooled features
    texts: Tensor  # (m, w) pooled features
    image_rows: np.ndarray  # (variants, pairs) int64, row of each pair's images; -1 where the pair is broken
    text_rows: np.ndarray  # (variants, T, pairs) int64, row of each pair's texts
    broken: dict[int, BrokenPair]  # index → why that pair has no features
    mixup: float = 0.0  # alpha of FuseMix; 0: off


class VariantAssembler(Assembler):
    """Assembles batches whose views repeat after `variants` epochs and are the same in every run.

    The random choices about a pair come from a generator seeded by its content and the variant, not by the run's seed,
    so that features computed for one run serve all others.
    """

    def __init__(self, *args: Any, variants: int, features: CachedFeatures | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.variants, self.features = variants, features

    def __getitem__(self, step: int) -> PairBatch:
        if self.features is None:
            return super().__getitem__(step)
        found, epoch = self.features, step // self.steps_per_epoch
        indices, image_rows = self.indices(step), found.image_rows[epoch % self.variants]
        text_rows = found.text_rows[epoch % self.variants]
        own, part = (np.array_split(rows, self.ranks)[self.rank] for rows in (indices, np.arange(len(indices))))
        skipped = [found.broken[index] for index in own.tolist() if index in found.broken]
        own, part = own[image_rows[own] >= 0], part[image_rows[own] >= 0]
        pairs, weights = [own], None
        if found.mixup:
            # Of the whole batch, so that the ranks choose what one process would.
            generator = np.random.default_rng((self.seed, step, len(indices)))
            partners = indices[generator.permutation(len(indices))][part]
            pairs.append(np.where(image_rows[partners] >= 0, partners, own))
            drawn = generator.beta(found.mixup, found.mixup, len(indices)).astype(np.float32)
            weights = torch.from_numpy(drawn[part])

        def read(features: Tensor, rows: np.ndarray) -> Tensor:
            first, *second = (features[torch.from_numpy(rows[..., some])] for some in pairs)
            return first if weights is None else fusemix(first, second[0], weights)

        return PairBatch(
            views={spec.name: View(read(found.images[spec.name], image_rows)) for spec in self.plan.at(step)},
            texts=read(found.texts, text_rows),
            sample_ids=torch.from_numpy(epoch * len(self.source) + own),
            groups=self._groups(own.tolist()),
            skipped=skipped,
        )

    def _generator(self, epoch: int, index: int) -> np.random.Generator:
        key = content_key(self.source, index)
        return np.random.default_rng((epoch % self.variants, int.from_bytes(key)))


def fusemix(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Mix features (…, B, w) of frozen towers, for images and texts by the same λ: FuseMix (arXiv 2312.10144).

    Equals the plain loop
        mixed[…, b] = λ[b] · first[…, b] + (1 - λ[b]) · second[…, b]
    """
    return torch.lerp(second.float(), first.float(), weights[:, None]).to(first.dtype)


def content_key(source: PairSource, index: int) -> bytes:
    """Hash a pair: captions, keywords, and the image by its file's path and time, or else by its pixels."""
    (captions, keywords), origin = source.texts_of(index), source.origin(index)
    digest = blake2b(repr((captions, keywords, tuple(origin))).encode("utf-8", "replace"), digest_size=KEY)
    if origin == Origin():
        digest.update(np.ascontiguousarray(source.read_lazy(index).image.pixels()).tobytes())
    return digest.digest()
