"""Routes of the app for pairs: low cosines of image and caption, near-duplicates, and the list of pairs to exclude."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from declip.app.requests import LARGEST_JSON, ImageId, Question, read_body
from declip.app.state import AppState, state_of
from declip.data.prepare import write_exclusions
from declip.errors import UserError
from declip.inspection.reading import components

PAGE = 24  # pairs or groups that are sent at a time
MEMBERS = 12  # images of a group that are shown
BLOCK, QUERIES = 4_096, 512  # rows whose vectors are in memory at a time, and images that are searched at a time
BARS = 40  # bars of the histogram
NEAREST = 8  # nearest images of each image: larger groups are joined through several members
LOWEST = 0.8  # cosine below which two images are never shown as near-duplicates
MOST_COMPARED = 50_000  # images that are compared with each other, which takes about a minute on two cores

Reason = Literal["image and caption disagree", "near-duplicate image"]
MARKED = TypeAdapter(dict[Reason, list[ImageId]])


class PairsQuestion(Question):
    """The first row of a page, and limits: of cosines or ranks, and of cosines of near-duplicates."""

    start: int = Field(0, ge=0)
    limit: float | None = Field(None, ge=-1, le=1)
    threshold: float = Field(0.98, ge=LOWEST, le=1)


class Agreement(NamedTuple):
    """How well each image and its captions fit."""

    ids: np.ndarray  # (n,) int64, the images with a value, the worst first
    values: np.ndarray  # (n,) float32, their cosines, or out-of-fold ranks
    ranked: bool  # whether these are ranks: 0 best, 1 worst
    without: int  # images without a caption, or without a rank
    median: float
    spread: float  # standard deviation, estimated from the median absolute deviation

    def beyond(self, limit: float) -> np.ndarray:
        """(m,), ids of the images whose value is worse than a limit."""
        return self.ids[self.values > limit if self.ranked else self.values < limit]


ROUNDING = 5e-4
"""Tolerance of thresholds: copies of an image have cosines of 0.9999 to 1.0001 in float16; the page shows 3 digits."""


class SimilarImages(NamedTuple):
    """Pairs of images whose cosine is `LOWEST` or more, most of them twice: ids (m,), (m,) int64, cosines (m,)."""

    one: np.ndarray
    other: np.ndarray
    cosines: np.ndarray

    def groups(self, threshold: float) -> list[tuple[list[int], float]]:
        """Groups joined by cosines of at least `threshold`, as ids and the largest cosine; the most similar first."""
        chosen = self.cosines >= threshold - ROUNDING
        if not chosen.any():
            return []
        ids, nodes = np.unique(np.stack([self.one[chosen], self.other[chosen]]), return_inverse=True)
        edges = nodes.reshape(2, -1)  # numbers of ids, two for each pair
        label = components(len(ids), edges)
        largest = np.full(label.max() + 1, -np.inf, np.float32)
        np.maximum.at(largest, label[edges[0]], self.cosines[chosen])
        split = np.split(ids[np.argsort(label, kind="stable")], np.cumsum(np.bincount(label))[:-1])
        groups = [(members.tolist(), float(top)) for members, top in zip(split, largest, strict=True)]
        return sorted(groups, key=lambda group: (-group[1], group[0]))


def compare_captions(state: AppState) -> Agreement:
    """Compare each image of an index with its captions: by out-of-fold ranks if there are any, else by cosines."""
    index, ids = state.index, state.index.ids
    # --- values in the order of the ids, NaN where there is none
    values = np.full(len(ids), np.nan, np.float32)
    if state.ranks:
        values[:] = [state.ranks.get(id, np.nan) for id in ids.tolist()]
    for start in () if state.ranks else range(0, len(ids), BLOCK):
        state.check_running()
        block = slice(start, start + BLOCK)
        texts = index.vectors(ids[block], "captions")
        products = (index.vectors(ids[block]) * texts).sum(1)
        values[block] = torch.where(texts.any(1), products, torch.nan).numpy()
    # --- the worst first
    known = int(np.isfinite(values).sum())
    if not known:
        raise UserError("No image of this index has a caption to compare with.")
    order = np.argsort(-values if state.ranks else values, kind="stable")[:known]  # NaN comes last
    values = values[order]
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - median)))  # of normal values, their standard deviation
    return Agreement(ids[order], values, bool(state.ranks), len(ids) - known, median, spread)


def find_similar(state: AppState) -> SimilarImages:
    """Compare the images of an index with each other."""
    index, ids = state.index, state.index.ids
    if len(ids) > MOST_COMPARED:
        raise UserError(
            f"{len(ids):,} images are too many, the limit is {MOST_COMPARED:,}. Use `declip data inspect --all`."
        )
    # --- nearest images of blocks of images, without themselves
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(ids), QUERIES):
        state.check_running()
        block = ids[start : start + QUERIES]
        # (q, NEAREST + 1) each, as every image is its own nearest
        near, cosines = (tensor.numpy() for tensor in index.nearest(index.vectors(block), NEAREST + 1))
        query_ids = np.repeat(block, near.shape[1]).reshape(near.shape)
        alike = (near != query_ids) & (cosines >= LOWEST)
        pieces.append((query_ids[alike], near[alike], cosines[alike]))
    return SimilarImages(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))


def disagreeing(request: Request) -> Response:
    """Answer with the distribution of values, a page of the worst pairs, and the ids of all pairs beyond ?limit.

    Each pair is shown with the caption nearest to its image.
    """
    state, asked = state_of(request), PairsQuestion.of(request)
    found: Agreement = state.once(compare_captions)
    page = slice(asked.start, asked.start + PAGE)
    ids, values = found.ids[page].tolist(), found.values[page].tolist()
    nearest = state.index.nearest(state.index.vectors(ids), 1, over="captions")[0].flatten().tolist()
    rows = []
    for id, value, near in zip(ids, values, nearest, strict=True):
        deviations = (value - found.median) / (found.spread or 1)
        caption = state.describe(near)["captions"][0]
        rows.append({**state.describe(id), "value": value, "deviations": deviations, "nearest": caption})
    # --- the histogram, and the limit that a page begins with
    counts, edges = np.histogram(found.values, BARS)
    # A wrong caption has any rank; a right one is rarely worse than half of all others.
    usual = 0.5 if found.ranked else found.median - 3 * found.spread
    answer: dict[str, Any] = {"rows": rows, "total": len(found.ids), "without": found.without, "ranked": found.ranked}
    answer |= {"counts": counts.tolist(), "edges": edges.tolist(), "median": found.median, "spread": found.spread}
    marked = [] if asked.limit is None else found.beyond(asked.limit).tolist()
    return JSONResponse({**answer, "limit": usual, "marked": marked})


def duplicates(request: Request) -> Response:
    """Answer with a page of groups with cosines of at least ?threshold, and the ids of all but the first of each."""
    state, asked = state_of(request), PairsQuestion.of(request)
    similar: SimilarImages = state.once(find_similar)
    groups = similar.groups(asked.threshold)
    shown = []
    for ids, cosine in groups[asked.start : asked.start + PAGE]:
        members = [state.describe(id) for id in ids[:MEMBERS]]
        shown.append({"cosine": cosine, "size": len(ids), "members": members})
    marked = [id for ids, _ in groups for id in ids[1:]]
    return JSONResponse({"rows": shown, "total": len(groups), "marked": marked})


async def save_list(request: Request) -> Response:
    """Answer with the marked pairs as a list; pairs that have left the index since they were marked are omitted."""
    given, state = MARKED.validate_json(await read_body(request, LARGEST_JSON)), state_of(request)
    agreement: Agreement | None = state.compared.get(compare_captions)
    cosines: dict[int, float] = {}
    if agreement is not None and not agreement.ranked:
        cosines = dict(zip(agreement.ids.tolist(), agreement.values.tolist(), strict=True))
    rows: dict[int, tuple[str, int, str, float | None, str]] = {}
    for reason, ids in given.items():
        for row in map(state.index.row, np.intersect1d(ids, state.index.ids).tolist()):
            rows.setdefault(row.id, (row.key, row.place, reason, cosines.get(row.id), row.caption))
    if not rows:
        raise UserError("The list is empty.")
    text = write_exclusions(rows[id] for id in sorted(rows))
    headers = {"Content-Disposition": 'attachment; filename="drop.jsonl"'}
    return Response(text, media_type="application/jsonl", headers=headers)
