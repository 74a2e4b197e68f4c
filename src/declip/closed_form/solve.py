"""Projections of frozen towers in closed form, from pairs and a classifier's classes.

Ridge regression both ways is best with few pairs, canonical correlation analysis (CCA) with thousands.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.closed_form.folds import PrincipalAxes

LEAST_SLOPE = 1e-3  # of embeddings on those of their pairs, where the model is no better than chance
OWN_MEAN = 10  # training images that weigh as much as the start's mean feature


class Form(NamedTuple):
    """A closed form of the projections."""

    method: Literal["ridge", "cca", "pulled", "start"]
    ridge: float  # added to the variance of each direction, in units of their mean


DEFAULT_FORM = Form("ridge", 1.0)  # of fewer pairs than can be cross-validated
START = Form("start", 0.0)  # the projections of the start, or those of a classifier's classes alone


class Pairs(NamedTuple):
    """Features of images and of all their captions; each image counts once, however many captions it has."""

    images: Tensor  # (n, v)
    texts: Tensor  # (m, w)
    owners: Tensor  # (m,) int64, the image of each caption


class ClassPairs(NamedTuple):
    """A classifier as image-text pairs: the row of a class lies where its images lie (arXiv 2605.22484)."""

    rows: Tensor  # (c, v), the classifier's weights
    texts: Tensor  # (t, w), features of the classes' names and definitions
    owners: Tensor  # (t,) int64, the class of each text
    mean: Tensor  # (v,), mean feature of images, measured once for the start


class Heads(NamedTuple):
    """Two projections without biases into one space, where the cosine compares images and texts."""

    image: Tensor  # (k, v)
    text: Tensor  # (k, w)

    def similarities(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines of images (n, v) and texts (m, w), (n, m)."""
        return normalize(images @ self.image.mT, dim=-1) @ normalize(texts @ self.text.mT, dim=-1).mT


class RegressionRows(NamedTuple):
    """Pairs of one image and one text with weights: first the captions of the images, then the texts of the classes."""

    images: Tensor  # (r, v)
    texts: Tensor  # (r, w)
    weights: Tensor  # (r,) float64
    mean: Tensor | None  # (v,) mean feature of images; None: that of `images`


def closed_form_heads(rows: RegressionRows, forms: tuple[Form, ...]) -> list[Heads]:
    """Two linear projections by each form, from ridge regression in both directions or canonical correlation.

    With X and Y the features without the direction of their mean, scaled to unit length, and Ω the weights,
        R₁ = (XᵀΩX + εₓI)⁻¹ XᵀΩY        R₂ = (YᵀΩY + εᵧI)⁻¹ YᵀΩX
        M = R₁/‖R₁‖ + R₂ᵀ/‖R₂‖ = U diag(s) Vᵀ
    the projections of "ridge" are √s Uᵀ and √s Vᵀ: the product of an image's and a text's projection is xᵀ M y. Those
    of "cca" whiten both sides first (CSA, arXiv 2410.07610, with √s where the paper has s in the cosine):
        Wₓ = (XᵀΩX + εₓI)^-½        Wᵧ = (YᵀΩY + εᵧI)^-½        Wₓ XᵀΩY Wᵧ = U diag(s) Vᵀ
    and are √s UᵀWₓ and √s VᵀWᵧ. Projections without a bias cannot subtract a mean, so they ignore its direction.

    "pulled" is for embeddings of a model that has projections: ridge regression towards them (the penalty of ProLIP,
    arXiv 2410.05270), as all of its space is kept where the ridge is large:
        R₁ = (XᵀΩX + εₓI)⁻¹ (XᵀΩY + εₓ cₓ I)        cₓ = tr(XᵀΩY) / tr(XᵀΩX)        R₂ with X and Y exchanged
    """
    weights = (rows.weights / rows.weights.sum()).double()
    x, x_mean = centered(rows.images.double(), weights, rows.mean)
    y, y_mean = centered(rows.texts.double(), weights)
    (x_axes, y_axes), maps = solve(moments(x, y, weights), forms)
    # Equal features have no variance in the mean's direction, others have: it must stay ignored.
    return [Heads(_without(left @ x_axes.mT, x_mean), _without(right @ y_axes.mT, y_mean)) for left, right in maps]


def centered(features: Tensor, weights: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features (n, v) of unit length without the direction of their weighted mean, or a given one (v,); that too."""
    direction = normalize(weights.to(features) @ features if mean is None else mean.to(features), dim=0)
    return normalize(_without(features, direction), dim=-1), direction


def _without(rows: Tensor, direction: Tensor) -> Tensor:
    return rows - (rows @ direction)[:, None] * direction


def moments(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Sums of x xᵀ, y yᵀ and x yᵀ over weighted rows (n, v) and (n, w): (v, v), (w, w) and (v, w)."""
    weighted = x * weights[:, None]
    return weighted.mT @ x, (y * weights[:, None]).mT @ y, weighted.mT @ y


def solve(
    moments: tuple[Tensor, ...], forms: tuple[Form, ...], widths: tuple[int, int] | None = None
) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
    """Principal axes, (v, v) and (w, w), and projections (k, v) and (k, w) of features in these axes by each form.

    A ridge refers to the mean variance of `widths` directions, by default all.
    """
    *sides, crossed = moments
    (x_variances, x_axes), (y_variances, y_axes) = map(PrincipalAxes.of, sides)  # the dominant cost: O(v³)
    variances = x_variances, y_variances
    means = [side.sum() / width for side, width in zip(variances, widths or map(len, variances), strict=True)]
    cross = x_axes.mT @ crossed @ y_axes  # (v, w), in the axes of both sides
    maps = []
    for method, ridge in forms:
        x_damped, y_damped = (side + ridge * mean for side, mean in zip(variances, means, strict=True))
        if method == "cca":
            # Equal features have no variance at all: they are left at 0 instead of divided by it.
            x_white, y_white = (torch.where(side > 0, side.rsqrt(), 0.0) for side in (x_damped, y_damped))
            left, right = split_product(x_white[:, None] * cross * y_white)
            maps.append((left * x_white, right * y_white))
            continue
        x_cross = y_cross = cross
        if method == "pulled":
            shared = x_axes.mT @ y_axes  # the identity, in the axes of both sides
            slope = crossed.trace()
            x_cross, y_cross = (
                cross + ridge * mean * (slope / side.sum()).clamp(min=LEAST_SLOPE) * shared
                for side, mean in zip(variances, means, strict=True)
            )
        units = [normalize(side.flatten(), dim=0) for side in (x_cross / x_damped[:, None], y_cross / y_damped)]
        maps.append(split_product((units[0] + units[1]).view_as(cross)))
    return (x_axes, y_axes), maps


def split_product(product: Tensor) -> tuple[Tensor, Tensor]:
    """Divide M = U diag(s) Vᵀ (v, w) into √s Uᵀ (k, v) and √s Vᵀ (k, w), largest first, k the smaller width.

    From the eigenvectors of MᵀM, which takes a fifth of the time of a singular value decomposition; directions below
    a millionth of the largest are 0.
    """
    if product.shape[0] < product.shape[1]:
        right, left = split_product(product.mT)
        return left, right
    try:
        squares, axes = (each.flip(-1) for each in torch.linalg.eigh(product.mT @ product))
    except torch.linalg.LinAlgError:  # float32 with many equal eigenvalues, as of unused dimensions
        left, right = split_product(product.double())
        return left.to(product), right.to(product)
    values = squares.clamp(min=0).sqrt()
    roots = values.sqrt()
    inverse = torch.where(values > 1e-6 * values.max(), 1 / roots, 0.0)
    return (product @ axes * inverse).mT, (axes * roots * (inverse > 0)).mT


def regression_rows(pairs: Pairs, classes: ClassPairs | None, class_weight: float) -> RegressionRows:
    """Rows of the regression: an image weighs 1, a class `class_weight`, however many texts they have."""
    owners = pairs.owners
    images, texts = [pairs.images[owners]], [pairs.texts]
    weights = [1 / torch.bincount(owners)[owners].double()]
    mean = None
    if classes is not None:
        own = pairs.images.double()
        mean = (OWN_MEAN * classes.mean.double() + own.sum(dim=0)) / (OWN_MEAN + len(own))
        if class_weight:
            # A classifier's rows are known up to a common vector, which softmax ignores.
            images.append((classes.rows - classes.rows.mean(dim=0))[classes.owners])
            texts.append(classes.texts)
            weights.append(class_weight / torch.bincount(classes.owners)[classes.owners].double())
    return RegressionRows(torch.cat(images), torch.cat(texts), torch.cat(weights), mean)


def fit_heads(pairs: Pairs, classes: ClassPairs | None, class_weight: float, forms: tuple[Form, ...]) -> list[Heads]:
    """Heads of images and of a classifier's classes, by each form."""
    return closed_form_heads(regression_rows(pairs, classes, class_weight), forms)
