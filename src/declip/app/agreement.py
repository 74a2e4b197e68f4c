"""How well the images of an index and their captions agree, by the model's own vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from declip.app.jobs import Progress
from declip.errors import UserError
from declip.search.index import Index

BLOCK = 4_096
"""Rows whose vectors are held at a time."""

TO_SIGMA = 1.4826
"""What makes the median distance from the median a standard deviation, of a normal distribution."""

BARS = 40
"""Of the histogram."""

EQUAL = 1e-4
"""Cosines that differ by less are equal: twice what float16 vectors can tell apart."""

NO_CAPTIONS = (
    "This index holds no vectors of captions. Stop the page, and embed again into another folder: "
    "declip embed MODEL SOURCE --captions --out DIR"
)


class Rank(NamedTuple):
    """Where an image's own caption stands among the captions of the index.

    Attributes:
        rank: 1 where no other image's caption lies nearer.
        nearest: The id of the image whose caption lies nearest.
    """

    rank: int
    nearest: int


@dataclass(frozen=True)
class Agreement:
    """The cosine of each image with its captions.

    Attributes:
        ids: (n,) int64, the images that have a caption, the least agreeing first.
        cosines: (n,) float32, rising.
        without: Images without a caption.
        median: Of the cosines.
        spread: A standard deviation of them that outliers hardly move.
    """

    ids: np.ndarray
    cosines: np.ndarray
    without: int
    median: float
    spread: float

    def below(self, cosine: float) -> np.ndarray:
        """The ids whose cosine is smaller."""
        return self.ids[: int(np.searchsorted(self.cosines, cosine))]

    def deviations(self, cosine: float) -> float:
        """How many standard deviations a cosine lies above the median."""
        return (cosine - self.median) / self.spread if self.spread else 0.0

    def histogram(self) -> tuple[list[int], list[float]]:
        """`BARS` counts and the `BARS` + 1 cosines between them."""
        counts, edges = np.histogram(self.cosines, BARS)
        return counts.tolist(), edges.tolist()


def agreement(index: Index, tell: Progress) -> Agreement:
    """Compare each image of an index with its captions.

    Args:
        index: With vectors of captions.
        tell: Is told the share that is done.

    Raises:
        UserError: The index has no vectors of captions, or no image has a caption.
    """
    if not index.manifest.captions:
        raise UserError(NO_CAPTIONS)
    ids = index.ids
    cosines = np.empty(len(ids), np.float32)
    captioned = np.empty(len(ids), bool)
    for start in range(0, len(ids), BLOCK):
        some = slice(start, start + BLOCK)
        texts = index.vectors(ids[some], "captions")
        cosines[some] = (index.vectors(ids[some]) * texts).sum(1).numpy()
        captioned[some] = texts.any(1).numpy()
        tell(min(1.0, (start + BLOCK) / len(ids)))
    if not captioned.any():
        raise UserError("Not one image of this index has a caption, so there is nothing to compare.")
    known, values = ids[captioned], cosines[captioned]
    order = np.argsort(values, kind="stable")
    median = float(np.median(values))
    spread = TO_SIGMA * float(np.median(np.abs(values - median)))
    return Agreement(known[order], values[order], int((~captioned).sum()), median, spread)


def ranks(index: Index, ids: Sequence[int]) -> list[Rank]:
    """Where the own captions of some images stand among all captions, and whose lies nearest.

    Equals the plain loop
        rank[i] = 1 + sum(image[i] @ caption[j] > image[i] @ caption[i] + EQUAL for j in index)

    Args:
        index: With vectors of captions.
        ids: Of n images.
    """
    images = index.vectors(ids)
    own = (images * index.vectors(ids, "captions")).sum(1, keepdim=True)
    better = torch.zeros(len(ids), dtype=torch.int64)
    best, nearest = torch.full((len(ids),), -torch.inf), torch.zeros(len(ids), dtype=torch.int64)
    everything = index.ids
    for start in range(0, len(everything), BLOCK):
        block = everything[start : start + BLOCK]
        texts = index.vectors(block, "captions")
        scores = (images @ texts.T).masked_fill(~texts.any(1), -torch.inf)
        better += (scores > own + EQUAL).sum(1)
        top = scores.max(1)
        nearer = top.values > best
        best = torch.where(nearer, top.values, best)
        nearest = torch.where(nearer, torch.from_numpy(block)[top.indices], nearest)
    return [Rank(int(count) + 1, int(id)) for count, id in zip(better, nearest, strict=True)]
