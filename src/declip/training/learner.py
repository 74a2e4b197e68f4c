"""The learner: what trains and what a checkpoint saves."""

from torch import Tensor, nn

from declip.data.batch import PairBatch
from declip.models.dual_encoder import DualEncoder
from declip.supervision.objective import Gather, Objective


class Learner(nn.Module):
    """The two towers and the objective, as one module whose forward pass gives the losses.

    Attributes:
        sharded: Whether FSDP cut the towers and heads into shards.
    """

    def __init__(self, model: DualEncoder, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.sharded = False

    def forward(self, batch: PairBatch, gather: Gather, offset: int) -> dict[str, Tensor]:
        """Compute the losses by name, and "loss", their weighted sum; see `Objective.forward`."""
        return self.objective(self.model, batch, gather, offset)

    def after_step(self) -> None:
        """Limit the scales and write the queue, after the optimizer's step."""
        self.objective.after_step(self.model)
