"""Rows of the regression between images and texts: pairs, and a classifier's classes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.closed_form.pairs import ClassPairs, Pairs, class_centers

ROWS = 8_192  # images that are converted at a time
OWN_MEAN = 10  # training images that weigh as much as the start's mean feature
# Of class posteriors as features. 0.5 costs half a point of R@10 with 31 emoji and icons, whose
# classes are unsure and where small powers have a length; 1 costs a point of R@1 on clip art
# (benchmarks/results/few/posteriors.jsonl).
POSTERIOR_POWER = 0.7
# Whose posteriors are features: the time of a fit grows with the cube of their number
MOST_CLASSES = 2_000


class PosteriorFeatures(NamedTuple):
    """A classifier whose class posteriors are appended to the features that it reads."""

    rows: Tensor  # (c, v), its weights; a bias changes nothing measurable
    direction: Tensor  # (v,) of unit length, of the mean feature of images

    def features(self, images: Tensor) -> Tensor:
        """Features (…, v) of unit length without the direction, then powers of the posteriors.

        (…, v + c).
        """
        own = without_direction(images, self.direction)
        logits = images @ self.rows.mT
        log_posteriors = logits.log_softmax(dim=-1)
        powers = (POSTERIOR_POWER * log_posteriors).exp()
        return torch.cat([own, powers], dim=-1)

    def class_features(self) -> Tensor:
        """Features (c, v + c) of the classes: of an image at the class's center that is certain."""
        centers = without_direction(class_centers(self.rows), self.direction)
        certain = torch.eye(len(centers)).to(centers)
        return torch.cat([centers, certain], dim=1)


class RegressionRows(NamedTuple):
    """Images and the texts of each with weights: of pairs, then of a classifier's classes."""

    images: Tensor  # (i, v), of unit length without the direction, or with posteriors (i, v + c)
    texts: Tensor  # (r, w)
    owners: Tensor  # (r,) int64, the image of each text
    weights: Tensor  # (r,) float64
    direction: Tensor  # (v,), see `centered`
    classifier: PosteriorFeatures | None = None


class Moments(NamedTuple):
    """Sums of products of features over weighted texts and their images."""

    images: Tensor  # (v, v)
    texts: Tensor  # (w, w)
    crossed: Tensor  # (v, w)

    def plus(self, other: "Moments") -> "Moments":
        """The sums over the texts of both."""
        return Moments(*map(torch.add, self, other))


def regression_rows(
    pairs: Pairs,
    classes: ClassPairs | None,
    class_weight: float,
    dtype: torch.dtype = torch.float64,
) -> RegressionRows:
    """Rows of the regression: an image weighs 1, a class `class_weight`, whatever its texts.

    They are computed in float64, a part at a time, and saved as images of `dtype`.
    """
    own = pairs.images
    count = len(own)
    texts = pairs.texts
    owners = pairs.owners
    weights = 1 / torch.bincount(owners)[owners].double()
    mean = own.sum(dim=0, dtype=torch.float64)
    if classes is not None:
        mean = mean + OWN_MEAN * classes.mean.double()
    direction = normalize(mean, dim=0)
    classifier = None
    centers = own.new_empty(0, own.shape[1])
    if classes is not None and class_weight:
        rows = classes.rows.double()
        centers = without_direction(class_centers(rows), direction)
        if classes.posteriors and len(rows) <= MOST_CLASSES:
            classifier = PosteriorFeatures(rows, direction)
            centers = classifier.class_features()
        texts = torch.cat([texts, classes.texts])
        counts = torch.bincount(classes.owners)[classes.owners].double()
        weights = torch.cat([weights, class_weight / counts])
        owners = torch.cat([owners, count + classes.owners])
    images = torch.empty(count + len(centers), centers.shape[1], dtype=dtype)
    images[count:] = centers
    for part, converted in zip(own.split(ROWS), images[:count].split(ROWS), strict=True):
        features = part.double()
        if classifier is None:
            converted.copy_(without_direction(features, direction))
        else:
            converted.copy_(classifier.features(features))
    return RegressionRows(images, texts, owners, weights, direction, classifier)


def centered(features: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, v) of unit length without the direction of a mean (v,), and that direction."""
    direction = normalize(mean.to(features), dim=0)
    return without_direction(features, direction), direction


def without_direction(features: Tensor, direction: Tensor) -> Tensor:
    """Features (…, v) without their part in a direction (v,), then scaled to unit length."""
    return normalize(project_out(features, direction), dim=-1)


def project_out(rows: Tensor, direction: Tensor) -> Tensor:
    """Rows (…, v) without their part in a direction (v,) of unit length."""
    lengths = rows @ direction
    return rows - lengths[..., None] * direction


def moments(x: Tensor, y: Tensor, owners: Tensor, weights: Tensor) -> Moments:
    """Sums of x xᵀ, y yᵀ and x yᵀ over weighted texts (r, w) and their images, rows of (i, v).

    The plain loop::

        for text, owner, weight in zip(y, owners, weights):
            xx, yy, xy = (sum_ + weight * outer for sum_, outer in ...)
    """
    weighted = y * weights[:, None]
    shares = x.new_zeros(len(x)).index_add(0, owners, weights)
    of_images = y.new_zeros(len(x), y.shape[1]).index_add(0, owners, weighted)  # each image's texts
    # In parts, as a weighted copy of all images would take as much memory as they do
    squares = x.new_zeros(x.shape[1], x.shape[1])
    for part, own in zip(x.split(ROWS), shares.split(ROWS), strict=True):
        weighted_part = part * own[:, None]
        squares = squares + weighted_part.mT @ part
    return Moments(squares, weighted.mT @ y, x.mT @ of_images)
