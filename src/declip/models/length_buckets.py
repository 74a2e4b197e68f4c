"""Captions of like length together: each group is cut to its own longest, so that less padding is computed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.models.text_tower import TextFeatures

STEP = 8
"""Lengths are rounded up to a multiple of this, so that few different shapes occur."""


def encode_by_length(
    tower: Callable[[Tensor], TextFeatures], tokens: Tensor, lengths: Tensor | None, groups: int
) -> TextFeatures:
    """Encode captions sorted by length, in groups of equal size; the features are those of one pass over all.

    Equals the plain loop, but for rounding and for the token states behind a caption's end, which are 0
        features[b] = tower(tokens[b, : lengths[b]])

    Args:
        tower: Sees nothing of what stands behind a caption's end.
        tokens: (n, L) ids.
        lengths: (n,) int64, ids up to and with each end, on the host; None where they are not known: one group then.
        groups: How many, at least 1; of sizes that differ by one at most.
    """
    if lengths is None or groups == 1 or len(tokens) < 2:
        return tower(tokens)
    order = lengths.argsort(stable=True)
    longest = [int(lengths[part].max()) for part in order.tensor_split(groups) if len(part)]
    rows = order.to(tokens.device, non_blocking=True)
    length = tokens.shape[1]
    found = [
        tower(tokens.index_select(0, part)[:, : min(-(-most // STEP) * STEP, length)])
        for part, most in zip(rows.tensor_split(groups), longest, strict=False)
    ]
    back = torch.empty_like(rows)
    back[rows] = torch.arange(len(rows), device=rows.device)
    text_tokens = torch.cat([F.pad(each.text_tokens, (0, 0, 0, length - each.text_tokens.shape[1])) for each in found])
    return TextFeatures(
        torch.cat([each.pooled for each in found])[back],
        text_tokens[back],
        torch.cat([each.lengths for each in found])[back],
    )
