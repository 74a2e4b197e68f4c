"""Pairs: captions that disagree with their image, near-duplicates, equal captions, and the list of pairs to exclude."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from declip.app import params
from declip.app.state import AppState, Job, Progress, state_of
from declip.data.exclude import write_exclusions
from declip.errors import UserError
from declip.search.index import Index

PAGE = 24  # pairs or groups that are sent at a time
MEMBERS = 12  # images of a group that are shown
REASONS = {
    "disagree": "image and caption disagree",
    "duplicate": "near-duplicate image",
    "caption": "equal caption",
    "hand": "chosen by hand",
}
"""Reasons in the list of pairs to exclude."""

BLOCK, QUERIES = 4_096, 512  # rows whose vectors are in memory at a time, and images that are looked up at a time
TO_SIGMA = 1.4826  # standard deviation of a normal distribution, in median absolute deviations
BARS = 40  # bars of the histogram
EQUAL = 1e-4  # cosines that differ by less are equal: twice the resolution of float16 vectors
NEAREST = 8  # nearest images of each image that are looked at: larger groups are joined through several members
LOWEST = 0.8  # cosine below which two images are never shown as near-duplicates
MOST_COMPARED = 50_000  # images that are compared exactly with each other, in about a minute on two cores
NO_CAPTIONS = (
    "This index holds no vectors of captions. Stop the app, and embed again into another folder: "
    "declip embed MODEL SOURCE --captions --out DIR"
)


@dataclass(frozen=True)
class Agreement:
    """Cosine of each image with its captions.

    Attributes:
        ids: (n,) int64, the images that have a caption, the least agreeing first.
        cosines: (n,) float32, rising.
        without: Number of images without a caption.
        median: Median of the cosines.
        spread: Their standard deviation, estimated so that outliers hardly move it.
    """

    ids: np.ndarray
    cosines: np.ndarray
    without: int
    median: float
    spread: float

    def below(self, cosine: float) -> np.ndarray:
        """The ids whose cosine is smaller."""
        return self.ids[: int(np.searchsorted(self.cosines, cosine))]

    def by_id(self) -> dict[int, float]:
        """Id → cosine."""
        return dict(zip(self.ids.tolist(), self.cosines.tolist(), strict=True))

    def deviations(self, cosine: float) -> float:
        """Standard deviations between a cosine and the median."""
        return (cosine - self.median) / self.spread if self.spread else 0.0


class CaptionRank(NamedTuple):
    """Rank of an image's own caption among all captions (1 is the nearest), and the id of the nearest caption."""

    rank: int
    nearest: int


class ImageGroup(NamedTuple):
    """Two or more images that belong together, ids rising, and the largest cosine between two of them."""

    ids: list[int]
    cosine: float


@dataclass(frozen=True)
class SimilarImages:
    """Pairs of images whose cosine is `LOWEST` or more: ids (m,) and (m,) int64, cosines (m,) float32."""

    one: np.ndarray
    other: np.ndarray
    cosines: np.ndarray

    def groups(self, threshold: float) -> list[ImageGroup]:
        """Groups joined by cosines of at least `threshold`, the most alike first."""
        chosen = self.cosines >= threshold
        if not chosen.any():
            return []
        ids, nodes = np.unique(np.stack([self.one[chosen], self.other[chosen]]), return_inverse=True)
        one, other = nodes.reshape(2, -1)
        graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(ids), len(ids)))
        count, label = connected_components(graph, directed=False)
        largest = np.full(count, -np.inf, np.float32)
        np.maximum.at(largest, label[one], self.cosines[chosen])
        split = np.split(ids[np.argsort(label, kind="stable")], np.cumsum(np.bincount(label))[:-1])
        groups = [ImageGroup(members.tolist(), float(top)) for members, top in zip(split, largest, strict=True)]
        return sorted(groups, key=lambda group: (-group.cosine, group.ids))


def compare_captions(index: Index, report: Progress) -> Agreement:
    """Compare each image of an index with its captions."""
    if not index.manifest.captions:
        raise UserError(NO_CAPTIONS)
    ids = index.ids
    cosines, captioned = np.empty(len(ids), np.float32), np.empty(len(ids), bool)
    for start in range(0, len(ids), BLOCK):
        block = slice(start, start + BLOCK)
        texts = index.vectors(ids[block], "captions")
        cosines[block] = (index.vectors(ids[block]) * texts).sum(1).numpy()
        captioned[block] = texts.any(1).numpy()
        report(min(1.0, (start + BLOCK) / len(ids)))
    if not captioned.any():
        raise UserError("No image of this index has a caption, so there is nothing to compare.")
    known, values = ids[captioned], cosines[captioned]
    order = np.argsort(values, kind="stable")
    median = float(np.median(values))
    spread = TO_SIGMA * float(np.median(np.abs(values - median)))
    return Agreement(known[order], values[order], int((~captioned).sum()), median, spread)


def caption_ranks(index: Index, ids: Sequence[int]) -> list[CaptionRank]:
    """Rank the own captions of n images among all captions.

    Equals the plain loop
        rank[i] = 1 + sum(image[i] @ caption[j] > image[i] @ caption[i] + EQUAL for j in index)
    """
    images = index.vectors(ids)
    own_cosines = (images * index.vectors(ids, "captions")).sum(1, keepdim=True)
    better = torch.zeros(len(ids), dtype=torch.int64)
    best, nearest = torch.full((len(ids),), -torch.inf), torch.zeros(len(ids), dtype=torch.int64)
    for start in range(0, len(index.ids), BLOCK):
        block = index.ids[start : start + BLOCK]
        texts = index.vectors(block, "captions")
        scores = (images @ texts.T).masked_fill(~texts.any(1), -torch.inf)
        better += (scores > own_cosines + EQUAL).sum(1)
        top = scores.max(1)
        nearer = top.values > best
        best = torch.where(nearer, top.values, best)
        nearest = torch.where(nearer, torch.from_numpy(block)[top.indices], nearest)
    return [CaptionRank(int(count) + 1, int(id)) for count, id in zip(better, nearest, strict=True)]


def find_similar(index: Index, report: Progress) -> SimilarImages:
    """Compare the images of an index with each other: exactly, or beyond `MOST_COMPARED` by its approximate index."""
    ids = index.ids
    if len(ids) > MOST_COMPARED and index.manifest.approximate is None:
        raise UserError(
            f"{len(ids):,} images are too many to be compared with each other exactly (at most {MOST_COMPARED:,}). "
            "Make an approximate index first: declip index approximate INDEX"
        )
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(ids), QUERIES):
        block = ids[start : start + QUERIES]
        near, cosines = (tensor.numpy() for tensor in index.nearest(index.vectors(block), NEAREST + 1))
        query_ids = np.repeat(block, near.shape[1]).reshape(near.shape)
        alike = (near != query_ids) & (cosines >= LOWEST)
        pieces.append((query_ids[alike], near[alike], cosines[alike]))
        report(min(1.0, (start + QUERIES) / len(ids)))
    one, other, cosines = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    # Most pairs are met from both sides; each is kept once.
    first, second = np.minimum(one, other), np.maximum(one, other)
    _, kept = np.unique(np.stack([first, second]), axis=1, return_index=True)
    return SimilarImages(first[kept], second[kept], cosines[kept].astype(np.float32))


def equal_captions(index: Index) -> list[ImageGroup]:
    """Images whose first captions differ in case and white space at most, the largest group first."""
    owners: dict[str, list[int]] = defaultdict(list)
    for id, caption in zip(index.ids.tolist(), index.captions(), strict=True):
        if caption:
            owners[" ".join(caption.casefold().split())].append(id)
    groups = [ImageGroup(ids, 1.0) for ids in owners.values() if len(ids) > 1]
    return sorted(groups, key=lambda group: (-len(group.ids), group.ids))


def overview(request: Request) -> Response:
    """The distribution of all pairs' cosines."""

    def answer(agreement: Agreement) -> dict[str, Any]:
        counts, edges = np.histogram(agreement.cosines, BARS)
        numbers = {"pairs": len(agreement.ids), "without": agreement.without}
        numbers |= {"counts": counts.tolist(), "edges": edges.tolist()}
        return {**numbers, "median": agreement.median, "spread": agreement.spread}

    return when_done(agreement_job(state_of(request)), answer)


def disagreeing(request: Request) -> Response:
    """The pairs whose image and caption agree least, from ?start on."""
    state = state_of(request)

    def answer(agreement: Agreement) -> dict[str, Any]:
        total = len(agreement.ids)
        start = params.whole(request.query_params, "start", 0, 0, total)
        ids = agreement.ids[start : start + PAGE].tolist()
        rows = []
        for id, cosine, rank in zip(
            ids, agreement.cosines[start : start + PAGE].tolist(), caption_ranks(state.index, ids), strict=True
        ):
            nearer = None if rank.rank == 1 else next(iter(state.describe(rank.nearest)["captions"]), None)
            numbers = {"cosine": cosine, "deviations": agreement.deviations(cosine), "rank": rank.rank, "pairs": total}
            rows.append({**state.describe(id), **numbers, "nearer": nearer})
        return {"rows": rows, "total": total}

    return when_done(agreement_job(state), answer)


def duplicates(request: Request) -> Response:
    """Groups of images whose cosine is ?threshold or more, from ?start on."""
    threshold = _threshold(request)
    return when_done(_similar_job(state_of(request)), lambda similar: _page(request, similar.groups(threshold)))


def captions(request: Request) -> Response:
    """Groups of images that share their caption, from ?start on."""
    state = state_of(request)
    job = state.jobs.get("captions", lambda report: equal_captions(state.index))
    return when_done(job, lambda groups: _page(request, groups))


def chosen(request: Request) -> Response:
    """The ids that a rule chooses: "disagree" those below ?below, "duplicate" all but the first of each group."""
    if params.choice(request.query_params, "rule", "disagree", "duplicate") == "disagree":
        below = params.number(request.query_params, "below", -1, -1, 1)
        return when_done(agreement_job(state_of(request)), lambda agreement: {"ids": agreement.below(below).tolist()})
    threshold = _threshold(request)
    return when_done(
        _similar_job(state_of(request)),
        lambda similar: {"ids": [id for group in similar.groups(threshold) for id in group.ids[1:]]},
    )


async def save_list(request: Request) -> Response:
    """Turn {reason: [id, …]} into the list as CSV."""
    given, state = await params.read_json(request), state_of(request)
    agreement: Agreement | None = agreement_job(state).result
    cosines = {} if agreement is None else agreement.by_id()
    rows: dict[int, tuple[str, int, str, float | None, str]] = {}
    for reason, ids in given.items():
        if reason not in REASONS or not isinstance(ids, list):
            raise params.bad_request("The list must hold ids by reason.")
        for id in ids:
            row = state.index.row(params.image_id({"id": id}))
            caption = row.captions[0] if row.captions else ""
            rows.setdefault(row.id, (row.key, row.place, REASONS[reason], cosines.get(row.id), caption))
    if not rows:
        raise params.bad_request("The list is empty.")
    text = write_exclusions(rows[id] for id in sorted(rows))
    headers = {"Content-Disposition": 'attachment; filename="drop.csv"'}
    return Response(text.encode("utf-8", "replace"), media_type="text/csv", headers=headers)


def when_done(job: Job, answer: Callable[[Any], dict[str, Any]]) -> Response:
    """The state of a job, with an answer made from its result once that is there."""
    state = job.state()
    return JSONResponse(state | answer(job.result) if state["state"] == "ready" else state)


def agreement_job(state: AppState) -> Job:
    """The comparison of all images with their captions."""
    return state.jobs.get("agreement", partial(compare_captions, state.index))


def _similar_job(state: AppState) -> Job:
    return state.jobs.get("similar", partial(find_similar, state.index))


def _threshold(request: Request) -> float:
    return params.number(request.query_params, "threshold", 0.98, LOWEST, 1)


def _page(request: Request, groups: list[ImageGroup]) -> dict[str, Any]:
    state = state_of(request)
    start = params.whole(request.query_params, "start", 0, 0, len(groups))
    shown = []
    for group in groups[start : start + PAGE]:
        members = [state.describe(id) for id in group.ids[:MEMBERS]]
        shown.append({"cosine": group.cosine, "size": len(group.ids), "members": members})
    return {"groups": shown, "total": len(groups), "extra": sum(len(group.ids) - 1 for group in groups)}
