"""Principal axes: ridge regression with several penalties from one decomposition."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class PrincipalAxes(NamedTuple):
    """Eigenvectors of a matrix of second moments, with the moment along each."""

    moments: Tensor  # (v,), rising, not negative
    axes: Tensor  # (v, v), columns

    @classmethod
    def of(cls, matrix: Tensor) -> "PrincipalAxes":
        """Decompose a symmetric matrix (v, v), in time O(v³)."""
        moments, axes = torch.linalg.eigh(matrix)
        return cls(moments.clamp(min=0), axes)

    def ridge(self, target: Tensor, penalties: Iterable[float]) -> list[Tensor]:
        """Compute (M + penalty I)⁻¹ target of the matrix M for each penalty, (v, c) each."""
        rotated = self.axes.mT @ target
        solutions = []
        for penalty in penalties:
            damped = self.moments + penalty
            solutions.append(self.axes @ (rotated / damped[:, None]))
        return solutions


def largest_directions(rows: Tensor, weights: Tensor, count: int) -> Tensor:
    """Axes (v, k) of the largest directions of rows (r, v) with weights (r,), `count` or fewer."""
    number, width = rows.shape
    if number < count:  # all of their directions
        return torch.linalg.qr(rows.mT).Q
    if width <= count:
        return torch.eye(width)
    scaled = rows * weights.sqrt()[:, None]
    if number < width:  # the same directions, from products of rows
        products = scaled @ scaled.mT  # (r, r)
        largest = torch.linalg.eigh(products).eigenvectors[:, -count:]
        return normalize(scaled.mT @ largest, dim=0)
    squares = scaled.mT @ scaled  # (v, v)
    return torch.linalg.eigh(squares).eigenvectors[:, -count:]
