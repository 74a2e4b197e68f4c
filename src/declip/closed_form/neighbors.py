"""Neighbors as supervision in closed form: which known pairs an image and a caption both resemble.

An image and a caption that resemble the same known pairs belong together (ASIF, arXiv 2210.01738).
Known are the pairs that are fitted to, and the classes of a classifier.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

# With 10 to 200 neighbors and powers from 2 to 4 results differ by less than a point
NEAREST = 50  # known pairs that count as neighbors
POWER = 3.0  # of a cosine
# Of the shared space: the leading axes of known pairs. 384 lose a third of the gain, 1,024 nothing
WIDTH = 512
ITERATIONS = 3  # of the search for the leading axes


class Side(NamedTuple):
    """The known images, or the known texts."""

    anchors: Tensor  # (a, v) of length 1, less their mean: pairs, then classes
    mean: Tensor  # (v,)

    def cosines(self, pooled: Tensor) -> Tensor:
        """Cosines (n, a) of pooled features (n, v) with the anchors, without their mean."""
        centered = pooled.to(self.anchors) - self.mean
        return normalize(centered, dim=-1) @ self.anchors.mT

    def halves(self, pooled: Tensor, classes: int) -> list[Tensor]:
        """Cosines with the nearest anchors (n, a), and with the nearest of the c classes (n, c).

        Both have length 1; without classes only the first.
        """
        cosines = self.cosines(pooled)
        halves = [nearest(cosines)]
        if classes:
            of_classes = cosines[:, len(self.anchors) - classes :]
            halves.append(nearest(of_classes))
        return halves

    def features(self, pooled: Tensor, classes: int, weights: Tensor) -> Tensor:
        """Both halves in one, (n, a + c).

        Each has the length of the square root of its weight, so that a product of two rows is the
        weighted sum of two cosines.
        """
        halves = self.halves(pooled, classes)
        scaled = [half * weight.sqrt() for half, weight in zip(halves, weights, strict=False)]
        return torch.cat(scaled, dim=-1)

    def nearest(self, pooled: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(n, count) largest cosines of pooled features (n, v) with the anchors, and their rows.

        What the rows are: `declip.runs.fitted.FittedRun.known` of a fit; of a start without pairs,
        the names of its classes in order.
        """
        count = min(count, len(self.anchors))
        values, rows = self.cosines(pooled).topk(count, dim=-1)
        return values, rows


def both_resemble(
    image: Side, text: Side, pooled_image: Tensor, pooled_text: Tensor, count: int
) -> list[int]:
    """Rows of the anchors that an image (v,) and a text (w,) both resemble, the most similar first.

    At most `count`: those whose product counts most in the cosine of their neighbors.
    """
    one = torch.ones(1)
    of_image = image.features(pooled_image[None], 0, one)
    of_text = text.features(pooled_text[None], 0, one)
    products = (of_image * of_text)[0]
    values, rows = products.topk(min(count, len(products)))
    return rows[values > 0].tolist()


def nearest(cosines: Tensor) -> Tensor:
    """Powers of the largest cosines (n, a) of each row, 0 elsewhere, of length 1."""
    cosines = cosines.clamp(min=0)
    count = min(NEAREST, cosines.shape[-1])
    largest = cosines.topk(count, dim=-1).values
    is_near = cosines >= largest[:, -1:]
    powers = torch.where(is_near, cosines**POWER, 0.0)
    return normalize(powers, dim=-1)


@dataclass(frozen=True)
class Neighbors:
    """Known pairs, the weights of their neighbors, and the axes of the space that holds all parts."""

    images: Side
    texts: Side
    classes: int  # anchors at the end that are classes
    weights: Tensor  # (2,), see `WEIGHTS`
    axes: Tensor | None = None  # (k + a + c, d); None: all dimensions
    rows: tuple[int, ...] = ()  # which of the pairs that were fitted to are anchors

    def extend(self, side: Side, pooled: Tensor, projected: Tensor) -> Tensor:
        """Append features of neighbors to projected features (n, k) of length 1: (n, d) of length 1."""
        related = side.features(pooled, self.classes, self.weights)
        joined = torch.cat([projected.to(related), related], dim=-1)
        if self.axes is not None:
            joined = joined @ self.axes
        return normalize(joined, dim=-1)


class Similarities(NamedTuple):
    """Cosines of images (n,) and texts (m,) by each part, to be weighted in several ways.

    What `Heads.similarities` computes, without an embedding for each choice of weights.
    """

    projected: Tensor  # (n, m)
    of_halves: list[Tensor]  # each (n, m)
    image_squares: Tensor  # (n, halves), squared lengths: 1, or 0 without any neighbor
    text_squares: Tensor  # (m, halves)

    @classmethod
    def of(
        cls, projected: Tensor, known: Neighbors, images: Tensor, texts: Tensor
    ) -> "Similarities":
        """Compare pooled features of images (n, v) and texts (m, w) by their neighbors."""
        image_halves = known.images.halves(images, known.classes)
        text_halves = known.texts.halves(texts, known.classes)
        of_halves = [image @ text.mT for image, text in zip(image_halves, text_halves, strict=True)]
        projected = projected.to(of_halves[0])
        return cls(projected, of_halves, _squares(image_halves), _squares(text_halves))

    def weighted(self, weights: Sequence[float]) -> Tensor:
        """Cosines (n, m), the halves with their weights; projections have 1."""
        used = weights[: len(self.of_halves)]
        total = self.projected.clone()
        for half, weight in zip(self.of_halves, used, strict=True):
            total += weight * half
        scales = torch.tensor(used)
        image_lengths = (1 + self.image_squares @ scales).sqrt()
        text_lengths = (1 + self.text_squares @ scales).sqrt()
        return total / image_lengths[:, None] / text_lengths


def _squares(halves: Sequence[Tensor]) -> Tensor:
    """Squared lengths (n, halves) of the rows (n, k) of each half."""
    squares = [half.square().sum(dim=1) for half in halves]
    return torch.stack(squares, dim=1)


def leading_axes(rows: Tensor, seed: int = 0) -> Tensor:
    """The `WIDTH` directions (w, d) along which rows (r, w) are largest, by subspace iteration.

    All directions, where they are no more.
    """
    width = rows.shape[1]
    if width <= WIDTH:
        return torch.eye(width).to(rows)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(width, min(WIDTH, len(rows)), generator=generator)
    axes = torch.linalg.qr(start.to(rows)).Q
    for _ in range(ITERATIONS):
        axes = torch.linalg.qr(rows.mT @ (rows @ axes)).Q
    return axes
