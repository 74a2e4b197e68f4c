"""Heads that only training uses: they turn a tower's features into what a loss compares.

Heads with batch norm must see each view alone: call them once per view, with at least 2 rows in training.
"""

from torch import Tensor, nn


class SimCLRHead(nn.Module):
    """SLIP's head on the image features (arXiv 2112.12750): three linear layers, batch norm and ReLU after two."""

    def __init__(self, width: int, hidden: int = 4096, out: int = 256) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.norm1 = nn.BatchNorm1d(hidden)
        self.linear2 = nn.Linear(hidden, hidden)
        self.norm2 = nn.BatchNorm1d(hidden)
        self.linear3 = nn.Linear(hidden, out)

    def forward(self, features: Tensor) -> Tensor:
        """Map the features of one view, (B, width) → (B, out)."""
        x = self.norm1(self.linear1(features)).relu()
        x = self.norm2(self.linear2(x)).relu()
        return self.linear3(x)


class Projector(SimCLRHead):
    """SimSiam's projector (arXiv 2011.10566): as `SimCLRHead`, with a batch norm at the end.

    DeCLIP puts it on the projected image embedding, 1024 wide throughout.
    """

    def __init__(self, width: int, hidden: int = 1024, out: int = 1024) -> None:
        super().__init__(width, hidden, out)
        self.norm3 = nn.BatchNorm1d(out)

    def forward(self, features: Tensor) -> Tensor:
        """Project the embeddings of one view, (B, width) → (B, out)."""
        return self.norm3(super().forward(features))


class Predictor(nn.Module):
    """SimSiam's predictor (arXiv 2011.10566): a bottleneck of two linear layers, batch norm and ReLU between."""

    def __init__(self, width: int = 1024, hidden: int = 512, out: int = 1024) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.norm1 = nn.BatchNorm1d(hidden)
        self.linear2 = nn.Linear(hidden, out)

    def forward(self, projections: Tensor) -> Tensor:
        """Predict the other view's projections, (B, width) → (B, out)."""
        return self.linear2(self.norm1(self.linear1(projections)).relu())


class MaskedLanguageHead(nn.Linear):
    """Predicts token ids from token states, (M, width) → (M, vocabulary), with weights of its own."""


class TokenProjection(nn.Linear):
    """Maps tokens into the space of late interaction, (B, n, width) → (B, n, out); normalize the result."""

    def __init__(self, width: int, out: int = 256) -> None:
        super().__init__(width, out)
