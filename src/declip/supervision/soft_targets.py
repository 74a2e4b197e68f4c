"""Targets of the contrastive losses with duplicates among the keys, and label smoothing."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declip.data.batch import PairBatch

MULTIPLIER = 6364136223846793005  # Knuth's, for hashes modulo 2⁶⁴


@dataclass(frozen=True)
class SoftTargets:
    """Label smoothing, and the labels of duplicates: other pairs where one of k labels is equal and not 0."""

    label_smoothing: float = 0.0  # part of the target that is spread evenly over all compared keys
    labels: Tensor | None = None  # (B, k) int64 of the rows; None where duplicates stay negatives
    key_labels: Tensor | None = None  # (N, k) of the keys

    def part(self, start: int, stop: int) -> "SoftTargets":
        """The targets of some of the rows."""
        return self if self.labels is None else replace(self, labels=self.labels[start:stop])


def soft_cross_entropy(logits: Tensor, offset: int, soft: SoftTargets) -> Tensor:
    """Sum over rows of the cross-entropy with soft targets.

    Equals the plain loop, y = offset + b, K = all keys without those but y that have a label of row b
        q[n] = (1 - ε)·[n = y] + ε / |K|                            label smoothing (arXiv 1512.00567, section 7)
        sum over b of  -Σ over n in K of q[n]·log softmax over K of logits[b]
    """
    positives = torch.arange(offset, offset + len(logits), device=logits.device)[:, None]
    itself = positives == torch.arange(logits.shape[1], device=logits.device)
    hidden = torch.zeros_like(itself)  # (B, N), duplicates
    if soft.labels is not None and soft.key_labels is not None:
        for row_labels, key_labels in zip(soft.labels.mT[..., None], soft.key_labels.mT, strict=True):
            hidden = hidden | ((row_labels == key_labels) & (row_labels != 0) & ~itself)
    compared = (~hidden).to(logits.dtype)
    uniform = compared / compared.sum(dim=1, keepdim=True)
    targets = torch.lerp(itself.to(logits.dtype), uniform, soft.label_smoothing)
    log_probabilities = logits.masked_fill(hidden, -torch.inf).log_softmax(dim=1)
    # A second time, since 0 times minus infinity is not a number.
    return -(targets * log_probabilities.masked_fill(hidden, 0)).sum()


def caption_hashes(texts: Tensor, padding: int = 0) -> Tensor:
    """Hash texts (T, B, L) as (T, B) int64, so that equal captions are found by comparing one number.

    Equals the plain loop, modulo 2⁶⁴, for ids padded to any length
        hash = Σₗ (texts[t, b, l] - padding)·Mˡ⁺¹, with the lowest bit set, so that 0 means no label
    """
    powers = texts.new_full((texts.shape[-1],), MULTIPLIER).cumprod(dim=0)
    return ((texts - padding) * powers).sum(dim=-1) | 1


def pair_labels(batch: PairBatch, padding: int = 0) -> Tensor:
    """Label the pairs of a batch: (B, T + 1) int64, a hash of each text view, then the group, 0 where there is none."""
    hashes = caption_hashes(batch.texts, padding)
    groups = torch.zeros_like(hashes[0]) if batch.groups is None else batch.groups
    return torch.cat([hashes, groups[None]]).mT
