"""Encode captions in buckets of similar length, each truncated to its longest, to compute less padding."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.text.caption_tokenizer import padded_length
from declip.models.text_tower import TextFeatures


def encode_by_length(
    tower: Callable[[Tensor], TextFeatures], tokens: Tensor, lengths: Tensor | None, buckets: int
) -> TextFeatures:
    """Encode captions sorted by length, in buckets of equal size; the features are those of one pass over all.

    Equals the plain loop, but for rounding and for the token states behind a caption's end, which are 0
        features[b] = tower(tokens[b, : lengths[b]])

    Args:
        lengths: (n,) int64 on the host, number of ids up to and with each end; None: one bucket.
    """
    if lengths is None or buckets == 1 or len(tokens) < 2:
        return tower(tokens)
    order = lengths.argsort(stable=True)
    # From the host's lengths, so that no shape waits for the device.
    longest = [int(lengths[part].max()) for part in order.tensor_split(buckets) if len(part)]
    rows = order.to(tokens.device, non_blocking=True)
    context = tokens.shape[1]
    parts = [
        tower(tokens.index_select(0, part)[:, : padded_length(most, context)])
        for part, most in zip(rows.tensor_split(buckets), longest, strict=False)
    ]
    # Back to the order of the batch
    inverse = torch.empty_like(rows)
    inverse[rows] = torch.arange(len(rows), device=rows.device)
    text_tokens = [F.pad(part.text_tokens, (0, 0, 0, context - part.text_tokens.shape[1])) for part in parts]
    pooled, ends = torch.cat([part.pooled for part in parts]), torch.cat([part.lengths for part in parts])
    return TextFeatures(pooled[inverse], torch.cat(text_tokens)[inverse], ends[inverse])
