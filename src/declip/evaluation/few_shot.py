"""Few-shot classification in closed form: class names and any number of images per class, on frozen features.

Ridge regression to the classes, in which a name counts as κ images. A large penalty gives class means compared by
cosine, a small one linear discriminant analysis. Regressions of several κ and penalties are added, weighted by
cross-validation.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from declip.closed_form.axes import PrincipalAxes
from declip.closed_form.folds import assign_folds
from declip.evaluation.encode import check_widths
from declip.evaluation.results import Measure, by_class, sample_per_class
from declip.models.dual_encoder import DualEncoder
from declip.models.encoder import Encoder
from declip.models.folding import inference_tower
from declip.models.inference import chunked, normalized

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 100.0)  # the last are class means
NAME_WEIGHTS = (0.0, 1.0, 4.0, 16.0)  # κ, in images
# Candidates for the factor of scores before the softmax
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
FOLDS = 5
FEWEST = 2  # images per class from which on the settings are weighted
TEMPERATURE = 4.0  # of the weights: images of a class are not independent
MOST = 1_500  # images that settings are weighted on: the classifier is fitted to all


class FewShotForm(NamedTuple):
    """The settings of one ridge regression."""

    name_weight: float
    ridge: float


Mixture = Mapping[FewShotForm, float]  # the factors of the regressions whose scores are added
DEFAULT_MIXTURE: Mixture = {FewShotForm(4.0, 0.3): 8.0}  # of fewer images per class


class Examples(NamedTuple):
    """Labeled images of the classes with the features of the classes' names; a class may have no image."""

    images: Tensor  # (n, v + d), see `joint_encoder`
    labels: Tensor  # (n,) int64
    names: Tensor  # (C, d) text features of length 1
    width: int  # v, of the features before the projection; 0 if the model has none

    def take(self, rows: Tensor) -> "Examples":
        """Some of the images."""
        return self._replace(images=self.images[rows], labels=self.labels[rows])


@dataclass(frozen=True)
class FewShotHead:
    """A linear classifier of centered features, with what cross-validation says about it."""

    weight: Tensor  # (C, v + d)
    center: Tensor  # (v + d,)
    width: int  # v
    mixture: Mixture
    # Of left-out images; None without two classes of several groups
    accuracy: Measure | None = None
    shots: float = 0.0  # images per class that the regressions of `accuracy` were fitted to
    unmeasured: int = 0  # classes that are not part of `accuracy`: all images are one group

    @property
    def name_weight(self) -> float:
        """The mean κ: as many images as a class's name counts."""
        total = sum(form.name_weight * factor for form, factor in self.mixture.items())
        return total / sum(self.mixture.values())

    def scores(self, images: Tensor) -> Tensor:
        """(n, C), before the softmax, of features (n, v + d)."""
        features = centered(images.to(self.weight), self.center, self.width)
        return features @ self.weight.mT


def joint_encoder(model: Encoder) -> tuple[Callable[[Tensor], Tensor], int]:
    """A function from pixels to (n, v + d), features before the projection and embeddings, and the width v."""
    if isinstance(model, DualEncoder):
        tower = inference_tower(model)

        def both(pixels: Tensor) -> Tensor:
            images = normalized(model, pixels)
            dtype = next(tower.parameters()).dtype
            features = tower(images.to(dtype))
            before = normalize(features.pre_logits.float(), dim=-1)
            embedded = normalize(features.pooled.float(), dim=-1)
            return torch.cat([before, embedded], dim=-1)

        return partial(chunked, both), model.image_tower.pre_logits_width

    def embed(pixels: Tensor) -> Tensor:
        return model.encode_image(normalized(model, pixels))

    return partial(chunked, embed), 0


def halves(images: Tensor, width: int) -> Tensor:
    """(n, v + d), both halves with length 1; of features without negative values, as after a ReLU, the square roots."""
    # Roots are worth half a point of top-1: few large activations count less.
    before, embedded = images.tensor_split([width], dim=1)
    if width:
        rectified = before.amin(dim=1, keepdim=True) >= 0
        before = torch.where(rectified, before.clamp(min=0).sqrt(), before)
    return _join(before, embedded)


def _join(before: Tensor, embedded: Tensor) -> Tensor:
    """(n, v + d), both with length 1."""
    return torch.cat([normalize(before, dim=-1), normalize(embedded, dim=-1)], dim=1)


def centered(images: Tensor, center: Tensor, width: int) -> Tensor:
    """(n, v + d), the directions of both halves from the center."""
    moved = halves(images, width) - center
    return _join(*moved.tensor_split([width], dim=1))


def center_of(examples: Examples) -> Tensor:
    """(v + d,), the mean over classes of the mean of their images; zeros without images."""
    if not len(examples.images):
        return torch.zeros(examples.images.shape[1])
    sizes = torch.bincount(examples.labels)
    weights = 1 / sizes[examples.labels]
    return (weights / weights.sum()) @ halves(examples.images, examples.width)


def fit_forms(
    examples: Examples, center: Tensor, forms: Iterable[FewShotForm]
) -> dict[FewShotForm, Tensor]:
    """Ridge regression of the classes' indicators on features, by each form: weights (C, v + d).

    With X the images and the names, w their weights (1 in all for a class's images, κ / n for its name) and Y their
    classes minus 1 / C, the weight is the smaller of
        Xᵀ √w (√w X Xᵀ √w + ε I)⁻¹ √w Y        (Xᵀ w X + ε I)⁻¹ Xᵀ w Y
    Rows of X have length 1: both halves times √½, or only features before the projection where names have no weight.
    """
    forms = tuple(forms)
    images = centered(examples.images, center, examples.width)
    fitted = dict[FewShotForm, Tensor]()
    for kappa in dict.fromkeys(form.name_weight for form in forms):
        factors = _column_factors(images.shape[1], examples.width, kappa)
        x, y = _weighted_rows(examples, images, factors, kappa)
        # --- one decomposition for all penalties
        chosen = [form for form in forms if form.name_weight == kappa]
        penalties = [form.ridge for form in chosen]
        if len(x) < x.shape[1]:
            duals = PrincipalAxes.of(x @ x.mT).ridge(y, penalties)
            solutions = [x.mT @ dual for dual in duals]
        else:
            solutions = PrincipalAxes.of(x.mT @ x).ridge(x.mT @ y, penalties)
        for form, solution in zip(chosen, solutions, strict=True):
            fitted[form] = solution.mT * factors
    return fitted


def _column_factors(columns: int, width: int, kappa: float) -> Tensor:
    """(v + d,), factors of features; names have nothing in the first `width`, before the projection."""
    factors = torch.ones(columns)
    if width and kappa:
        factors *= 0.5**0.5
    elif width:
        factors[width:] = 0.0
    return factors


def _weighted_rows(
    examples: Examples,
    images: Tensor,
    factors: Tensor,
    kappa: float,
) -> tuple[Tensor, Tensor]:
    """Rows √w X of the images, then of the names, and their classes √w Y."""
    count = len(examples.names)
    numbers = torch.bincount(examples.labels, minlength=count)
    sizes = numbers.clamp(min=1)
    rows = images * factors
    labels = examples.labels
    weights = 1 / sizes[labels]
    if kappa or not len(rows):
        names = normalize(examples.names - examples.names.mean(dim=0), dim=-1)
        before = names.new_zeros(count, examples.width)
        padded = torch.cat([before, names], dim=1) * factors
        # A class without images has the weight of the others
        name_weights = torch.where(numbers == 0, 1 + kappa, kappa / sizes)
        rows = torch.cat([rows, padded])
        labels = torch.cat([labels, torch.arange(count)])
        weights = torch.cat([weights, name_weights])
    roots = weights.sqrt()[:, None]
    targets = one_hot(labels, count) - 1 / count
    return rows * roots, targets * roots


def fit_mixture(examples: Examples, mixture: Mixture) -> FewShotHead:
    """Add the regressions of a mixture: as all are linear in the same features, their sum is one linear classifier."""
    center = center_of(examples)
    weights = fit_forms(examples, center, mixture)
    parts = [factor * weights[form] for form, factor in mixture.items()]
    weight = torch.stack(parts).sum(dim=0)
    return FewShotHead(weight.contiguous(), center, examples.width, mixture)


def fit_few_shot(examples: Examples, groups: np.ndarray | None = None) -> FewShotHead:
    """Weigh settings, and measure the accuracy, by cross-validation on the images; fit the mixture to all.

    Images of equal `groups` (n,) are left out together. A class whose images are all left out
    together is not part of the accuracy, which needs two other classes.
    """
    check_widths(examples.images[:, examples.width :], examples.names)
    count = len(examples.labels)
    if groups is None:
        groups = np.arange(count)
    sizes = np.bincount(examples.labels.numpy(), minlength=len(examples.names))
    with_images = int((sizes > 0).sum())
    if not with_images:
        return fit_mixture(examples, DEFAULT_MIXTURE)
    # --- folds of the images, or of a sample of them
    some = examples
    if count > MOST:
        part = MOST / count
        labels = examples.labels.numpy()
        chosen = sample_per_class(labels, lambda count: max(2, round(part * count)))
        some = examples.take(torch.from_numpy(chosen))
        groups = groups[chosen]
    folds = class_folds(some.labels, groups)
    measured = measured_images(some.labels, folds)
    measured_classes = len(some.labels[measured].unique())
    unmeasured = with_images - measured_classes
    if not measured_classes:
        head = fit_mixture(examples, DEFAULT_MIXTURE)
        return replace(head, unmeasured=unmeasured)
    # --- settings, weighted by scores of images that were left out
    forms = tuple(DEFAULT_MIXTURE)
    if count >= FEWEST * with_images:
        kappas = NAME_WEIGHTS if sizes.all() else NAME_WEIGHTS[1:]
        forms = tuple(FewShotForm(kappa, ridge) for kappa in kappas for ridge in RIDGES)
    scores = cross_validate(some, forms, folds)
    factors = mixture_factors(scores, some.labels)
    mixture = dict(zip(forms, factors.tolist(), strict=True))
    head = replace(fit_mixture(examples, mixture), unmeasured=unmeasured)
    if measured_classes < 2:
        return head
    # --- the accuracy in each fold, by weights from the other folds: those of all folds have seen its images
    right = 0
    fitted = 0
    for fold in folds[measured].unique():
        kept = folds != fold
        out = ~kept & measured
        fold_factors = mixture_factors(scores[:, kept], some.labels[kept])
        mixed = torch.einsum("f,fnc->nc", fold_factors, scores[:, out])
        correct = mixed.argmax(dim=1) == some.labels[out]
        right += int(correct.sum())
        fitted += int(out.sum()) * int(kept.sum())
    tested = int(measured.sum())
    shots = fitted / tested / len(some.labels.unique())
    # Images of one group are not independent: the interval is that of as many images as there are groups.
    independent = len(np.unique(groups[measured.numpy()]))
    accuracy = Measure("examples", right / tested, 1 / len(examples.names), independent)
    return replace(head, accuracy=accuracy, shots=shots)


def measured_images(labels: Tensor, folds: Tensor) -> Tensor:
    """(n,) bool, whether other folds have images of the same class, to learn it from."""
    distinct = torch.stack([labels, folds]).unique(dim=1)
    folds_of_class = torch.bincount(distinct[0])
    return folds_of_class[labels] > 1


def class_folds(labels: Tensor, groups: np.ndarray) -> Tensor:
    """(n,) the fold of each group of images, at random; the groups of each class are spread over all folds."""
    rng = np.random.default_rng(0)
    folds = np.zeros(len(labels), np.int64)
    _, first, numbers = np.unique(groups, return_index=True, return_inverse=True)
    # A group of several classes counts for its first
    classes = labels.numpy()[first][numbers]
    for rows in by_class(classes):
        folds[rows] = assign_folds(groups[rows], FOLDS, rng)
    return torch.from_numpy(folds)


def cross_validate(examples: Examples, forms: Iterable[FewShotForm], folds: Tensor) -> Tensor:
    """(forms, n, C), the scores of each image by regressions that have not seen its fold."""
    forms = tuple(forms)
    scores = torch.empty(len(forms), len(folds), len(examples.names))
    for fold in folds.unique():
        out = folds == fold
        rest = examples.take(~out)
        center = center_of(rest)
        images = centered(examples.images[out], center, examples.width)
        weights = fit_forms(rest, center, forms)
        for number, form in enumerate(forms):
            scores[number, out] = images @ weights[form].mT
    return scores


def mixture_factors(scores: Tensor, labels: Tensor) -> Tensor:
    """(forms,) the factors of a mixture by held-out scores: each form's best scale times its weight by likelihood."""
    count = len(labels)
    images = torch.arange(count)
    likelihoods = list[Tensor]()
    for scale in SCALES:
        logs = (scale * scores).log_softmax(-1)  # (forms, n, C)
        likelihoods.append(logs[:, images, labels].mean(1))
    best = torch.stack(likelihoods).max(dim=0)
    weights = (best.values * count / TEMPERATURE).softmax(0)
    return weights * torch.tensor(SCALES)[best.indices]
