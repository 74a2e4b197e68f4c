"""Few-shot classification in closed form: class names and any number of images per class, on frozen features.

Ridge regression to the classes, in which a name is as many images as cross-validation says (κ). Its penalty leads from
class means compared by cosine (large) to a covariance that all classes share (small).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from declip.evaluation.encode import Encoder
from declip.evaluation.results import Measure, by_class, sample_per_class
from declip.models.dual_encoder import DualEncoder
from declip.models.inference import chunked, inference_tower

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 100.0)  # the last are class means
NAME_WEIGHTS = (0.0, 1.0, 4.0, 16.0)  # κ, in images
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # candidates for the factor of scores before the softmax
FOLDS, FEWEST = 5, 5  # folds, and images per class from which on the settings are chosen
MOST = 1_500  # images that the choice is made on: the classifier is fitted to all
MOST_LEFT_OUT = 50  # classes that are left out, one at a time, for the threshold


class FewShotForm(NamedTuple):
    """The settings that cross-validation chooses."""

    name_weight: float
    ridge: float


# Of fewer images per class, where a choice is 1 to 2 points worse (builtin:stamps-kinds, emoji by category)
DEFAULT_FORM, DEFAULT_SCALE = FewShotForm(4.0, 0.3), 8.0
NO_NAMES = FewShotForm(0.0, 0.3)  # the same where names are no better than chance on the images


class Examples(NamedTuple):
    """Labeled images of the classes with the features of the classes' names; a class may have no image."""

    images: Tensor  # (n, v + d), see `joint_encoder`
    labels: Tensor  # (n,) int64
    names: Tensor  # (C, d) text features of length 1
    width: int  # v, of the features before the projection; 0 if the model has none

    def take(self, rows: Tensor) -> "Examples":
        """Some of the images."""
        return self._replace(images=self.images[rows], labels=self.labels[rows])

    def without(self, label: int) -> "Examples":
        """All but one class; the classes after it move up."""
        kept = self.labels != label
        labels = self.labels[kept] - (self.labels[kept] > label).long()
        names = torch.cat([self.names[:label], self.names[label + 1 :]])
        return self._replace(images=self.images[kept], labels=labels, names=names)


@dataclass(frozen=True)
class FewShotHead:
    """A linear classifier of centered features, with what cross-validation says about it."""

    weight: Tensor  # (C, v + d)
    center: Tensor  # (v + d,)
    width: int  # v
    form: FewShotForm
    scale: float = DEFAULT_SCALE
    accuracy: Measure | None = None  # of images that were left out; None with one image per class or none

    def scores(self, images: Tensor) -> Tensor:
        """(n, C), before the softmax, of features (n, v + d)."""
        return self.scale * joined(images.to(self.weight), self.center, self.form, self.width) @ self.weight.mT


def joint_encoder(model: Encoder) -> tuple[Callable[[Tensor], Tensor], int]:
    """A function from pixels to (n, v + d), features before the projection and embeddings, and the width v."""
    if isinstance(model, DualEncoder):
        tower = inference_tower(model)

        def both(pixels: Tensor) -> Tensor:
            found = tower(pixels.to(next(tower.parameters()).dtype))
            return torch.cat([normalize(part.float(), dim=-1) for part in (found.pre_logits, found.pooled)], dim=-1)

        return lambda pixels: chunked(both, pixels), model.image_tower.proj.weight.shape[1]
    return lambda pixels: chunked(model.encode_image, pixels), 0


def joined(images: Tensor, center: Tensor, form: FewShotForm, width: int) -> Tensor:
    """Centered features of length 1: of both halves, or only those before the projection if names have no weight."""
    halves = [normalize(half, dim=-1) for half in images.split([width, images.shape[1] - width], dim=1)]
    centered = [
        normalize(half - part, dim=-1)
        for half, part in zip(halves, center.split([width, len(center) - width]), strict=True)
    ]
    if width and not form.name_weight:
        centered[1] = torch.zeros_like(centered[1])
    return normalize(torch.cat(centered, dim=1), dim=-1)


def center_of(examples: Examples) -> Tensor:
    """(v + d,), the mean over classes of the mean of their images; zeros without images."""
    images, width = examples.images, examples.width
    if not len(images):
        return torch.zeros(images.shape[1])
    weights = 1 / torch.bincount(examples.labels)[examples.labels]
    halves = torch.cat([normalize(half, dim=-1) for half in images.split([width, images.shape[1] - width], dim=1)], 1)
    return (weights / weights.sum()) @ halves


def fit_heads(examples: Examples, forms: tuple[FewShotForm, ...]) -> list[FewShotHead]:
    """Ridge regression of the classes' indicators on features, by each form.

    With X the images and the names, w their weights (1 in all for a class's images, κ / n for its name) and Y their
    classes minus 1 / C, the weight is the smaller of
        Xᵀ √w (√w X Xᵀ √w + ε I)⁻¹ √w Y        (Xᵀ w X + ε I)⁻¹ Xᵀ w Y
    """
    center, count = center_of(examples), len(examples.names)
    sizes = torch.bincount(examples.labels, minlength=count).clamp(min=1)
    found = dict[FewShotForm, FewShotHead]()
    for kappa in dict.fromkeys(form.name_weight for form in forms):
        # --- rows: images, then names, whose half before the projection is 0
        own = [form for form in forms if form.name_weight == kappa]
        rows, labels = joined(examples.images, center, own[0], examples.width), examples.labels
        weights = 1 / sizes[labels]
        if kappa or not len(rows):
            names = normalize(examples.names - examples.names.mean(dim=0), dim=-1)
            padded = torch.cat(
                [names.new_zeros(count, examples.width), names * (0.5**0.5 if examples.width else 1.0)], dim=1
            )
            # A class without images has the weight of the others
            alone = torch.bincount(labels, minlength=count) == 0
            rows, labels = torch.cat([rows, padded]), torch.cat([labels, torch.arange(count)])
            weights = torch.cat([weights, torch.where(alone, 1 + kappa, kappa / sizes)])
        roots = weights.sqrt()[:, None]
        x, y = rows * roots, (one_hot(labels, count) - 1 / count) * roots
        # --- one decomposition for all penalties
        dual = len(x) < x.shape[1]
        values, axes = torch.linalg.eigh(x @ x.mT if dual else x.mT @ x)
        target = axes.mT @ (y if dual else x.mT @ y)
        for form in own:
            solved = axes @ (target / (values.clamp(min=0) + form.ridge)[:, None])
            found[form] = FewShotHead((x.mT @ solved if dual else solved).mT.contiguous(), center, examples.width, form)
    return [found[form] for form in forms]


def fit_few_shot(examples: Examples, seed: int = 0) -> FewShotHead:
    """Choose settings, scale and accuracy by cross-validation on the images, and fit the settings to all."""
    sizes = np.bincount(examples.labels.numpy(), minlength=len(examples.names))
    forms: tuple[FewShotForm, ...] = (_without_choice(examples),)
    if sizes.max(initial=0) < 2:
        return fit_heads(examples, forms)[0]
    if len(examples.labels) >= FEWEST * (sizes > 0).sum():
        kappas = NAME_WEIGHTS if sizes.all() else NAME_WEIGHTS[1:]
        forms = tuple(FewShotForm(kappa, ridge) for kappa in kappas for ridge in RIDGES)
    some = examples
    if len(examples.labels) > MOST:
        part = MOST / len(examples.labels)
        chosen = sample_per_class(examples.labels.numpy(), lambda count: max(2, round(part * count)), seed)
        some = examples.take(torch.from_numpy(chosen))
    scores = cross_validate(some, forms, seed)  # (forms, n, C)
    losses = torch.stack(
        [(scale * scores).log_softmax(-1)[:, torch.arange(len(some.labels)), some.labels].mean(1) for scale in SCALES]
    )
    scale, number = divmod(int(losses.argmax()), len(forms))
    (head,) = fit_heads(examples, (forms[number],))
    right = float((scores[number].argmax(1) == some.labels).double().mean())
    measure = Measure("examples", right, 1 / len(examples.names), len(some.labels))
    return replace(head, scale=SCALES[scale], accuracy=measure)


def _without_choice(examples: Examples) -> FewShotForm:
    """The default, with names unless these find few of the images: of C images, one is right by chance."""
    if not len(examples.labels):
        return DEFAULT_FORM
    (names,) = fit_heads(examples.take(torch.empty(0, dtype=torch.int64)), (DEFAULT_FORM,))
    names = replace(names, center=center_of(examples))
    right = int((names.scores(examples.images).argmax(1) == examples.labels).sum())
    expected = len(examples.labels) / len(examples.names)
    complete = len(examples.labels.unique()) == len(examples.names)
    return NO_NAMES if complete and right <= expected + expected**0.5 else DEFAULT_FORM


def cross_validate(examples: Examples, forms: tuple[FewShotForm, ...], seed: int = 0) -> Tensor:
    """(forms, n, C), the scores of each image by heads that have not seen its fold; all classes are in all folds."""
    labels = examples.labels.numpy()
    rng, folds = np.random.default_rng(seed), np.zeros(len(labels), np.int64)
    for rows in by_class(labels):
        folds[rng.permutation(rows)] = np.arange(len(rows)) % FOLDS
    scores = torch.empty(len(forms), len(labels), len(examples.names))
    for fold in np.unique(folds):
        out = torch.from_numpy(folds == fold)
        for number, head in enumerate(fit_heads(examples.take(~out), forms)):
            scores[number, out] = replace(head, scale=1.0).scores(examples.images[out])
    return scores


@dataclass(frozen=True)
class Rejection:
    """A threshold below which an image is of none of the classes, by leaving classes out."""

    threshold: float  # of the largest score
    rejected: float  # fraction of the images of left-out classes below it
    lost: float  # fraction of held-out images of the classes below it
    auroc: float  # of images of left-out classes and of the classes


def choose_threshold(examples: Examples, head: FewShotHead, seed: int = 0) -> Rejection:
    """Choose the threshold with the largest difference of `rejected` and `lost`."""
    present = examples.labels.unique().tolist()
    left_out = np.random.default_rng(seed).permutation(present)[:MOST_LEFT_OUT]
    outside = list[Tensor]()
    for label in left_out.tolist():
        (other,) = fit_heads(examples.without(label), (head.form,))
        outside.append(replace(other, scale=head.scale).scores(examples.images[examples.labels == label]).amax(1))
    strangers = torch.cat(outside)
    own = head.scale * cross_validate(examples, (head.form,), seed)[0].amax(1)
    values, order = torch.cat([own, strangers]).sort()
    is_own = order < len(own)
    lost, rejected = (mask.double().cumsum(0) / mask.sum() for mask in (is_own, ~is_own))
    best = int((rejected - lost).argmax())
    auroc = float((own[:, None] > strangers).double().mean() + 0.5 * (own[:, None] == strangers).double().mean())
    return Rejection(float(values[best]), float(rejected[best]), float(lost[best]), auroc)
