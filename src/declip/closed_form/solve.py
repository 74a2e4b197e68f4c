"""Projections of frozen towers in closed form, from pairs and a classifier's classes.

Ridge regression both ways is best with few pairs, canonical correlation analysis (CCA) with thousands.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from declip.closed_form.axes import PrincipalAxes
from declip.closed_form.neighbors import Neighbors

ROWS = 8_192  # images that are converted at a time
# Of embeddings on those of their pairs, where the model is no better than chance
LEAST_SLOPE = 1e-3
OWN_MEAN = 10  # training images that weigh as much as the start's mean feature
# Of class posteriors as features. 0.5 costs half a point of R@10 with 31 emoji and icons, whose classes are unsure and
# where small powers have a length; 1 costs a point of R@1 on clip art (benchmarks/results/few/posteriors.jsonl).
POSTERIOR_POWER = 0.7
# Whose posteriors are features: the time of a fit grows with the cube of their number
MOST_CLASSES = 2_000


Sides = tuple[Tensor, Tensor]
"""A tensor of images and one of texts."""


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
    posteriors: bool = True  # whether an image's class posteriors are features too


class PosteriorFeatures(NamedTuple):
    """A classifier whose class posteriors are features of an image, beside those that it reads."""

    rows: Tensor  # (c, v), its weights; a bias changes nothing measurable
    direction: Tensor  # (v,) of unit length, of the mean feature of images

    def features(self, images: Tensor) -> Tensor:
        """Features (…, v) of unit length without the direction, then powers of the posteriors: (…, v + c)."""
        powers = (POSTERIOR_POWER * (images @ self.rows.mT).log_softmax(dim=-1)).exp()
        return torch.cat([normalize(without(images, self.direction), dim=-1), powers], dim=-1)

    def class_features(self) -> Tensor:
        """Features (c, v + c) of the classes: an image that is nothing else, at the row of its class."""
        # A classifier's rows are known up to a common vector, which softmax ignores.
        centers = normalize(without(self.rows - self.rows.mean(dim=0), self.direction), dim=-1)
        return torch.cat([centers, torch.eye(len(centers)).to(centers)], dim=1)


class Heads(NamedTuple):
    """Two projections without biases into one space, where the cosine compares images and texts."""

    image: Tensor  # (k, v), or of a classifier's features (k, v + c)
    text: Tensor  # (k, w)
    classifier: PosteriorFeatures | None = None
    neighbors: Neighbors | None = None

    def embed_images(self, images: Tensor) -> Tensor:
        """Features of images (n, v) in the shared space, (n, k) of length 1."""
        features = images
        if self.classifier is not None:
            features = self.classifier.features(images)
        projected = normalize(features @ self.image.mT, dim=-1)
        if self.neighbors is None:
            return projected
        return self.neighbors.extend(self.neighbors.images, images, projected)

    def embed_texts(self, texts: Tensor) -> Tensor:
        """Features of texts (m, w) in the shared space, (m, k) of length 1."""
        projected = normalize(texts @ self.text.mT, dim=-1)
        if self.neighbors is None:
            return projected
        return self.neighbors.extend(self.neighbors.texts, texts, projected)

    def similarities(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines of images (n, v) and texts (m, w), (n, m)."""
        return self.embed_images(images) @ self.embed_texts(texts).mT

    def to(self, other: Tensor) -> "Heads":
        """The heads in the type and on the device of a tensor."""
        classifier = self.classifier
        if classifier is not None:
            classifier = PosteriorFeatures(*(part.to(other) for part in classifier))
        return Heads(self.image.to(other), self.text.to(other), classifier, self.neighbors)


class RegressionRows(NamedTuple):
    """Images and the texts of each with weights: first the images of pairs, then a classifier's classes."""

    images: Tensor  # (i, v), of unit length without the direction, or with posteriors (i, v + c)
    texts: Tensor  # (r, w)
    owners: Tensor  # (r,) int64, the image of each text
    weights: Tensor  # (r,) float64
    direction: Tensor  # (v,), see `centered`
    classifier: PosteriorFeatures | None = None


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
    y = rows.texts.double()
    y, y_mean = centered(y, weights @ y)
    known = moments(rows.images, y, rows.owners, weights)
    return [
        raw_heads(rows.direction, y_mean, rows.classifier, *solve_one(known, form))
        for form in forms
    ]


def raw_heads(
    x_mean: Tensor, y_mean: Tensor, known: PosteriorFeatures | None, image: Tensor, text: Tensor
) -> Heads:
    """Heads of features that are not centered, from those of centered ones and the directions of both means."""
    own = len(x_mean)
    # Equal features have no variance in the mean's direction, others have: it must stay ignored.
    image = torch.cat([without(image[:, :own], x_mean), image[:, own:]], dim=1)
    return Heads(image, without(text, y_mean), known)


def mix(start: Heads, end: Heads, alpha: float) -> Heads:
    """Heads of (1 - alpha) · start + alpha · end, as maps of image features to text features of norm 1."""
    # Without weight the posteriors have no columns
    width = max(heads.image.shape[1] for heads in (start, end))
    products = (
        pad(heads.image.double(), (0, width - heads.image.shape[1])).mT @ heads.text.double()
        for heads in (start, end)
    )
    first, last = (normalize(each, dim=(0, 1)) for each in products)  # type: ignore[arg-type]  # it takes several
    return Heads(*split_product(torch.lerp(first, last, alpha)), end.classifier or start.classifier)


def centered(features: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, v) of unit length without the direction of a mean (v,); that too."""
    direction = normalize(mean.to(features), dim=0)
    return normalize(without(features, direction), dim=-1), direction


def without(rows: Tensor, direction: Tensor) -> Tensor:
    """Rows (…, v) without their part in a direction (v,) of unit length."""
    return rows - (rows @ direction)[..., None] * direction


def moments(x: Tensor, y: Tensor, owners: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Sums of x xᵀ, y yᵀ and x yᵀ over weighted texts (r, w) and their images, rows of (i, v): (v, v), (w, w), (v, w).

    The plain loop::

        for text, owner, weight in zip(y, owners, weights):
            xx, yy, xy = (sum_ + weight * outer for sum_, outer in ...)
    """
    weighted = y * weights[:, None]
    shares = x.new_zeros(len(x)).index_add(0, owners, weights)
    of_images = y.new_zeros(len(x), y.shape[1]).index_add(0, owners, weighted)  # each image's texts
    # In parts, as a weighted copy of all images would take as much memory as they do
    squares = sum(
        (part * own[:, None]).mT @ part
        for part, own in zip(x.split(ROWS), shares.split(ROWS), strict=True)
    )
    return x.new_zeros(x.shape[1], x.shape[1]) + squares, weighted.mT @ y, x.mT @ of_images


def solve(
    moments: tuple[Tensor, ...], forms: tuple[Form, ...], widths: tuple[int, int] | None = None
) -> tuple[Sides, list[Sides]]:
    """Principal axes, (v, v) and (w, w), and projections (k, v) and (k, w) of features in these axes by each form.

    A ridge refers to the mean variance of `widths` directions, by default all.
    """
    *sides, crossed = moments
    # The dominant cost: O(v³)
    (x_variances, x_axes), (y_variances, y_axes) = map(PrincipalAxes.of, sides)
    variances = x_variances, y_variances
    means = [
        side.sum() / width
        for side, width in zip(variances, widths or map(len, variances), strict=True)
    ]
    cross = x_axes.mT @ crossed @ y_axes  # (v, w), in the axes of both sides
    maps = []
    for method, ridge in forms:
        x_damped, y_damped = (
            side + ridge * mean for side, mean in zip(variances, means, strict=True)
        )
        if method == "cca":
            # Equal features have no variance at all: they are left at 0 instead of divided by it.
            x_white, y_white = (
                torch.where(side > 0, side.rsqrt(), 0.0) for side in (x_damped, y_damped)
            )
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
        # Features without any variance, as of one pair, have products of 0 and no variance to divide them by.
        least = torch.finfo(cross.dtype).tiny
        sloped = x_cross / x_damped.clamp(min=least)[:, None], y_cross / y_damped.clamp(min=least)
        units = [normalize(slope.flatten(), dim=0) for slope in sloped]
        maps.append(split_product((units[0] + units[1]).view_as(cross)))
    return (x_axes, y_axes), maps


def solve_one(
    moments: tuple[Tensor, ...], form: Form, widths: tuple[int, int] | None = None
) -> Sides:
    """Projections (k, v) and (k, w) by one form: as `solve`, by Cholesky factors, a tenth of the time of axes."""
    *sides, crossed = moments
    penalties = [
        form.ridge * side.trace() / width
        for side, width in zip(sides, widths or map(len, sides), strict=True)
    ]
    # Features without any variance, as of one pair, have factors that are not 0.
    least = torch.finfo(crossed.dtype).tiny ** 0.5
    x, y = (
        torch.linalg.cholesky(side + penalty.clamp(min=least) * torch.eye(len(side)).to(side))
        for side, penalty in zip(sides, penalties, strict=True)
    )
    if form.method == "cca":
        whitened = torch.linalg.solve_triangular(x, crossed, upper=False)
        left, right = split_product(torch.linalg.solve_triangular(y, whitened.mT, upper=False).mT)
        # Whitening by the inverse of a factor or of a symmetric root differs by a rotation, which ends in U and V.
        return tuple(
            torch.linalg.solve_triangular(of, side, upper=False, left=False)
            for of, side in ((x, left), (y, right))
        )
    x_target, y_target = crossed, crossed
    if form.method == "pulled":
        x_target, y_target = (
            crossed
            + penalty
            * (crossed.trace() / side.trace()).clamp(min=LEAST_SLOPE)
            * torch.eye(len(side)).to(side)
            for side, penalty in zip(sides, penalties, strict=True)
        )
    first, second = torch.cholesky_solve(x_target, x), torch.cholesky_solve(y_target.mT, y).mT
    units = [normalize(side.flatten(), dim=0) for side in (first, second)]
    return split_product((units[0] + units[1]).view_as(crossed))


def split_product(product: Tensor) -> Sides:
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


def regression_rows(
    pairs: Pairs,
    classes: ClassPairs | None,
    class_weight: float,
    dtype: torch.dtype = torch.float64,
) -> RegressionRows:
    """Rows of the regression: an image weighs 1, a class `class_weight`, however many texts they have.

    They are computed in float64, a part at a time, and saved as images of `dtype`.
    """
    own, owners, texts = pairs.images, pairs.owners, pairs.texts
    weights = 1 / torch.bincount(owners)[owners].double()
    mean = own.sum(dim=0, dtype=torch.float64)
    if classes is not None:
        mean = mean + OWN_MEAN * classes.mean.double()
    direction, classifier = normalize(mean, dim=0), None
    centers = own.new_empty(0, own.shape[1])
    if classes is not None and class_weight:
        # A classifier's rows are known up to a common vector, which softmax ignores.
        rows = classes.rows.double()
        centers = centered(rows - rows.mean(dim=0), mean)[0]
        if classes.posteriors and len(rows) <= MOST_CLASSES:
            classifier = PosteriorFeatures(rows, direction)
            centers = classifier.class_features()
        texts = torch.cat([texts, classes.texts])
        counts = torch.bincount(classes.owners)[classes.owners].double()
        weights = torch.cat([weights, class_weight / counts])
        owners = torch.cat([owners, len(own) + classes.owners])
    images = torch.empty(len(own) + len(centers), centers.shape[1], dtype=dtype)
    images[len(own) :] = centers
    for part, converted in zip(own.split(ROWS), images[: len(own)].split(ROWS), strict=True):
        features = part.double()
        converted.copy_(
            centered(features, mean)[0] if classifier is None else classifier.features(features)
        )
    return RegressionRows(images, texts, owners, weights, direction, classifier)


def fit_heads(
    pairs: Pairs, classes: ClassPairs | None, class_weight: float, forms: tuple[Form, ...]
) -> list[Heads]:
    """Heads of images and of a classifier's classes, by each form."""
    return closed_form_heads(regression_rows(pairs, classes, class_weight), forms)
