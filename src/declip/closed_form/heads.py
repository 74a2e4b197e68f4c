"""Heads: two projections of frozen towers' features into one space."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from declip.closed_form.neighbors import Neighbors
from declip.closed_form.pairs import ClassPairs, Pairs
from declip.closed_form.regression import (
    PosteriorFeatures,
    RegressionRows,
    centered,
    moments,
    project_out,
    regression_rows,
)
from declip.closed_form.solve import Form, of_length_1, solve_one, split_product


class Heads(NamedTuple):
    """Two projections without biases into one space, where the cosine compares."""

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
        image = self.image.to(other)
        text = self.text.to(other)
        return Heads(image, text, classifier, self.neighbors)


def fit_heads(pairs: Pairs, classes: ClassPairs | None, class_weight: float, form: Form) -> Heads:
    """Heads of pairs and of a classifier's classes, by one form.

    With X and Y the features without the direction of their mean, scaled to unit length, and Ω the
    weights,
        R₁ = (XᵀΩX + εₓI)⁻¹ XᵀΩY        R₂ = (YᵀΩY + εᵧI)⁻¹ YᵀΩX
        M = R₁/‖R₁‖ + R₂ᵀ/‖R₂‖ = U diag(s) Vᵀ
    the projections of "ridge" are √s Uᵀ and √s Vᵀ: the product of an image's and a text's
    projection is xᵀ M y. Those of "cca" whiten both sides first (CSA, arXiv 2410.07610, with √s
    where the paper has s in the cosine):
        Wₓ = (XᵀΩX + εₓI)^-½        Wᵧ = (YᵀΩY + εᵧI)^-½        Wₓ XᵀΩY Wᵧ = U diag(s) Vᵀ
    and are √s UᵀWₓ and √s VᵀWᵧ. Projections without a bias cannot subtract a mean, so they ignore
    its direction.

    "pulled" is for embeddings of a model that has projections: ridge regression towards them (the
    penalty of ProLIP, arXiv 2410.05270), as all of its space is kept where the ridge is large:
        R₁ = (XᵀΩX + εₓI)⁻¹ (XᵀΩY + εₓ cₓ I)        cₓ = tr(XᵀΩY) / tr(XᵀΩX)
    and R₂ with X and Y exchanged.
    """
    rows = regression_rows(pairs, classes, class_weight)
    return regression_heads(rows, form)


def regression_heads(rows: RegressionRows, form: Form) -> Heads:
    """Heads of the rows of a regression."""
    weights = (rows.weights / rows.weights.sum()).double()
    y = rows.texts.double()
    y, y_mean = centered(y, weights @ y)
    known = moments(rows.images, y, rows.owners, weights)
    image, text = solve_one(known, form)
    return raw_heads(rows.direction, y_mean, rows.classifier, image, text)


def raw_heads(
    x_mean: Tensor, y_mean: Tensor, known: PosteriorFeatures | None, image: Tensor, text: Tensor
) -> Heads:
    """Heads of features that are not centered, from those of centered ones and both means."""
    own = len(x_mean)
    # Equal features have no variance in the mean's direction, others have: it must stay ignored.
    of_features = project_out(image[:, :own], x_mean)
    image = torch.cat([of_features, image[:, own:]], dim=1)
    text = project_out(text, y_mean)
    return Heads(image, text, known)


def mix(start: Heads, end: Heads, alpha: float) -> Heads:
    """Heads of (1 - alpha) · start + alpha · end, as maps of image features to text features.

    Both maps have norm 1.
    """
    width = max(start.image.shape[1], end.image.shape[1])
    first = _map_of_length_1(start, width)
    last = _map_of_length_1(end, width)
    image, text = split_product(torch.lerp(first, last, alpha))
    return Heads(image, text, end.classifier or start.classifier)


def _map_of_length_1(heads: Heads, width: int) -> Tensor:
    # Heads of classes without weight have no columns for their posteriors
    missing = width - heads.image.shape[1]
    image = pad(heads.image.double(), (0, missing))
    return of_length_1(image.mT @ heads.text.double())
