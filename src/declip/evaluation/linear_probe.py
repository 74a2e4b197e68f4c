"""Linear probes: logistic regression with scikit-learn's objective on frozen features, minimized by SciPy's L-BFGS."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from declip.closed_form.axes import PrincipalAxes
from declip.data.pair import PairSource
from declip.errors import UserError
from declip.evaluation.datasets import Dataset, LabeledSource, with_classes
from declip.evaluation.encode import SourceFeatures
from declip.evaluation.results import LinearProbeResult, sample_per_class, score

BLOCK = 1 << 22  # scores in memory at a time
# iterations after which the curvature is estimated again, and the fit ends
FIRST_STAGE = 20
MOST = 1000
SAMPLE = 4096  # least number of rows for the estimates of curvature and covariance, which set step lengths only
LAST_STEP = 48  # C is 10 ** (step / 8), from 1e-6 to 1e6 in 96 equal steps of its logarithm


class Labeled(NamedTuple):
    """Features (n, width) float32 with their classes (n,) int64, on the CPU."""

    features: Tensor
    labels: Tensor

    def take(self, rows: np.ndarray) -> "Labeled":
        """Select rows."""
        return Labeled(self.features[rows], self.labels[rows])


@dataclass(frozen=True)
class LogisticFit:
    """A fitted linear classifier of the K classes that have training images, on the device of the problem."""

    weight: Tensor  # (K, d) float64
    bias: Tensor  # (K,) float64
    present: Tensor  # (K,) int64, the class of each row, ascending
    C: float  # inverse strength of the penalty, scikit-learn's
    iterations: int
    converged: bool

    def scores(self, features: Tensor) -> Tensor:
        """Logits (n, K) of features (n, d)."""
        features = features.to(self.weight.device)
        weight = self.weight.to(features)
        return torch.addmm(self.bias.to(features), features, weight.T)

    def measure(self, rows: Labeled) -> tuple[np.ndarray, float]:
        """Whether each row is correct, (n,) bool, NaN never; and the mean loss of the rows of fitted classes."""
        labels = rows.labels.to(self.present.device)
        known = torch.isin(labels, self.present)
        targets = torch.searchsorted(self.present, labels).where(known, -1)
        size = max(1, BLOCK // len(self.present))
        right = []
        total = 0.0
        for part, wanted in zip(rows.features.split(size), targets.split(size), strict=True):
            scores = self.scores(part)
            best = scores.max(1)
            right.append((best.indices == wanted) & ~best.values.isnan())
            total += float(cross_entropy(scores, wanted, ignore_index=-1, reduction="sum"))
        mean = total / max(1, int(known.sum()))
        return torch.cat(right).cpu().numpy(), mean


class LogisticProblem:
    """Features and labels, prepared once for fits with any number of values of C.

    The objective is that of scikit-learn's `LogisticRegression`, divided by n, which has the same minimum::

        sum(cross_entropy(X[i] @ W.T + b, y[i]) for i in range(n)) / n + (W ** 2).sum() / (2 * C * n)

    With two classes scikit-learn has one vector w = W[1] - W[0] with the penalty w ** 2 / (2 C). At the minimum
    W[0] = -W[1], so that C is halved here.

    L-BFGS works in coordinates in which the loss has about the same curvature in every direction, which keeps the
    minimum and saves most iterations: the Hessian is nearly k S + I / (C n), with the covariance S of the features and
    the curvature k of the softmax (Böhning 1992, "Multinomial logistic regression algorithm").

    Args:
        features: (n, d); scores have their dtype, but losses and weights are always float64.
        labels: (n,) int64. Classes without a row are never predicted.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, device: torch.device | str = "cpu"
    ) -> None:
        present, compact = labels.unique(return_inverse=True)
        if len(present) < 2:
            raise UserError(
                f"A probe needs at least two classes; these {len(labels):,} images are of 1."
            )
        self.present = present.to(device)
        self.labels = compact.to(device)
        features = features.to(device)
        mean = features.mean(0, dtype=torch.float64).to(features)
        if not bool(mean.isfinite().all()):
            raise UserError(
                "Some features are infinite or not a number, so no probe can be fitted on them."
            )
        self.mean = mean.double()
        centered = features - mean
        # (sample, d) for the covariance, whose axes and spreads are those of the coordinates
        stride = max(1, len(labels) // max(SAMPLE, 8 * len(mean)))
        sample = centered[::stride].double()
        covariance = sample.T @ sample / len(sample)
        spread, self.axes = PrincipalAxes.of(covariance)
        # (n, d + 1) on the axes of the covariance. The bias is the weight of a last column of ones.
        rotated = centered @ self.axes.to(centered)
        ones = centered.new_ones(len(labels), 1)
        self.rows = torch.cat([rotated, ones], 1)
        self.spread = torch.cat([spread, spread.new_ones(1)])

    def fit(
        self, C: float, *, start: LogisticFit | None = None, tolerance: float = 1e-10
    ) -> LogisticFit:
        """Find the minimum for one C by L-BFGS, from the fit with another C or from zero.

        It ends when an iteration lowers the loss by less than the tolerance, a fraction of the loss.
        """
        from scipy.optimize import minimize  # half a second, which other tasks need not wait for

        vectors = 2 if len(self.present) == 2 else 1
        penalty = torch.full_like(self.spread, vectors / (C * len(self.labels)))
        penalty[-1] = 0
        weight = self.spread.new_zeros(len(self.present), len(self.spread))  # (K, d + 1)
        if start is not None:
            begun = start.weight.to(weight)
            bias = start.bias.to(weight) + begun @ self.mean
            weight = torch.cat([begun @ self.axes, bias.unsqueeze(1)], 1)
        # The curvature at the start is that of other weights, so it is estimated again after some iterations.
        done = 0
        for allowed in (FIRST_STAGE, MOST):
            curvatures = self._curvature(weight) * self.spread + penalty
            lengths = curvatures.rsqrt()
            options = {"maxiter": allowed - done, "maxfun": 2 * MOST, "gtol": 0, "ftol": tolerance}
            begin = (weight / lengths).flatten().cpu().numpy()
            result = minimize(
                self._loss, begin, (lengths, penalty), jac=True, method="L-BFGS-B", options=options
            )
            steps = torch.from_numpy(result.x).to(weight)
            weight = steps.view_as(weight) * lengths
            done = done + int(result.nit)
        # --- back from the coordinates to the features
        rotated = weight[:, :-1] @ self.axes.T
        bias = weight[:, -1] - rotated @ self.mean
        # Rounding may end the line search before the tolerance is reached, so the gradient is looked at too.
        steepest = float(abs(result.jac).max())
        converged = done < MOST and steepest <= 0.01 * result.fun**0.5
        return LogisticFit(rotated, bias, self.present, C, done, converged)

    @torch.enable_grad()
    def _loss(
        self, steps: np.ndarray, lengths: Tensor, penalty: Tensor
    ) -> tuple[float, np.ndarray]:
        """The penalized mean loss and its gradient, block by block; a weight is a step times its length."""
        weight = torch.from_numpy(steps).to(lengths).view(-1, len(lengths))
        weight = (weight * lengths).requires_grad_()
        total = 0.5 * (penalty * weight.square()).sum()
        total.backward()
        total = total.detach()
        size = max(1, BLOCK // len(weight))
        for features, labels in zip(self.rows.split(size), self.labels.split(size), strict=True):
            # float64 before the softmax: 1 - p would lose all digits where p is nearly 1.
            scores = (features @ weight.to(features).T).double()
            part = cross_entropy(scores, labels, reduction="sum") / len(self.labels)
            part.backward()
            total += part.detach()
        assert weight.grad is not None
        gradient = weight.grad * lengths
        return float(total), gradient.flatten().cpu().numpy()

    def _curvature(self, weight: Tensor) -> float:
        """The curvature of the softmax, on a sample of the rows."""
        stride = max(1, len(self.labels) // SAMPLE)
        rows = self.rows[::stride]
        scores = rows @ weight.to(rows).T
        probabilities = scores.softmax(1)
        variances = probabilities * (1 - probabilities)
        return max(0.3 * float(variances.mean()), 1e-12)


def check_splits(dataset: Dataset, task: str) -> dict[str, LabeledSource]:
    """Open the splits of a dataset; refuse one without training images, or with other classes in a split."""
    if "train" not in dataset.openers:
        raise UserError(
            f"'{dataset.name}' has no train split, which '{task}' requires. Use the task 'zero-shot' or 'retrieval'."
        )
    present = [which for which in ("train", "validation", "test") if which in dataset.openers]
    splits = {which: with_classes(dataset.split(which)) for which in present}
    names = tuple(splits["test"].class_names)
    if any(tuple(source.class_names) != names for source in splits.values()):
        raise UserError(
            f"The splits of '{dataset.name}' need the same {len(names)} class names, in the same order."
        )
    return splits


def check_probe(dataset: Dataset) -> None:
    """Refuse a dataset that cannot be probed, before anything is encoded."""
    splits = check_splits(dataset, "linear")
    names = splits["test"].class_names
    counts = np.bincount(splits["train"].columns["label"], minlength=len(names))
    few = int((counts < 2).sum())
    if few >= len(names) / 2:
        raise UserError(
            f"'{dataset.name}' has fewer than two training images for {few:,} of its {len(names):,} classes: too few "
            "to split into training and validation images, as 'linear' does. Use the task 'zero-shot'."
        )


def linear_probe(
    dataset: Dataset,
    encode: Callable[[PairSource], SourceFeatures],
    device: torch.device | str = "cpu",
) -> LinearProbeResult:
    """Select C on the validation images, fit on training and validation images, evaluate on the test images.

    This is CLIP's protocol (Radford et al. 2021, appendix A.3): features before the projection, not normalized, no
    augmentation, L-BFGS with at most 1,000 iterations. The dataset has passed `check_probe`.
    """
    parts = dict[str, Labeled]()
    skipped = Counter[str]()
    held_out = "validation split"
    for which, source in check_splits(dataset, "linear").items():
        encoded = encode(source)
        labels = np.asarray(source.columns["label"], np.int64)[encoded.indices]
        parts[which] = Labeled(encoded.images, torch.from_numpy(labels))
        skipped.update(encoded.skipped.counts)
    # --- without a validation split: a fifth of each class's training images, with a fixed seed
    if "validation" not in parts:
        held_out = "fifth of train"
        train = parts["train"]
        chosen = sample_per_class(train.labels.numpy(), _fifth)
        parts |= {"validation": train.take(chosen), "train": train.take(~chosen)}
    # --- C, on the training images alone; then the last fit, on training and validation images
    best = sweep(LogisticProblem(*parts["train"], device), parts["validation"], dataset.metric)
    both = parts["train"], parts["validation"]
    features = torch.cat([part.features for part in both])
    labels = torch.cat([part.labels for part in both])
    problem = LogisticProblem(features, labels, device)
    # A class with validation images only adds a row of weights to the last fit.
    same = len(problem.present) == len(best.present)
    fitted = problem.fit(best.C, start=best if same else None)
    # --- the test images
    right, _ = fitted.measure(parts["test"])
    truth = parts["test"].labels.numpy()
    most_frequent = int(labels.bincount().argmax())
    return LinearProbeResult(
        dataset=dataset.name,
        n=len(truth),
        classes=len(source.class_names),
        train=len(labels),
        width=features.shape[1],
        top1=score(right, truth),
        mean_per_class=score(right, truth, "mean_per_class"),
        majority=float((truth == most_frequent).mean()),
        C=best.C,
        validation=held_out,
        converged=fitted.converged,
        skipped=dict(skipped),
    )


def _fifth(count: int) -> int:
    """A fifth of the images of a class; none of a single one."""
    if count < 2:
        return 0
    return max(1, round(count / 5))


def sweep(problem: LogisticProblem, validation: Labeled, metric: str = "top1") -> LogisticFit:
    """Return the fit on the training images with the best score on the validation images, in 15 fits instead of 97.

    This is CLIP's search. Between equal scores the smaller cross-entropy decides, which CLIP leaves open, then the
    smaller C.
    """
    fits = dict[int, LogisticFit]()
    scores = dict[int, tuple[float, float]]()
    # First C = 1e-6, 1e-4, … 1e6, then half-way to the neighbors of the best one, down to an eighth of a decade.
    steps: Iterable[int] = range(-LAST_STEP, LAST_STEP + 1, 16)
    for width in (8, 4, 2, 1, 0):
        for step in steps:
            if abs(step) > LAST_STEP or step in fits:
                continue
            smaller = [known for known in fits if known < step]
            nearest = max(smaller, default=min(fits, default=step))
            fits[step] = problem.fit(10 ** (step / 8), start=fits.get(nearest))
            right, loss = fits[step].measure(validation)
            value = score(right, validation.labels.numpy(), metric)
            scores[step] = value, -np.nan_to_num(loss, nan=np.inf)
        best = max(sorted(scores), key=scores.__getitem__)
        steps = best - width, best + width
    return fits[best]
