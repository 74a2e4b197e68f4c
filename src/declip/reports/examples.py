"""Held-out examples on the page of a run: captions with the images that they retrieve."""

from typing import NamedTuple

import numpy as np

from declip.data.images.thumbnails import Thumbnail, Thumbnails
from declip.evaluation.encode import SourceFeatures
from declip.evaluation.retrieval import carriers_of, ranks

SHOWN = 5  # candidates of a query


class Candidate(NamedTuple):
    """A retrieved image with its first caption; it is correct if it has the caption of the query."""

    caption: str
    image: Thumbnail | None
    correct: bool


class Query(NamedTuple):
    """A caption, its nearest images, and the rank of the first correct one."""

    caption: str
    hits: list[Candidate]
    rank: int


def retrieval(
    features: SourceFeatures, thumbnails: Thumbnails, rng: np.random.Generator, each: int = 4
) -> tuple[list[Query], float]:
    """Pick random captions, `each` of those that rank their image first and of the others, with the nearest images.

    Returns:
        The captions, and the fraction of all captions that rank their image first.
    """
    assert features.texts is not None
    captions, carriers = features.flat_captions, carriers_of(features)
    correct = [carriers[caption] for caption in captions]
    rank = ranks(features.texts, features.images, correct)
    # --- random captions of distinct images, first those that rank their image first
    chosen: dict[int, int] = {}  # image → one of its captions
    for group in (np.flatnonzero(rank == 1), np.flatnonzero(rank > 1)):
        by_image = {int(features.image_rows[row]): row for row in rng.permutation(group).tolist()}
        chosen |= dict([(image, row) for image, row in by_image.items() if image not in chosen][:each])
    # --- the nearest images of each
    queries = []
    for row in chosen.values():
        nearest = (features.images @ features.texts[row]).topk(min(SHOWN, len(features))).indices  # (SHOWN,)
        hits = [Candidate(features.captions[i][0], thumbnails(i), i in correct[row]) for i in nearest.tolist()]
        queries.append(Query(captions[row], hits, int(rank[row])))
    return queries, float(np.mean(rank == 1))
