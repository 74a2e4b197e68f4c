"""Exact search: products of the queries with all vectors, block by block, so that memory stays small."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.errors import UserError

ROWS = 8_192  # vectors whose products are kept at a time
BLOCK_BYTES = 2 << 20  # float32 bytes of a block, which stays in a core's cache between conversion and product


def nearest(queries: Tensor, ids: Tensor, vectors: Tensor, k: int, skip_zeros: bool = False) -> tuple[Tensor, Tensor]:
    """Find the vectors with the largest products, taken in float32 whatever the vectors' type.

    The plain loop::

        scores = [(q @ vector, id) for id, vector in zip(ids, vectors) if vector.any() or not skip_zeros]
        sorted(scores, key=lambda pair: (-pair[0], pair[1]))[:k]

    Which of several equal scores come last is arbitrary. Queries are (n, d) float32, ids (m,) int64, increasing,
    vectors (m, d) of any float type. Returns ids and scores, (n, k'), the best first, where k' is `k` or the number of
    vectors if that is smaller.
    """
    n, d = queries.shape
    rows = max(1, BLOCK_BYTES // (4 * d))
    buffer = torch.empty(rows, d)
    best_ids, best = torch.empty(n, 0, dtype=torch.int64), torch.empty(n, 0)
    for own, block in zip(ids.split(ROWS), vectors.split(ROWS), strict=True):
        # --- products, (n, rows of the block)
        scores = torch.empty(n, len(block))
        for start in range(0, len(block), rows):
            piece = block[start : start + rows]
            if piece.dtype != torch.float32:
                piece = buffer[: len(piece)].copy_(piece)
            scores[:, start : start + rows] = queries @ piece.T
        if skip_zeros:
            scores.masked_fill_(~block.any(1), -torch.inf)
        # --- the best of the block
        places = scores.topk(min(k, scores.shape[1])).indices  # of equal ones at its end it takes any
        places = places.sort(dim=1).values  # (n, k) by id, so that stable sorting orders equal scores by id
        # --- the best so far
        best_ids = torch.cat([best_ids, own[places]], dim=1)
        best = torch.cat([best, scores.gather(1, places)], dim=1)
        order = best.argsort(dim=1, descending=True, stable=True)[:, :k]
        best_ids, best = best_ids.gather(1, order), best.gather(1, order)
    shown = int(best.isfinite().sum(1).min()) if n else 0
    return best_ids[:, :shown], best[:, :shown]


def mix(text: Tensor, image: Tensor, weights: tuple[float, float]) -> Tensor:
    """Normalized weighted sum of two unit vectors (d,); raises `UserError` if they cancel."""
    if len(weights) != 2 or not all(map(math.isfinite, weights)):
        raise UserError(f"weights is {weights}; give two numbers, of text and image, such as 0.7,0.3.")
    both = weights[0] * text + weights[1] * image
    if both.norm() < 1e-6:
        raise UserError(f"With weights {weights[0]:g} and {weights[1]:g} nothing is left of the query. Give others.")
    return normalize(both, dim=-1)
