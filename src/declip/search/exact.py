"""Exact search: products of the queries with all vectors, block by block, so that memory stays small."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 2 << 20  # float32 bytes of a block, which stays in a core's cache between conversion and product


class VectorBlock(NamedTuple):
    """Vectors to search: ids (rows,) int64, vectors (rows, d) of any float type, and bool (rows,) for hidden rows."""

    ids: Tensor
    vectors: Tensor
    dead: Tensor | None = None


def nearest(queries: Tensor, blocks: Sequence[VectorBlock], k: int) -> tuple[Tensor, Tensor]:
    """Find the vectors with the largest products, taken in float32 whatever the vectors' type.

    The plain loop::

        scores = [(q @ vector, id) for ids, vectors in blocks for id, vector in zip(ids, vectors) if alive]
        sorted(scores, key=lambda pair: (-pair[0], pair[1]))[:k]

    Args:
        queries: (n, d) float32.

    Returns:
        Ids (n, k') int64 and scores (n, k') float32, the best first, where k' is `k` or the number of live vectors
        if that is smaller.
    """
    n, d = queries.shape
    rows = max(1, BLOCK_BYTES // (4 * d))
    buffer = torch.empty(rows, d)
    best = (torch.empty(n, 0, dtype=torch.int64), torch.empty(n, 0))
    for ids, vectors, dead in blocks:
        scores = torch.empty(n, len(vectors))
        for start in range(0, len(vectors), rows):
            piece = vectors[start : start + rows]
            if piece.dtype != torch.float32:
                piece = buffer[: len(piece)].copy_(piece)
            scores[:, start : start + rows] = queries @ piece.T
        if dead is not None:
            scores.masked_fill_(dead, -torch.inf)
        top = scores.topk(min(k, scores.shape[1]))
        best = merge([best, (ids[top.indices], top.values)], k)
    return best


def merge(answers: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The best k of several answers to the same queries; equal scores are ordered by id, dead rows are dropped.

    Args:
        answers: Ids (n, any) int64 and scores (n, any) float32 of each.
    """
    ids, scores = (torch.cat(tensors, dim=1) for tensors in zip(*answers, strict=True))
    by_id = ids.argsort(dim=1, stable=True)
    order = by_id.gather(1, scores.gather(1, by_id).argsort(dim=1, descending=True, stable=True))[:, :k]
    ids, scores = ids.gather(1, order), scores.gather(1, order)
    alive = int(scores.isfinite().sum(1).min()) if len(scores) else 0
    return ids[:, :alive], scores[:, :alive]
