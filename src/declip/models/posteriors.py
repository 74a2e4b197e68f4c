"""A projection into the shared space of features and class posteriors."""

import torch
from torch import Tensor, nn

from declip.closed_form.regression import PosteriorFeatures, project_out


class PosteriorProjection(nn.Module):
    """A linear map of a pooled feature and of powers of its class posteriors: see `PosteriorFeatures.features`."""

    bias = None
    classes: Tensor
    direction: Tensor

    def __init__(self, width: int, classes: int, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embed_dim, width + classes))
        nn.init.normal_(self.weight, std=width**-0.5)
        self.register_buffer("classes", torch.zeros(classes, width))
        self.register_buffer("direction", torch.zeros(width))

    def forward(self, pooled: Tensor) -> Tensor:
        """Project pooled features (…, width) into the shared space, (…, d)."""
        features = PosteriorFeatures(self.classes, self.direction).features(pooled)
        return features @ self.weight.mT

    def embed_classes(self) -> Tensor:
        """Project the classes into the shared space, (c, d)."""
        features = PosteriorFeatures(self.classes, self.direction).class_features()
        return features @ self.weight.mT

    def linear(self) -> nn.Linear:
        """The projection without the posteriors: about as good as one that was fitted without them."""
        width = len(self.direction)
        linear = nn.Linear(width, len(self.weight), bias=False)
        # Training may add a part in the direction, which `forward` does not see.
        weight = project_out(self.weight[:, :width].detach(), self.direction)
        linear.weight = nn.Parameter(weight)
        return linear.to(self.weight)
