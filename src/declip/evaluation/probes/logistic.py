"""Multinomial logistic regression on features in memory: scikit-learn's optimum, in fewer passes."""

from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from declip.errors import UserError

BLOCK = {"cpu": 1 << 20}
"""Number of scores held at a time, by kind of device."""
OTHER_BLOCK = 1 << 26

FIRST_STAGE = 20
"""Iterations after which the curvature is estimated anew; see `LogisticProblem.fit`."""
CURVATURE_FACTOR = 0.3
"""Factor on the mean of p (1 - p): it suits both the start of a fit and its end, where p is nearer to 0 and 1."""
SAMPLE = 8
"""Rows per feature that the covariance is estimated on, at least."""
ROUNDING = 64 * np.finfo(np.float64).eps
CURVATURE_ROWS = 4096
"""Rows that curvature and loss are estimated on, at least."""


@dataclass(frozen=True)
class Classifier:
    """A fitted linear classifier.

    Attributes:
        weight, bias: (K, d) and (K,) float64, with K classes that had images to fit on.
        present: (K,) int64, the class of each row, ascending.
        C: Inverse strength of the penalty, scikit-learn's.
        loss: Minimum of the mean loss with its penalty.
        converged: Whether the tolerance was reached within the iterations allowed.
    """

    weight: Tensor
    bias: Tensor
    present: Tensor
    C: float
    loss: float
    iterations: int
    converged: bool

    def scores(self, features: Tensor) -> Tensor:
        """Features (n, d) → logits (n, K) in the features' dtype, on the features' device."""
        weight, bias = self.weight.to(features), self.bias.to(features)
        return torch.addmm(bias, features, weight.T)

    def predict(self, features: Tensor) -> Tensor:
        """Features (n, d) → the likeliest class of each row, (n,) int64 on their device; -1 where a score is NaN."""
        rows = max(1, _block(features.device) // len(self.present))
        best = [self.scores(part).max(1) for part in features.split(rows)]
        likeliest = self.present.to(features.device)[torch.cat([part.indices for part in best])]
        return likeliest.where(~torch.cat([part.values for part in best]).isnan(), -1)

    def cross_entropy(self, features: Tensor, labels: Tensor) -> float:
        """Mean loss of the rows (n, d) whose class was fitted, without the penalty; 0 where there is none."""
        known = torch.isin(labels, self.present.to(labels.device))
        features, targets = features[known], torch.searchsorted(self.present.to(labels.device), labels[known])
        rows = max(1, _block(features.device) // len(self.present))
        total = 0.0
        for part, target in zip(features.split(rows), targets.split(rows), strict=True):
            total += float(cross_entropy(self.scores(part), target, reduction="sum"))
        return total / max(1, len(targets))


class LogisticProblem:
    """Features and labels, prepared once for fits with any number of values of C.

    The objective is that of scikit-learn's `LogisticRegression`: the sum of the losses, and the squared weights over
    2 C; the bias is free. Here it is divided by n, which moves no minimum::

        sum(cross_entropy(X[i] @ W.T + b, y[i]) for i in range(n)) / n + (W ** 2).sum() / (2 * C * n)

    With two classes scikit-learn has one vector w = W[1] - W[0] and the penalty w ** 2 / (2 C). At the minimum
    W[0] = -W[1], so that is the same as halving C here, and C is halved.

    Two changes of variables leave the minimum where it is and save most iterations. The features are centered, which
    the bias absorbs. And L-BFGS moves in coordinates in which the loss has about the same curvature in every
    direction: its Hessian is nearly k S + I / (C n), with the features' covariance S and the curvature k of the
    softmax, which is bounded this way by Böhning (1992), "Multinomial logistic regression algorithm".

    Args:
        features: (n, d), any float dtype.
        labels: (n,) int64. Classes without a row are never predicted.
        dtype: dtype of the features and the scores; losses, gradients and weights are always float64.

    Raises:
        UserError: fewer than two classes have a row, or a feature is not finite.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.present, compact = labels.unique(return_inverse=True)
        if len(self.present) < 2:
            raise UserError(f"A probe needs at least two classes; these {len(labels):,} images are of 1.")
        self.labels = compact.to(device)
        self.features = features.to(device, dtype, copy=True)
        mean = self.features.mean(0, dtype=torch.float64).to(dtype)
        self.mean = mean.double()
        if not bool(self.mean.isfinite().all()):
            raise UserError("Some features are infinite or not a number, so no probe can be fitted on them.")
        self.features -= mean
        sample = self.features[:: max(1, len(labels) // (SAMPLE * self.features.shape[1]))]
        spread, self.axes = torch.linalg.eigh((sample.T @ sample).double() / len(sample))
        self.spread = spread.clamp_min(0)

    def fit(
        self, C: float, *, start: Classifier | None = None, tolerance: float = 1e-4, max_iterations: int = 1000
    ) -> Classifier:
        """Find the minimum for one C by L-BFGS.

        The curvature is estimated at the start, and once more after `FIRST_STAGE` iterations.

        Args:
            C: Inverse strength of the penalty, above 0.
            start: A fit with another C to start from; None starts from zero.
            tolerance: Largest entry of the mean loss's gradient in the coordinates above, over the root of the
                loss where that is below 1. Half the gradient's squared length there is about what is left to gain, so
                the default leaves about 1e-7 of the loss. In float32, rounding makes 1e-5 and less useless.
        """
        from scipy.optimize import minimize

        classes, width = len(self.present), self.features.shape[1]
        penalty = (2 if classes == 2 else 1) / (C * len(self.labels))
        weight = torch.zeros(classes, width, dtype=torch.float64, device=self.features.device)
        bias = torch.zeros(classes, dtype=torch.float64, device=self.features.device)
        if start is not None:
            weight += start.weight.to(weight)
            bias += start.bias.to(bias) + weight @ self.mean
        done, loss = 0, 0.0
        for allowed in (min(FIRST_STAGE, max_iterations), max_iterations):
            move, near = self._coordinates(weight, bias, penalty)
            enough = tolerance * min(1.0, near) ** 0.5
            # One thread for scipy's own steps, whose threads would wait for torch's.
            limits = {"maxiter": allowed - done, "maxfun": 2 * max_iterations, "gtol": enough, "ftol": ROUNDING}
            with threadpool_limits(1, user_api="blas"):
                found = minimize(
                    lambda flat, move=move: self._moved_loss(flat, move, penalty),
                    move.back(weight, bias),
                    jac=True,
                    method="L-BFGS-B",
                    options=limits,
                )
            weight, bias = move.there(found.x)
            done, loss = done + int(found.nit), float(found.fun)
            if done >= max_iterations:
                break
        steepest = float(np.abs(found.jac).max())
        return Classifier(
            weight=weight.cpu(),
            bias=(bias - weight @ self.mean).cpu(),
            present=self.present.cpu(),
            C=C,
            loss=loss,
            iterations=done,
            # Rounding may end the line search a little before the tolerance; status 1 is "out of iterations".
            converged=steepest <= (enough if found.status == 1 else 10 * enough),
        )

    def loss(self, weight: Tensor, bias: Tensor, penalty: float) -> tuple[float, Tensor, Tensor]:
        """The mean loss with its penalty, and its gradients (K, d) and (K,) float64, block by block.

        Args:
            bias: For the centered features.
            penalty: 1 / (C n).
        """
        n, total = len(self.labels), torch.zeros((), dtype=torch.float64, device=weight.device)
        weight_sum, bias_sum = torch.zeros_like(weight), torch.zeros_like(bias)
        rows = max(1, _block(weight.device) // len(bias))
        low_weight, low_bias = weight.to(self.features), bias.to(self.features)
        for features, labels in zip(self.features.split(rows), self.labels.split(rows), strict=True):
            scores, right = torch.addmm(low_bias, features, low_weight.T), labels.unsqueeze(1)
            scores -= scores.gather(1, right)
            # Over the other classes alone: 1 - p would lose all digits where p is nearly 1.
            others = scores.scatter_(1, right, -torch.inf).logsumexp(1, keepdim=True)
            losses = softplus(others)
            total += losses.sum(dtype=torch.float64)
            error = scores.sub_(losses).exp_().scatter_(1, right, -others.sigmoid())
            weight_sum += error.T @ features
            bias_sum += error.sum(0, dtype=torch.float64)
        value = total / n + 0.5 * penalty * weight.square().sum()
        return float(value), weight_sum / n + penalty * weight, bias_sum / n

    def _coordinates(self, weight: Tensor, bias: Tensor, penalty: float) -> tuple["_Coordinates", float]:
        """Coordinates in which the loss around these weights has about the same curvature in every direction; the loss.

        Both are estimated on about `CURVATURE_ROWS` rows: they set the step lengths, not the minimum.
        """
        step = max(1, len(self.labels) // CURVATURE_ROWS)
        scores = torch.addmm(bias.to(self.features), self.features[::step], weight.to(self.features).T)
        loss = float(cross_entropy(scores, self.labels[::step]) + 0.5 * penalty * weight.square().sum())
        chances = scores.softmax(1)
        curvature = max(CURVATURE_FACTOR * float((chances * (1 - chances)).mean()), 1e-12)
        lengths = (curvature * self.spread + penalty).rsqrt()
        return _Coordinates(self.axes, lengths, curvature**-0.5), loss

    def _moved_loss(self, flat: np.ndarray, move: "_Coordinates", penalty: float) -> tuple[float, np.ndarray]:
        value, weight, bias = self.loss(*move.there(flat), penalty)
        return value, move.gradient(weight, bias)


@dataclass(frozen=True)
class _Coordinates:
    """Weights as (K, d + 1) steps along the covariance's axes and the bias, each in its own length."""

    axes: Tensor
    lengths: Tensor
    bias_length: float

    def there(self, flat: np.ndarray) -> tuple[Tensor, Tensor]:
        steps = torch.from_numpy(flat).view(-1, len(self.lengths) + 1).to(self.axes.device)
        return (steps[:, :-1] * self.lengths) @ self.axes.T, steps[:, -1] * self.bias_length

    def back(self, weight: Tensor, bias: Tensor) -> np.ndarray:
        steps = torch.cat([weight @ self.axes / self.lengths, bias.unsqueeze(1) / self.bias_length], 1)
        return steps.flatten().cpu().numpy()

    def gradient(self, weight: Tensor, bias: Tensor) -> np.ndarray:
        steps = torch.cat([weight @ self.axes * self.lengths, bias.unsqueeze(1) * self.bias_length], 1)
        return steps.flatten().cpu().numpy()


def _block(device: torch.device) -> int:
    return BLOCK.get(device.type, OTHER_BLOCK)
