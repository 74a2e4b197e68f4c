"""Examples of what a model gets right and wrong on held-out pairs: retrieval both ways, and confused classes."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from declip.evaluation.encode import SourceFeatures
from declip.evaluation.retrieval import carriers_of, ranks
from declip.evaluation.zero_shot import predict
from declip.reports.thumbnails import Thumbnail, ThumbnailCache


@dataclass(frozen=True)
class Candidate:
    """One retrieved candidate."""

    rank: int
    right: bool
    cosine: float
    words: str
    image: Thumbnail | None = None


@dataclass(frozen=True)
class Query:
    """A caption or an image, its best candidates, and its own candidate."""

    words: str
    image: Thumbnail | None
    right: bool
    hits: list[Candidate]
    own: Candidate


@dataclass(frozen=True)
class RetrievalExamples:
    """Random queries in one direction, some that ranked their own candidate first and some that did not."""

    queries: list[Query]
    candidates: int
    right_fraction: float


@dataclass(frozen=True)
class Confusion:
    """Images of one class that got the name of another."""

    true: str
    taken_for: str
    true_image: Thumbnail | None
    taken_for_image: Thumbnail | None
    count: int
    of: int
    margin: float


@dataclass(frozen=True)
class Magnet:
    """A class that many wrong answers name, and images that got its name."""

    name: str
    image: Thumbnail | None
    count: int
    examples: list[Thumbnail]


@dataclass(frozen=True)
class Confusions:
    """The wrong answers of zero-shot classification."""

    rows: list[Confusion]
    magnets: list[Magnet]
    wrong: int
    n: int
    single: bool


def text_to_image(
    features: SourceFeatures, thumbnails: ThumbnailCache, rng: np.random.Generator, each: int = 4, shown: int = 5
) -> RetrievalExamples:
    """Random captions, `each` of those that rank their image first and of the others, and the nearest images."""
    assert features.texts is not None
    words, carriers = features.words, carriers_of(features)
    right = [carriers[word] for word in words]
    rank = ranks(features.texts, features.images, right)
    chosen = _sample(rank, features.owners, rng, each)
    found, cosines = predict(features.texts[chosen], features.images, shown)

    def hit(row: int, image: int, place: int, cosine: float) -> Candidate:
        shown_image = thumbnails.at(int(features.indices[image]))
        return Candidate(place, image in right[row], cosine, features.captions[image][0], shown_image)

    queries = []
    for row, images, values in zip(chosen, found.tolist(), cosines.tolist(), strict=True):
        hits = [hit(row, image, place, c) for place, (image, c) in enumerate(zip(images, values, strict=True), 1)]
        own = int(features.owners[row])
        cosine = float(features.texts[row] @ features.images[own])
        queries.append(Query(words[row], None, rank[row] == 1, hits, hit(row, own, int(rank[row]), cosine)))
    return RetrievalExamples(queries, len(features), float(np.mean(rank == 1)))


def image_to_text(
    features: SourceFeatures, thumbnails: ThumbnailCache, rng: np.random.Generator, each: int = 3, shown: int = 5
) -> RetrievalExamples:
    """Random images and the captions nearest to them; a caption that several images have is listed once."""
    assert features.texts is not None
    row_of = {word: row for row, word in reversed(list(enumerate(features.words)))}
    words, texts = list(row_of), features.texts[torch.tensor(list(row_of.values()))]
    place_of = {word: place for place, word in enumerate(words)}
    right = [np.array(sorted({place_of[word] for word in own})) for own in features.captions]
    rank = ranks(features.images, texts, right)
    chosen = _sample(rank, np.arange(len(features)), rng, each)
    found, cosines = predict(features.images[chosen], texts, shown)
    queries = []
    for row, places, values in zip(chosen, found.tolist(), cosines.tolist(), strict=True):
        hits = [
            Candidate(rank_, place in right[row], cosine, words[place])
            for rank_, (place, cosine) in enumerate(zip(places, values, strict=True), 1)
        ]
        own = texts[torch.from_numpy(right[row])] @ features.images[row]
        best = Candidate(int(rank[row]), True, float(own.max()), words[right[row][int(own.argmax())]])
        shown_image = thumbnails.at(int(features.indices[row]))
        queries.append(Query(features.captions[row][0], shown_image, rank[row] == 1, hits, best))
    return RetrievalExamples(queries, len(words), float(np.mean(rank == 1)))


def confusions(
    features: SourceFeatures,
    labels: np.ndarray,
    class_names: Sequence[str],
    classes: Tensor,
    thumbnails: ThumbnailCache,
    count: int = 12,
) -> Confusions:
    """The pairs of classes confused most often, then most confidently, and the classes given most often by mistake.

    Args:
        classes: (C, d) text features of the classes.
    """
    found, cosines = predict(features.images, classes)
    taken_for, nearest = found[:, 0], cosines[:, 0]
    own = (features.images * classes[torch.from_numpy(labels)]).sum(1).numpy()
    wrong = np.flatnonzero(taken_for != labels)
    rows_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in wrong.tolist():
        rows_of[int(labels[row]), int(taken_for[row])].append(row)
    margin = {pair: float(np.mean(nearest[rows] - own[rows])) for pair, rows in rows_of.items()}
    order = sorted(rows_of, key=lambda pair: (-len(rows_of[pair]), -margin[pair]))
    example = {int(label): row for row, label in reversed(list(enumerate(labels)))}
    size = np.bincount(labels, minlength=len(class_names))

    def thumbnail(row: int | None) -> Thumbnail | None:
        return None if row is None else thumbnails.at(int(features.indices[row]))

    rows = [
        Confusion(
            true=class_names[true],
            taken_for=class_names[other],
            true_image=thumbnail(rows_of[true, other][0]),
            taken_for_image=thumbnail(example.get(other)),
            count=len(rows_of[true, other]),
            of=int(size[true]),
            margin=margin[true, other],
        )
        for true, other in order[:count]
    ]
    magnets = []
    for label, times in Counter(taken_for[wrong].tolist()).most_common(6):
        shown_images = [thumbnail(row) for row in wrong[taken_for[wrong] == label][:6].tolist()]
        examples = [each for each in shown_images if each is not None]
        if times > 1:
            magnets.append(Magnet(class_names[label], thumbnail(example.get(label)), times, examples))
    return Confusions(rows, magnets, len(wrong), len(labels), single=bool(size.max() <= 1))


def _sample(rank: np.ndarray, owners: np.ndarray, rng: np.random.Generator, each: int) -> list[int]:
    """Rows found at once, then rows not, `each` of both where there are enough, no owner twice."""
    chosen: list[int] = []
    for group in (np.flatnonzero(rank == 1), np.flatnonzero(rank > 1)):
        taken = {int(owners[row]) for row in chosen}
        fresh = [row for row in rng.permutation(group).tolist() if int(owners[row]) not in taken]
        by_owner = {int(owners[row]): row for row in fresh}
        chosen += list(by_owner.values())[:each]
    return chosen
