"""Examples of what a model gets right and wrong on held-out pairs: retrieval both ways, and confused classes.

`thumbnails` gives the image of a row of the features.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from declip.evaluation.encode import SourceFeatures
from declip.evaluation.retrieval import carriers_of, ranks
from declip.evaluation.zero_shot import predict
from declip.reports.thumbnails import Thumbnail, Thumbnails


@dataclass(frozen=True)
class Candidate:
    """One retrieved candidate."""

    right: bool
    cosine: float
    words: str
    image: Thumbnail | None = None


@dataclass(frozen=True)
class Query:
    """A caption or an image, its best candidates, its own candidate and that one's rank."""

    words: str
    image: Thumbnail | None
    hits: list[Candidate]
    own: Candidate
    rank: int


@dataclass(frozen=True)
class RetrievalExamples:
    """Random queries in one direction, some that ranked their own candidate first and some that did not."""

    queries: list[Query]
    candidates: int
    right_fraction: float


@dataclass(frozen=True)
class Confusions:
    """The wrong answers of zero-shot classification: `rows` of one class that got the name of another."""

    rows: list[dict[str, Any]]
    wrong: int
    n: int
    single: bool


def text_to_image(
    features: SourceFeatures, thumbnails: Thumbnails, rng: np.random.Generator, each: int = 4, shown: int = 5
) -> RetrievalExamples:
    """Random captions, `each` of those that rank their image first and of the others, and the nearest images."""
    assert features.texts is not None
    words, carriers = features.words, carriers_of(features)
    right = [carriers[word] for word in words]
    rank = ranks(features.texts, features.images, right)
    queries = []
    for row in _sample(rank, features.owners, rng, each):
        cosines = features.images @ features.texts[row]
        hits = [
            Candidate(image in right[row], cosine, features.captions[image][0], thumbnails(image))
            for cosine, image in _nearest(cosines, shown)
        ]
        own = int(features.owners[row])
        itself = Candidate(True, float(cosines[own]), features.captions[own][0], thumbnails(own))
        queries.append(Query(words[row], None, hits, itself, int(rank[row])))
    return RetrievalExamples(queries, len(features), float(np.mean(rank == 1)))


def image_to_text(
    features: SourceFeatures, thumbnails: Thumbnails, rng: np.random.Generator, each: int = 3, shown: int = 5
) -> RetrievalExamples:
    """Random images and the captions nearest to them; a caption that several images have is listed once."""
    assert features.texts is not None
    row_of = {word: row for row, word in reversed(list(enumerate(features.words)))}
    words, texts = list(row_of), features.texts[list(row_of.values())]
    place_of = {word: place for place, word in enumerate(words)}
    right = [np.array(sorted({place_of[word] for word in captions})) for captions in features.captions]
    rank = ranks(features.images, texts, right)
    queries = []
    for row in _sample(rank, np.arange(len(features)), rng, each):
        cosines = texts @ features.images[row]
        hits = [Candidate(place in right[row], cosine, words[place]) for cosine, place in _nearest(cosines, shown)]
        own = max(right[row].tolist(), key=lambda place: cosines[place])
        itself = Candidate(True, float(cosines[own]), words[own])
        image = thumbnails(row)
        queries.append(Query(features.captions[row][0], image, hits, itself, int(rank[row])))
    return RetrievalExamples(queries, len(words), float(np.mean(rank == 1)))


def confusions(
    features: SourceFeatures,
    labels: np.ndarray,
    class_names: Sequence[str],
    classes: Tensor,
    thumbnails: Thumbnails,
    count: int = 12,
) -> Confusions:
    """The pairs of classes confused most often, then most confidently.

    Args:
        classes: (C, d) text features of the classes.
    """
    found, cosines = predict(features.images, classes)
    taken_for, nearest = found[:, 0], cosines[:, 0]
    right = (features.images * classes[torch.from_numpy(labels)]).sum(1).numpy()
    wrong = np.flatnonzero(taken_for != labels).tolist()
    rows_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in wrong:
        rows_of[int(labels[row]), int(taken_for[row])].append(row)
    margin = {pair: float(np.mean(nearest[rows] - right[rows])) for pair, rows in rows_of.items()}
    order = sorted(rows_of, key=lambda pair: (-len(rows_of[pair]), -margin[pair]))
    example = {int(label): row for row, label in reversed(list(enumerate(labels)))}
    size = np.bincount(labels, minlength=len(class_names))
    rows = [
        {
            "true": class_names[true],
            "taken_for": class_names[other],
            "true_image": thumbnails(rows_of[true, other][0]),
            "taken_for_image": thumbnails(example[other]) if other in example else None,
            "count": len(rows_of[true, other]),
            "of": int(size[true]),
            "margin": margin[true, other],
        }
        for true, other in order[:count]
    ]
    return Confusions(rows, len(wrong), len(labels), single=bool(size.max() <= 1))


def _nearest(cosines: Tensor, count: int) -> list[tuple[float, int]]:
    values, places = cosines.topk(min(count, len(cosines)))
    return list(zip(values.tolist(), places.tolist(), strict=True))


def _sample(rank: np.ndarray, owners: np.ndarray, rng: np.random.Generator, each: int) -> list[int]:
    """Rows found at once, then rows not, `each` of both where there are enough, no owner twice."""
    chosen: list[int] = []
    for group in (np.flatnonzero(rank == 1), np.flatnonzero(rank > 1)):
        taken = {int(owners[row]) for row in chosen}
        by_owner = {int(owners[row]): row for row in rng.permutation(group).tolist()}
        chosen += [row for owner, row in by_owner.items() if owner not in taken][:each]
    return chosen
