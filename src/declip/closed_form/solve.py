"""Projections of images and texts into one space, in closed form from their second moments.

Ridge regression both ways is best with few pairs, canonical correlation analysis (CCA) with
thousands.
"""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import normalize

from declip.closed_form.axes import PrincipalAxes
from declip.closed_form.regression import Moments

# Of embeddings on those of their pairs, where the model is no better than chance
LEAST_SLOPE = 1e-3

Sides = tuple[Tensor, Tensor]
"""A tensor of images and one of texts."""


class Form(NamedTuple):
    """A closed form of the projections."""

    method: Literal["ridge", "cca", "pulled", "start"]
    ridge: float  # added to the variance of each direction, in units of their mean


DEFAULT_FORM = Form("ridge", 1.0)  # of fewer pairs than can be cross-validated
START = Form("start", 0.0)  # the projections of the start, or those of a classifier's classes alone


class Damped(Protocol):
    """The second moments M of one side plus a penalty on each direction, M + penalty I."""

    total: Tensor  # trace of M
    penalty: Tensor

    def divide(self, rows: Tensor) -> Tensor:
        """(M + penalty I)⁻¹ times rows (v, k)."""

    def whiten(self, rows: Tensor) -> Tensor:
        """A root of (M + penalty I)⁻¹ times rows (v, k)."""

    def whitened(self, projection: Tensor) -> Tensor:
        """A projection (k, v) of whitened features, as one of the features themselves."""


class AlongAxes:
    """Second moments in their principal axes, where many penalties share one decomposition."""

    def __init__(self, moments: Tensor, ridge: float, width: int) -> None:
        self.total = moments.sum()
        self.penalty = ridge * (self.total / width)
        self.damped = moments + self.penalty  # (v,)

    def divide(self, rows: Tensor) -> Tensor:
        """Divide each row by its moment."""
        # Features without any variance, as of one pair, have products of 0
        least = torch.finfo(rows.dtype).tiny
        return rows / self.damped.clamp(min=least)[:, None]

    def whiten(self, rows: Tensor) -> Tensor:
        """Divide each row by the root of its moment."""
        return rows * self._roots[:, None]

    def whitened(self, projection: Tensor) -> Tensor:
        """Divide each column by the root of its moment."""
        return projection * self._roots

    @property
    def _roots(self) -> Tensor:
        # Equal features have no variance at all: they are left at 0 instead of divided by it.
        return torch.where(self.damped > 0, self.damped.rsqrt(), 0.0)


class Factored:
    """Second moments with one penalty by a Cholesky factor, a tenth of the time of axes."""

    def __init__(self, moments: Tensor, ridge: float, width: int) -> None:
        self.total = moments.trace()
        self.penalty = ridge * self.total / width
        # Features without any variance, as of one pair, have factors that are not 0.
        least = torch.finfo(moments.dtype).tiny ** 0.5
        identity = torch.eye(len(moments)).to(moments)
        damped = moments + self.penalty.clamp(min=least) * identity
        self.factor = torch.linalg.cholesky(damped)

    def divide(self, rows: Tensor) -> Tensor:
        """Solve for the rows."""
        return torch.cholesky_solve(rows, self.factor)

    def whiten(self, rows: Tensor) -> Tensor:
        """Solve by one factor: it differs from a symmetric root by a rotation, which SVD undoes."""
        return solve_triangular(self.factor, rows, upper=False)

    def whitened(self, projection: Tensor) -> Tensor:
        """Solve by the same factor from the right."""
        return solve_triangular(self.factor, projection, upper=False, left=False)


def solve(
    known: Moments, forms: tuple[Form, ...], widths: tuple[int, int] | None = None
) -> tuple[Sides, list[Sides]]:
    """Projections by many forms, in the principal axes of both sides.

    A ridge refers to the mean variance of `widths` directions, by default all.

    Returns:
        The axes (v, v) and (w, w), and for each form projections (k, v) and (k, w) of features in
        these axes.
    """
    # The dominant cost: O(v³)
    x = PrincipalAxes.of(known.images)
    y = PrincipalAxes.of(known.texts)
    x_width, y_width = widths or known.crossed.shape
    crossed = x.axes.mT @ known.crossed @ y.axes  # (v, w)
    slope = known.crossed.trace()
    maps = []
    for method, ridge in forms:
        images = AlongAxes(x.moments, ridge, x_width)
        texts = AlongAxes(y.moments, ridge, y_width)
        if method == "pulled":
            identity = x.axes.mT @ y.axes
            maps.append(pulled(images, texts, crossed, slope, identity))
        else:
            maps.append(projections(images, texts, crossed, method))
    return (x.axes, y.axes), maps


def solve_one(known: Moments, form: Form, widths: tuple[int, int] | None = None) -> Sides:
    """Projections (k, v) and (k, w) of features by one form; `widths` as in `solve`."""
    crossed = known.crossed
    x_width, y_width = widths or crossed.shape
    images = Factored(known.images, form.ridge, x_width)
    texts = Factored(known.texts, form.ridge, y_width)
    if form.method == "pulled":
        identity = torch.eye(len(crossed)).to(crossed)
        return pulled(images, texts, crossed, crossed.trace(), identity)
    return projections(images, texts, crossed, form.method)


def projections(x: Damped, y: Damped, crossed: Tensor, method: str) -> Sides:
    """Ridge regression in both directions, or canonical correlation, see `fit_heads`."""
    if method == "cca":
        half_whitened = x.whiten(crossed)
        left, right = split_product(y.whiten(half_whitened.mT).mT)
        return x.whitened(left), y.whitened(right)
    return both_ways(x, y, crossed, crossed)


def pulled(x: Damped, y: Damped, crossed: Tensor, slope: Tensor, identity: Tensor) -> Sides:
    """Ridge regression towards projections that embeddings in one space have, see `fit_heads`."""
    x_slope = (slope / x.total).clamp(min=LEAST_SLOPE)
    y_slope = (slope / y.total).clamp(min=LEAST_SLOPE)
    x_target = crossed + x.penalty * x_slope * identity
    y_target = crossed + y.penalty * y_slope * identity
    return both_ways(x, y, x_target, y_target)


def both_ways(x: Damped, y: Damped, x_target: Tensor, y_target: Tensor) -> Sides:
    """Projections whose product is the sum of two regressions, each scaled to norm 1.

    The targets (v, w) take the place of XᵀY in the regression of texts on images, and the reverse.
    """
    forth = x.divide(x_target)
    back = y.divide(y_target.mT)
    product = of_length_1(forth) + of_length_1(back.mT)
    return split_product(product)


def of_length_1(matrix: Tensor) -> Tensor:
    """A matrix divided by its Frobenius norm."""
    return normalize(matrix.flatten(), dim=0).view_as(matrix)


def split_product(product: Tensor) -> Sides:
    """Divide M = U diag(s) Vᵀ (v, w) into √s Uᵀ (k, v) and √s Vᵀ (k, w), largest first.

    k is the smaller width. From the eigenvectors of MᵀM, which takes a fifth of the time of a
    singular value decomposition; directions below a millionth of the largest are 0.
    """
    if product.shape[0] < product.shape[1]:
        right, left = split_product(product.mT)
        return left, right
    try:
        rising = torch.linalg.eigh(product.mT @ product)
    except torch.linalg.LinAlgError:  # float32 with many equal eigenvalues, as of unused dimensions
        left, right = split_product(product.double())
        return left.to(product), right.to(product)
    squares = rising.eigenvalues.flip(-1)
    axes = rising.eigenvectors.flip(-1)
    values = squares.clamp(min=0).sqrt()
    roots = values.sqrt()
    nonzero = values > 1e-6 * values.max()
    inverse = torch.where(nonzero, 1 / roots, 0.0)
    left = product @ axes * inverse
    right = axes * roots * nonzero
    return left.mT, right.mT
