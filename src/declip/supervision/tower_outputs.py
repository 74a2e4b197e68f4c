"""Outputs of the two towers for a batch, and joining the outputs of its parts. Nothing here mixes pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TowerOutputs:
    """Outputs of the towers for B pairs; fields that no term needs are None."""

    views: tuple[str, ...]  # names of the image views
    images: Tensor  # (V, B, d) projected embedding of each view, not normalized
    texts: Tensor  # (T, B, d) projected embedding of each text view, not normalized
    pre_logits: Tensor | None  # (V, B, h) pooled feature of each image view before the projection
    patches: Tensor | None  # (B, P, w) token features of the first image view
    text_tokens: Tensor | None  # (B, L, w) token features of the first text view
    masked_tokens: Tensor | None  # (M, w) token features of the masked tokens, pair after pair
    targets: Tensor | None  # (M,) int64, the ids to predict there
    lengths: Tensor  # (B,) int64, number of tokens of the first text view

    def tensors(self) -> dict[str, Tensor]:
        """Give the tensors that are present, by field name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}


def pair_axis(name: str) -> int:
    """Axis that counts pairs (or masked tokens) in the field of that name."""
    return int(name in ("images", "texts", "pre_logits"))


def joined(parts: Sequence[TowerOutputs]) -> TowerOutputs:
    """Join the outputs of consecutive parts of a batch."""
    names = parts[0].tensors()
    whole = {name: torch.cat([getattr(part, name) for part in parts], dim=pair_axis(name)) for name in names}
    return replace(parts[0], **whole)  # type: ignore[arg-type]  # the names are those of tensor fields


def split_like(name: str, gradient: Tensor, parts: Sequence[TowerOutputs]) -> list[Tensor]:
    """Split the gradient of a joined tensor into its parts' gradients."""
    axis = pair_axis(name)
    return list(gradient.split([getattr(part, name).shape[axis] for part in parts], dim=axis))
