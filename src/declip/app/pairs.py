"""Answers of the pairs view: disagreeing captions, near-duplicates, and lists of the marked and the other pairs."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, RootModel
from torch import Tensor

from declip.app.requests import ImageId
from declip.app.state import AppState
from declip.data.pair import printable
from declip.data.sources.names import resolve
from declip.data.sources.open import ImageSource, open_source
from declip.data.sources.pair_list import LIST_KIND, write_others
from declip.errors import UserError
from declip.inspection.reading import components
from declip.io.atomic import write_text

PAGE = 24  # pairs or groups that are sent at a time
MEMBERS = 12  # images of a group that are shown
# rows whose vectors are in memory at a time, and images that are searched at a time
BLOCK = 4_096
QUERIES = 512
BARS = 40  # bars of the histogram
NEAREST = 8  # nearest images of each image: larger groups are joined through several members
# Of all captions, the worst share that is listed at first: so at most this share of right captions is listed, in any
# set. A rank below 0.5 is listed only if it is asked for. Measured by benchmarks/wrong_pairs.py.
LISTED = 0.02
LOWEST_RANK = 0.5
DIGITS = 3  # of a limit, as the page shows it
LOWEST = 0.8  # cosine below which two images are never shown as near-duplicates
# Images that are compared with each other, which takes about a minute on two cores
MOST_COMPARED = 50_000
# Tolerance of thresholds: copies of an image have cosines of 0.9999 to 1.0001 in float16; the page shows 3 digits.
ROUNDING = 5e-4
HINT = "choose a writable folder with --index"

Reason = Literal["image and caption disagree", "near-duplicate image"]


class Marked(RootModel[dict[Reason, list[ImageId]]]):
    """Ids of pairs to leave out, by the reason."""


@dataclass(frozen=True)
class MarkedPair:
    """A pair to leave out, as a line of the list has it."""

    key: str
    index: int  # in the source
    reason: Reason
    cosine: float | None
    caption: str


class PairsQuestion(BaseModel):
    """The first row of a page, and limits: of cosines or ranks, and of cosines of near-duplicates."""

    start: int = Field(0, ge=0)
    limit: float | None = Field(None, ge=-1, le=1)
    threshold: float = Field(0.98, ge=LOWEST, le=1)


class Agreement(NamedTuple):
    """How well each caption and its image fit, the worst first."""

    ids: np.ndarray  # (c,) int64, the image of each caption
    captions: list[str]
    values: np.ndarray  # (c,) float32, out-of-fold ranks, 0 best and 1 worst, or else cosines
    ranked: bool
    limit: float  # beyond which a caption is listed unless another limit is asked for


def compare_captions(state: AppState) -> Agreement:
    """Compare each caption of an index with its image: by out-of-fold rank if there are any, else by cosine."""
    ranked = bool(state.ranks)
    rows = [(*pair, rank) for pair, rank in state.ranks.items()]
    if not ranked:
        rows = list(_cosines(state))
    values = np.array([value for _, _, value in rows], np.float32)
    # --- the worst first, and the share that is listed
    rising = values
    share = LISTED
    if ranked:
        rising = -values
        share = 1 - LISTED
    order = np.argsort(rising, kind="stable")
    limit = round(float(np.quantile(values, share)), DIGITS)
    if ranked:
        limit = max(limit, LOWEST_RANK)
    ids = np.array([id for id, _, _ in rows])[order]
    captions = [rows[row][1] for row in order.tolist()]
    return Agreement(ids, captions, values[order], ranked, limit)


def _cosines(state: AppState) -> Iterator[tuple[int, str, float]]:
    """Each image of the index with each of its captions and their cosine."""
    index = state.index
    captions = index.captions()
    if not any(captions):
        raise UserError(
            f"No image of {index.info.source.name} has a caption, so none can be wrong. Type captions with "
            "`declip app MODEL SOURCE --caption captions.csv`, or open a table of pairs. "
            "Near-duplicate images are found without captions, below."
        )
    for start in range(0, len(captions), BLOCK):
        state.check_running()
        ids = index.ids[start : start + BLOCK]
        own = captions[start : start + BLOCK]
        images = index.vectors(ids)
        texts = index.vectors(ids, "captions")  # the mean of an image's captions
        several = list(chain.from_iterable(each for each in own if len(each) > 1))
        encoded = dict[str, Tensor]()
        if several:
            encoded = dict(zip(several, state.text_vectors(several), strict=True))
        for id, image, mean, each in zip(ids.tolist(), images, texts, own, strict=True):
            for caption in each:
                text = encoded[caption] if len(each) > 1 else mean
                yield id, caption, float(image @ text)


def disagreeing(state: AppState, asked: PairsQuestion) -> dict[str, Any]:
    """The distribution of values, and a page of the captions beyond a limit, the worst first.

    Captions with cosines are shown beside the caption nearest to the image.
    """
    agreement = state.once(compare_captions)
    values = agreement.values
    ranked = agreement.ranked
    limit = agreement.limit
    if asked.limit is not None:
        limit = asked.limit
    listed = values > limit if ranked else values < limit
    total = int(listed.sum())
    page = slice(asked.start, min(asked.start + PAGE, total))
    ids = agreement.ids[page]
    rows = state.describe(ids)
    captions = agreement.captions[page]
    shown = values[page].tolist()
    for row, caption, value in zip(rows, captions, shown, strict=True):
        others = len(row["captions"]) - 1
        row |= {"captions": [printable(caption)], "others": others, "value": value}
    if not ranked and len(ids):
        images = state.index.vectors(ids)
        nearest, _ = state.index.nearest(images, 1, over="captions")
        described = state.describe(nearest.flatten().numpy())
        for row, near in zip(rows, described, strict=True):
            row["nearest"] = near["captions"][0]
    counts, edges = np.histogram(values, BARS)
    captioned = len(np.unique(agreement.ids))
    return {
        "rows": rows,
        "total": total,
        "captions": len(values),
        "without": len(state.index) - captioned,
        "ranked": ranked,
        "counts": counts.tolist(),
        "edges": edges.tolist(),
        "median": float(np.median(values)),
        "limit": limit,
    }


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
        joined = np.stack([self.one[chosen], self.other[chosen]])
        ids, nodes = np.unique(joined, return_inverse=True)
        edges = nodes.reshape(2, -1)  # numbers of ids, two for each pair
        label = components(len(ids), edges)
        largest = np.full(label.max() + 1, -np.inf, np.float32)
        np.maximum.at(largest, label[edges[0]], self.cosines[chosen])
        order = np.argsort(label, kind="stable")
        ends = np.cumsum(np.bincount(label))
        members = np.split(ids[order], ends[:-1])
        groups = []
        for own, top in zip(members, largest.tolist(), strict=True):
            groups.append((own.tolist(), top))
        return sorted(groups, key=lambda group: (-group[1], group[0]))


def find_similar(state: AppState) -> SimilarImages:
    """Compare the images of an index with each other."""
    index = state.index
    ids = state.index.ids
    if len(ids) > MOST_COMPARED:
        limit = f"the limit is {MOST_COMPARED:,}. Use `declip data inspect --all`."
        raise UserError(f"{len(ids):,} images are too many, {limit}")
    # --- nearest images of blocks of images, without themselves
    blocks = []
    for start in range(0, len(ids), QUERIES):
        state.check_running()
        block = ids[start : start + QUERIES]
        # (q, NEAREST + 1) each, as every image is its own nearest
        found = index.nearest(index.vectors(block), NEAREST + 1)
        near = found[0].numpy()
        cosines = found[1].numpy()
        query_ids = np.repeat(block, near.shape[1]).reshape(near.shape)
        alike = (near != query_ids) & (cosines >= LOWEST)
        blocks.append((query_ids[alike], near[alike], cosines[alike]))
    return SimilarImages(*map(np.concatenate, zip(*blocks, strict=True)))


def duplicates(state: AppState, asked: PairsQuestion) -> dict[str, Any]:
    """A page of groups with cosines of at least the threshold, and the ids of all but the first of each."""
    groups = state.once(find_similar).groups(asked.threshold)
    rows = []
    for ids, cosine in groups[asked.start : asked.start + PAGE]:
        members = state.describe(ids[:MEMBERS])
        rows.append({"cosine": cosine, "size": len(ids), "members": members})
    marked = list(chain.from_iterable(ids[1:] for ids, _ in groups))
    return {"rows": rows, "total": len(groups), "marked": marked}


def save_list(state: AppState, marked: Marked) -> dict[str, Any]:
    """Write two lists beside the index: of the marked pairs with reasons, and of all others, to train on.

    Pairs that have left the index since they were marked are omitted.
    """
    index = state.index
    saved = state.index.info.source
    pairs = _marked_pairs(state, marked)
    if not pairs:
        raise UserError("The list is empty.")
    folder = os.path.relpath(index.folder.resolve())
    drop = Path(f"{folder}.drop.jsonl")
    rest = Path(f"{folder}{LIST_KIND}")
    with state.reading:
        lines = [json.dumps(vars(pair)) + "\n" for pair in pairs]
        write_text(drop, "".join(lines), HINT)
        # --- the other pairs of the source
        if not saved.path:
            raise UserError(
                f"'{drop}' is written, but no list of the others: the source was a Python object."
            )
        spec = resolve(saved.path, index.folder)
        columns = saved.columns_of(index.folder)
        source = open_source(spec, columns)
        images = ImageSource(source)
        for pair in pairs:
            if pair.index >= len(source) or images[pair.index].key != pair.key:
                problem = f"'{source.name}' has changed since it was embedded"
                difference = f"its pair {pair.index} is not '{printable(pair.key)}'"
                raise UserError(f"{problem}: {difference}. Run the command again.")
        count = write_others(rest, spec, columns, source, {pair.index for pair in pairs})
    return {"drop": str(drop), "rest": str(rest), "count": count}


def _marked_pairs(state: AppState, marked: Marked) -> list[MarkedPair]:
    """The marked pairs in the order of the index, each with its worst caption if captions were compared."""
    index = state.index
    agreement = state.compared.get(compare_captions)
    worst: dict[int, tuple[str, float | None]] = {}  # caption and cosine, by image
    if agreement is not None:
        ids = agreement.ids.tolist()
        values = agreement.values.tolist()
        for id, caption, value in zip(ids, agreement.captions, values, strict=True):
            cosine = None
            if not agreement.ranked:
                cosine = value
            worst.setdefault(id, (caption, cosine))
    pairs = dict[int, MarkedPair]()
    for reason, chosen in marked.root.items():
        for row in index.rows(np.intersect1d(chosen, index.ids)):
            caption, cosine = worst.get(row.id, (row.caption, None))
            pair = MarkedPair(row.key, row.index, reason, cosine, caption)
            pairs.setdefault(row.id, pair)
    return [pairs[id] for id in sorted(pairs)]
