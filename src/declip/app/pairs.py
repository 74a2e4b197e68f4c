"""Routes of the app for pairs: low cosines of image and caption, near-duplicates, and the list of pairs to exclude."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from declip.app.params import LARGEST_JSON, ImageId, Question, bad_request, read_body
from declip.app.state import Check, state_of
from declip.data.exclude import write_exclusions
from declip.errors import UserError
from declip.inspection.duplicates import components
from declip.search.index import Index

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
    """The first row of a page, and thresholds of cosines."""

    start: int = Field(0, ge=0)
    below: float = Field(-1, ge=-1, le=1)
    threshold: float = Field(0.98, ge=LOWEST, le=1)


class Agreement(NamedTuple):
    """Cosine of each image with its captions.

    Attributes:
        ids: (n,) int64, the images that have a caption, in the order of `cosines`.
        cosines: (n,) float32, increasing.
        without: Number of images without a caption.
        median: Median of the cosines.
        spread: Their standard deviation, estimated from the median absolute deviation.
    """

    ids: np.ndarray
    cosines: np.ndarray
    without: int
    median: float
    spread: float


ROUNDING = 5e-4
"""Tolerance of thresholds: copies of an image have cosines of 0.9999 to 1.0001 in float16; the page shows 3 digits."""


class SimilarImages(NamedTuple):
    """Pairs of images whose cosine is `LOWEST` or more: ids (m,) and (m,) int64, cosines (m,) float32."""

    one: np.ndarray
    other: np.ndarray
    cosines: np.ndarray

    def groups(self, threshold: float) -> list[tuple[list[int], float]]:
        """Groups joined by cosines of at least `threshold`, as ids and the largest cosine; the most similar first."""
        chosen = self.cosines >= threshold - ROUNDING
        if not chosen.any():
            return []
        ids, nodes = np.unique(np.stack([self.one[chosen], self.other[chosen]]), return_inverse=True)
        edges = nodes.reshape(2, -1)
        label = components(len(ids), edges)
        largest = np.full(label.max() + 1, -np.inf, np.float32)
        np.maximum.at(largest, label[edges[0]], self.cosines[chosen])
        split = np.split(ids[np.argsort(label, kind="stable")], np.cumsum(np.bincount(label))[:-1])
        groups = [(members.tolist(), float(top)) for members, top in zip(split, largest, strict=True)]
        return sorted(groups, key=lambda group: (-group[1], group[0]))


def compare_captions(index: Index, check: Check) -> Agreement:
    """Compare each image of an index with its captions."""
    ids, cosines = index.ids, np.empty(len(index), np.float32)
    for start in range(0, len(ids), BLOCK):
        check()
        block = slice(start, start + BLOCK)
        texts = index.vectors(ids[block], "captions")
        products = (index.vectors(ids[block]) * texts).sum(1)
        cosines[block] = torch.where(texts.any(1), products, torch.nan).numpy()
    known = int(np.isfinite(cosines).sum())
    if not known:
        raise UserError("No image of this index has a caption to compare with.")
    order = np.argsort(cosines, kind="stable")[:known]  # NaN comes last
    cosines = cosines[order]
    median = float(np.median(cosines))
    spread = 1.4826 * float(np.median(np.abs(cosines - median)))  # of normal values, their standard deviation
    return Agreement(ids[order], cosines, len(ids) - known, median, spread)


def find_similar(index: Index, check: Check) -> SimilarImages:
    """Compare the images of an index with each other."""
    ids = index.ids
    if len(ids) > MOST_COMPARED:
        raise UserError(
            f"{len(ids):,} images are too many to compare with each other (the limit is {MOST_COMPARED:,}). "
            "`declip data inspect --all` finds copies among any number of images."
        )
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(ids), QUERIES):
        check()
        block = ids[start : start + QUERIES]
        near, cosines = (tensor.numpy() for tensor in index.nearest(index.vectors(block), NEAREST + 1))
        query_ids = np.repeat(block, near.shape[1]).reshape(near.shape)
        alike = (near != query_ids) & (cosines >= LOWEST)
        pieces.append((query_ids[alike], near[alike], cosines[alike]))
    one, other, cosines = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    # Most pairs appear twice, once from each side.
    first, second = np.minimum(one, other), np.maximum(one, other)
    _, kept = np.unique(np.stack([first, second]), axis=1, return_index=True)
    return SimilarImages(first[kept], second[kept], cosines[kept].astype(np.float32))


def disagreeing(request: Request) -> Response:
    """Answer with the distribution of cosines, a page of the lowest pairs, and the ids of all pairs ?below a cosine.

    Each pair is shown with the caption nearest to its image.
    """
    state, asked = state_of(request), PairsQuestion.of(request)
    found: Agreement = state.once(compare_captions)
    page = slice(asked.start, asked.start + PAGE)
    ids, cosines = found.ids[page].tolist(), found.cosines[page].tolist()
    nearest = state.index.nearest(state.index.vectors(ids), 1, over="captions")[0].flatten().tolist()
    rows = []
    for id, cosine, near in zip(ids, cosines, nearest, strict=True):
        deviations = (cosine - found.median) / (found.spread or 1)
        caption = state.describe(near)["captions"][0]
        rows.append({**state.describe(id), "cosine": cosine, "deviations": deviations, "nearest": caption})
    counts, edges = np.histogram(found.cosines, BARS)
    answer: dict[str, Any] = {"rows": rows, "total": len(found.ids), "without": found.without}
    answer |= {"counts": counts.tolist(), "edges": edges.tolist(), "median": found.median, "spread": found.spread}
    return JSONResponse({**answer, "marked": found.ids[found.cosines < asked.below].tolist()})


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
    """Answer with the marked pairs as CSV; pairs that have left the index since they were marked are omitted."""
    given, state = MARKED.validate_json(await read_body(request, LARGEST_JSON)), state_of(request)
    agreement: Agreement | None = state.compared.get(compare_captions)
    cosines = {} if agreement is None else dict(zip(agreement.ids.tolist(), agreement.cosines.tolist(), strict=True))
    rows: dict[int, tuple[str, int, str, float | None, str]] = {}
    for reason, ids in given.items():
        for row in map(state.index.row, np.intersect1d(ids, state.index.ids).tolist()):
            rows.setdefault(row.id, (row.key, row.place, reason, cosines.get(row.id), row.caption))
    if not rows:
        raise bad_request("The list is empty.")
    text = write_exclusions(rows[id] for id in sorted(rows))
    headers = {"Content-Disposition": 'attachment; filename="drop.csv"'}
    return Response(text.encode("utf-8", "replace"), media_type="text/csv", headers=headers)
