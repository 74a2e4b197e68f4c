"""Answers of the pairs view: disagreeing captions, near-duplicates, and lists of the marked and the other pairs."""

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field, RootModel

from declip.app.requests import ImageId
from declip.app.state import AppState
from declip.data.pair import printable
from declip.data.sources.names import resolve
from declip.data.sources.open import ImageSource, open_source
from declip.data.sources.subset import LIST_KIND, write_others
from declip.errors import UserError
from declip.inspection.reading import components
from declip.io.atomic import write_text

PAGE = 24  # pairs or groups that are sent at a time
MEMBERS = 12  # images of a group that are shown
BLOCK, QUERIES = 4_096, 512  # rows whose vectors are in memory at a time, and images that are searched at a time
BARS = 40  # bars of the histogram
NEAREST = 8  # nearest images of each image: larger groups are joined through several members
LOWEST = 0.8  # cosine below which two images are never shown as near-duplicates
MOST_COMPARED = 50_000  # images that are compared with each other, which takes about a minute on two cores
# Tolerance of thresholds: copies of an image have cosines of 0.9999 to 1.0001 in float16; the page shows 3 digits.
ROUNDING = 5e-4
ELSEWHERE = "choose a writable folder with --index"

Reason = Literal["image and caption disagree", "near-duplicate image"]


class Marked(RootModel[dict[Reason, list[ImageId]]]):
    """Ids of pairs to leave out, by the reason."""


class PairsQuestion(BaseModel):
    """The first row of a page, and limits: of cosines or ranks, and of cosines of near-duplicates."""

    start: int = Field(0, ge=0)
    limit: float | None = Field(None, ge=-1, le=1)
    threshold: float = Field(0.98, ge=LOWEST, le=1)


class Agreement(NamedTuple):
    """How well each image and its captions fit."""

    ids: np.ndarray  # (n,) int64, the images with a value, the worst first
    values: np.ndarray  # (n,) float32, their cosines, or out-of-fold ranks: 0 best, 1 worst
    median: float
    spread: float  # standard deviation, estimated from the median absolute deviation


def compare_captions(state: AppState) -> Agreement:
    """Compare each image of an index with its captions: by out-of-fold ranks if there are any, else by cosines."""
    index, ids, ranks = state.index, state.index.ids, state.ranks
    if not any(index.captions()):
        raise UserError(
            f"No image of {index.info.source.name} has a caption, so none can be wrong. Type captions with "
            "`declip app MODEL SOURCE --caption captions.csv`, or open a table of pairs. "
            "Near-duplicate images are found without captions, below."
        )
    # --- values in the order of the ids, NaN where there is none
    values = np.array([ranks.get(id, np.nan) for id in ids.tolist()], np.float32)
    for start in () if ranks else range(0, len(ids), BLOCK):
        state.check_running()
        block = slice(start, start + BLOCK)
        texts = index.vectors(ids[block], "captions")
        products = (index.vectors(ids[block]) * texts).sum(1)
        values[block] = torch.where(texts.any(1), products, torch.nan).numpy()
    # --- the worst first
    known = int(np.isfinite(values).sum())
    if not known:
        raise UserError("No image of this index has a caption to compare with.")
    order = np.argsort(-values if ranks else values, kind="stable")[:known]  # NaN comes last
    values = values[order]
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - median)))  # of normal values, their standard deviation
    return Agreement(ids[order], values, median, spread)


def disagreeing(state: AppState, asked: PairsQuestion) -> dict[str, Any]:
    """The distribution of values, a page of the worst pairs, and the ids of all pairs beyond a limit.

    Each pair is shown with the caption nearest to its image.
    """
    agreement, ranked = state.once(compare_captions), bool(state.ranks)
    ids, values, median, spread = agreement
    shown = ids[asked.start : asked.start + PAGE]
    nearest = state.index.nearest(state.index.vectors(shown), 1, over="captions")[0].flatten().numpy()
    rows = [
        {**row, "value": value, "deviations": (value - median) / (spread or 1), "nearest": near["captions"][0]}
        for row, value, near in zip(
            state.describe(shown), values[asked.start :].tolist(), state.describe(nearest), strict=False
        )
    ]
    # A wrong caption has any rank; a right one is rarely worse than half of all others.
    usual = 0.5 if ranked else median - 3 * spread
    counts, edges = np.histogram(values, BARS)
    # NaN, of no limit, is neither above nor below.
    limit = np.nan if asked.limit is None else asked.limit
    marked = ids[values > limit if ranked else values < limit].tolist()
    answer = {"rows": rows, "total": len(ids), "without": len(state.index) - len(ids), "ranked": ranked}
    answer |= {"counts": counts.tolist(), "edges": edges.tolist(), "median": median, "spread": spread}
    return {**answer, "limit": usual, "marked": marked}


class SimilarImages(NamedTuple):
    """Pairs of images whose cosine is `LOWEST` or more, most of them twice."""

    one: np.ndarray  # (m,) ids
    other: np.ndarray  # (m,) ids
    cosines: np.ndarray  # (m,)

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


def find_similar(state: AppState) -> SimilarImages:
    """Compare the images of an index with each other."""
    index, ids = state.index, state.index.ids
    if len(ids) > MOST_COMPARED:
        limit = f"the limit is {MOST_COMPARED:,}. Use `declip data inspect --all`."
        raise UserError(f"{len(ids):,} images are too many, {limit}")
    # --- nearest images of blocks of images, without themselves
    blocks = []
    for start in range(0, len(ids), QUERIES):
        state.check_running()
        block = ids[start : start + QUERIES]
        # (q, NEAREST + 1) each, as every image is its own nearest
        near, cosines = (tensor.numpy() for tensor in index.nearest(index.vectors(block), NEAREST + 1))
        query_ids = np.repeat(block, near.shape[1]).reshape(near.shape)
        alike = (near != query_ids) & (cosines >= LOWEST)
        blocks.append((query_ids[alike], near[alike], cosines[alike]))
    return SimilarImages(*map(np.concatenate, zip(*blocks, strict=True)))


def duplicates(state: AppState, asked: PairsQuestion) -> dict[str, Any]:
    """A page of groups with cosines of at least the threshold, and the ids of all but the first of each."""
    groups = state.once(find_similar).groups(asked.threshold)
    rows = [
        {"cosine": cosine, "size": len(ids), "members": state.describe(ids[:MEMBERS])}
        for ids, cosine in groups[asked.start : asked.start + PAGE]
    ]
    return {"rows": rows, "total": len(groups), "marked": [id for ids, _ in groups for id in ids[1:]]}


def save_list(state: AppState, marked: Marked) -> dict[str, Any]:
    """Write two lists beside the index: of the marked pairs with reasons, and of all others, to train on.

    Pairs that have left the index since they were marked are omitted.
    """
    index, saved = state.index, state.index.info.source
    agreement: Agreement | None = None if state.ranks else state.compared.get(compare_captions)
    cosines = {} if agreement is None else dict(zip(agreement.ids.tolist(), agreement.values.tolist(), strict=True))
    rows: dict[int, tuple[str, int, str, float | None, str]] = {}
    for reason, ids in marked.root.items():
        for row in index.rows(np.intersect1d(ids, index.ids)):
            rows.setdefault(row.id, (row.key, row.index, reason, cosines.get(row.id), row.caption))
    if not rows:
        raise UserError("The list is empty.")
    drop, rest = (Path(os.path.relpath(f"{index.folder.resolve()}{end}")) for end in (".drop.jsonl", LIST_KIND))
    with state.reading:
        names = ("key", "index", "reason", "cosine", "caption")
        lines = (json.dumps(dict(zip(names, rows[id], strict=True))) + "\n" for id in sorted(rows))
        write_text(drop, "".join(lines), ELSEWHERE)
        # --- the other pairs of the source
        if not saved.path:
            raise UserError(f"'{drop}' is written, but no list of the others: the source was a Python object.")
        spec, columns = resolve(saved.path, index.folder), saved.columns_of(index.folder)
        source = open_source(spec, columns)
        images = ImageSource(source)
        for key, place, *_ in rows.values():
            if place >= len(source) or images.key(place) != key:
                problem = (
                    f"'{source.name}' has changed since it was embedded: its pair {place} is not '{printable(key)}'"
                )
                raise UserError(f"{problem}. Run the command again.")
        count = write_others(rest, spec, columns, source, {place for _, place, *_ in rows.values()})
    return {"drop": str(drop), "rest": str(rest), "count": count}
