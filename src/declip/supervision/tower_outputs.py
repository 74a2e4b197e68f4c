"""What the objective reads of the two towers, and where a batch may be cut: nothing here mixes pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class TowerOutputs:
    """What the towers made of B pairs; fields that no term reads are None.

    Attributes:
        images: (V, B, d) projected embedding of each view, not normalized.
        texts: (T, B, d) of each text view.
        hidden: (2, B, h) image feature before the projection, of the last two views.
        patches: (B, P, w) token features of the first image view.
        words: (B, L, w) token features of the first text view.
        masked_words: (M, w) token features of the masked words, pair after pair.
        targets: (M,) int64, the ids to predict there.
        lengths: (B,) int64, tokens of the first text view.
    """

    images: Tensor
    texts: Tensor
    hidden: Tensor | None
    patches: Tensor | None
    words: Tensor | None
    masked_words: Tensor | None
    targets: Tensor | None
    lengths: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}


BY_VIEW = ("images", "texts", "hidden")
"""Fields whose second axis counts pairs; of the others it is the first."""


def joined(parts: Sequence[TowerOutputs]) -> TowerOutputs:
    """Outputs of consecutive parts of a batch as those of the batch."""
    found = [part.tensors() for part in parts]
    whole = {name: torch.cat([part[name] for part in found], dim=int(name in BY_VIEW)) for name in found[0]}
    return TowerOutputs(**{each.name: whole.get(each.name) for each in fields(TowerOutputs)})  # type: ignore[arg-type]
