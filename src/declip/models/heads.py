"""Heads that only training uses: they turn a tower's features into what a term compares."""

from torch import Tensor, nn


class Projector(nn.Module):
    """SimSiam's projector (arXiv 2011.10566): three linear layers, batch norm after each, ReLU after two.

    DeCLIP puts it on the projected image embedding, 1024 wide throughout. Batch norm sees each view by itself:
    call it once a view.
    """

    def __init__(self, width: int, hidden: int = 1024, out: int = 1024) -> None:
        """Make the layers.

        Args:
            width: Width of the image embedding.
            hidden: Width between the layers.
            out: Width of the projection.
        """
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.norm1 = nn.BatchNorm1d(hidden)
        self.linear2 = nn.Linear(hidden, hidden)
        self.norm2 = nn.BatchNorm1d(hidden)
        self.linear3 = nn.Linear(hidden, out)
        self.norm3 = nn.BatchNorm1d(out)

    def forward(self, features: Tensor) -> Tensor:
        """Project the embeddings of one view, (B, width) -> (B, out). In training B must be at least 2."""
        x = self.norm1(self.linear1(features)).relu()
        x = self.norm2(self.linear2(x)).relu()
        return self.norm3(self.linear3(x))


class Predictor(nn.Module):
    """SimSiam's predictor (arXiv 2011.10566): a bottleneck of two linear layers, batch norm and ReLU between."""

    def __init__(self, width: int = 1024, hidden: int = 512, out: int = 1024) -> None:
        """Make the layers.

        Args:
            width: Width of a projection.
            hidden: Width of the bottleneck.
            out: Width of a prediction, that of a projection.
        """
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.norm1 = nn.BatchNorm1d(hidden)
        self.linear2 = nn.Linear(hidden, out)

    def forward(self, projections: Tensor) -> Tensor:
        """Predict the other view's projections, (B, width) -> (B, out). In training B must be at least 2."""
        return self.linear2(self.norm1(self.linear1(projections)).relu())


class SimCLRHead(nn.Module):
    """SLIP's head on the image features (arXiv 2112.12750): three linear layers, batch norm and ReLU after two.

    Batch norm sees each view by itself: call it once a view.
    """

    def __init__(self, width: int, hidden: int = 4096, out: int = 256) -> None:
        """Make the layers.

        Args:
            width: Width of the image features.
            hidden: Width between the layers.
            out: Width of what NT-Xent compares.
        """
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.norm1 = nn.BatchNorm1d(hidden)
        self.linear2 = nn.Linear(hidden, hidden)
        self.norm2 = nn.BatchNorm1d(hidden)
        self.linear3 = nn.Linear(hidden, out)

    def forward(self, features: Tensor) -> Tensor:
        """Map the features of one view, (B, width) -> (B, out). In training B must be at least 2."""
        x = self.norm1(self.linear1(features)).relu()
        x = self.norm2(self.linear2(x)).relu()
        return self.linear3(x)


class MaskedLanguageHead(nn.Linear):
    """Predicts words from token states, (M, width) -> (M, vocabulary) logits. Run it on the chosen rows only."""

    def __init__(self, width: int, vocabulary: int) -> None:
        """Make the layer, with bias and with weights of its own (not the token embedding's).

        Args:
            width: Width of the text tower.
            vocabulary: Number of token ids, the mask included.
        """
        super().__init__(width, vocabulary)


class TokenProjection(nn.Linear):
    """Maps tokens into the space of late interaction, (B, n, width) -> (B, n, out); normalize the result."""

    def __init__(self, width: int, out: int = 256) -> None:
        """Make the layer.

        Args:
            width: Width of the tower's tokens.
            out: Width that both modalities are compared in.
        """
        super().__init__(width, out)
