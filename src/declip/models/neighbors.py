"""A projection into the shared space that compares with known pairs too."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from declip.closed_form.neighbors import Neighbors, Side
from declip.models.posteriors import PosteriorProjection
from declip.models.tensor_names import add_prefix, named_below

INNER = "projection."


class NeighborProjection(nn.Module):
    """A projection, extended by which known pairs a pooled feature resembles: see `Neighbors`.

    It computes in float32, as cosines with many anchors are compared.

    Args:
        projection: Of a pooled feature (…, v) into (…, k).
        anchors: Number of known pairs and classes, a.
        classes: Number of classes at their end, c.
        embed_dim: Of the shared space, d.
    """

    bias = None
    anchors: Tensor
    mean: Tensor
    weights: Tensor
    axes: Tensor

    def __init__(
        self, projection: nn.Module, anchors: int, width: int, axes: tuple[int, int]
    ) -> None:
        super().__init__()
        self.projection = projection
        self.register_buffer("anchors", torch.zeros(anchors, width))  # (a, v)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("weights", torch.zeros(2))
        self.register_buffer("axes", torch.zeros(*axes))  # (k + a + c, d)

    def forward(self, pooled: Tensor) -> Tensor:
        """Project pooled features (n, v) into the shared space, (n, d) of length 1."""
        pooled = pooled.float()
        return self._extended(pooled, self.projection(pooled))

    def _extended(self, pooled: Tensor, projected: Tensor) -> Tensor:
        classes = len(self.axes) - projected.shape[-1] - len(self.anchors)
        related = self.side.features(pooled, classes, self.weights)
        joined = torch.cat([normalize(projected, dim=-1), related], dim=-1)
        return normalize(joined @ self.axes, dim=-1)

    @property
    def side(self) -> Side:
        """The anchors, to ask which of them a pooled feature resembles.

        By `Side.nearest` or `both_resemble`; `FittedRun.known` has their keys and captions.
        """
        return Side(self.anchors, self.mean)

    @property
    def classes(self) -> Tensor:
        """Rows of the classifier, (c, v), if the projection has one."""
        return self._posteriors.classes

    def embed_classes(self) -> Tensor:
        """Embed the classes of the classifier, (c, d)."""
        embedded = self._posteriors.embed_classes()
        centers = self.classes - self.classes.mean(dim=0)
        return self._extended(centers + self.mean, embedded)

    def linear(self) -> nn.Linear:
        """The projection without neighbors, and without class posteriors."""
        if isinstance(self.projection, nn.Linear):
            return self.projection
        return self._posteriors.linear()

    @property
    def _posteriors(self) -> PosteriorProjection:
        assert isinstance(self.projection, PosteriorProjection)
        return self.projection


def neighbor_tensors(own: Mapping[str, Tensor], side: Side, known: Neighbors) -> dict[str, Tensor]:
    """The tensors of a projection of one side, `own`, as those of a `NeighborProjection`."""
    assert known.axes is not None, "a saved model has as many dimensions as its axes"
    inner = {name: tensor for name, tensor in own.items() if name != "bias"}
    return {
        **add_prefix(INNER, inner),
        "anchors": side.anchors,
        "mean": side.mean,
        "weights": known.weights,
        "axes": known.axes,
    }


def matching_projection(usual: nn.Module, tensors: Mapping[str, Tensor], width: int) -> nn.Module:
    """The kind of projection of pooled features (…, width) that can hold tensors, by their names in it.

    With neighbors, with class posteriors, linear in place of an identity, or the usual one.
    """
    anchors = tensors.get("anchors")
    axes = tensors.get("axes")
    inner = named_below(INNER, tensors)
    if anchors is not None and axes is not None and axes.ndim == 2 and "weight" in inner:
        linear = nn.Linear(width, len(inner["weight"]), bias="bias" in inner)
        projection = matching_projection(linear, inner, width)
        size = axes.shape[0], axes.shape[1]
        return NeighborProjection(projection, len(anchors), width, size)
    classes = tensors.get("classes")
    if classes is not None and classes.shape[1:] == (width,) and "weight" in tensors:
        return PosteriorProjection(width, len(classes), len(tensors["weight"]))
    weight = tensors.get("weight")
    if isinstance(usual, nn.Identity) and weight is not None and weight.ndim == 2:
        return nn.Linear(width, len(weight), bias="bias" in tensors)
    return usual
