"""What a model gets right and wrong on held-out pairs: retrieval both ways, and the classes it confuses."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from declip.evaluation.encode import SourceFeatures
from declip.evaluation.retrieval import carriers_of, ranks
from declip.evaluation.zero_shot import predict
from declip.reports.thumbnails import Picture, Pictures


@dataclass(frozen=True)
class Hit:
    """One retrieved candidate."""

    rank: int
    right: bool
    cosine: float
    words: str
    picture: Picture | None = None


@dataclass(frozen=True)
class Query:
    """A caption or an image, what it found, and its own candidate when that came too late to be shown."""

    words: str
    picture: Picture | None
    right: bool
    hits: list[Hit]
    own: Hit


@dataclass(frozen=True)
class Gallery:
    """Queries in one direction, drawn at random from those found at once and those not."""

    queries: list[Query]
    candidates: int
    right_share: float


@dataclass(frozen=True)
class Confusion:
    """Images of one class that were taken for another."""

    true: str
    taken_for: str
    true_picture: Picture | None
    taken_for_picture: Picture | None
    count: int
    of: int
    margin: float


@dataclass(frozen=True)
class Magnet:
    """A class that many wrong answers name, and images that were taken for it."""

    name: str
    picture: Picture | None
    count: int
    examples: list[Picture]


@dataclass(frozen=True)
class Confusions:
    """The wrong answers of zero-shot classification."""

    rows: list[Confusion]
    magnets: list[Magnet]
    wrong: int
    n: int
    single: bool


def text_to_image(
    features: SourceFeatures, pictures: Pictures, rng: np.random.Generator, each: int = 4, shown: int = 5
) -> Gallery:
    """Captions and the images nearest to them.

    Args:
        features: A source, images and captions encoded.
        pictures: Of the same source.
        rng: Chooses the captions.
        each: How many captions of those whose image comes first, and of those whose image does not.
        shown: How many images for each.
    """
    assert features.texts is not None
    words, carriers = features.words, carriers_of(features)
    right = [carriers[word] for word in words]
    rank = ranks(features.texts, features.images, right)
    chosen = _draw(rank, features.owners, rng, each)
    found, cosines = predict(features.texts[chosen], features.images, shown)

    def hit(row: int, image: int, place: int, cosine: float) -> Hit:
        picture = pictures.at(int(features.indices[image]))
        return Hit(place, image in right[row], cosine, features.captions[image][0], picture)

    queries = []
    for row, images, values in zip(chosen, found.tolist(), cosines.tolist(), strict=True):
        hits = [hit(row, image, place, c) for place, (image, c) in enumerate(zip(images, values, strict=True), 1)]
        own = int(features.owners[row])
        cosine = float(features.texts[row] @ features.images[own])
        queries.append(Query(words[row], None, rank[row] == 1, hits, hit(row, own, int(rank[row]), cosine)))
    return Gallery(queries, len(features), float(np.mean(rank == 1)))


def image_to_text(
    features: SourceFeatures, pictures: Pictures, rng: np.random.Generator, each: int = 3, shown: int = 5
) -> Gallery:
    """Images and the captions nearest to them; a caption that several images carry is listed once.

    Args:
        features: A source, images and captions encoded.
        pictures: Of the same source.
        rng: Chooses the images.
        each: How many images of those with an own caption first, and of those without.
        shown: How many captions for each.
    """
    assert features.texts is not None
    row_of = {word: row for row, word in reversed(list(enumerate(features.words)))}
    words, texts = list(row_of), features.texts[torch.tensor(list(row_of.values()))]
    place_of = {word: place for place, word in enumerate(words)}
    right = [np.array(sorted({place_of[word] for word in own})) for own in features.captions]
    rank = ranks(features.images, texts, right)
    chosen = _draw(rank, np.arange(len(features)), rng, each)
    found, cosines = predict(features.images[chosen], texts, shown)
    queries = []
    for row, places, values in zip(chosen, found.tolist(), cosines.tolist(), strict=True):
        hits = [
            Hit(rank_, place in right[row], cosine, words[place])
            for rank_, (place, cosine) in enumerate(zip(places, values, strict=True), 1)
        ]
        own = texts[torch.from_numpy(right[row])] @ features.images[row]
        best = Hit(int(rank[row]), True, float(own.max()), words[right[row][int(own.argmax())]])
        picture = pictures.at(int(features.indices[row]))
        queries.append(Query(features.captions[row][0], picture, rank[row] == 1, hits, best))
    return Gallery(queries, len(words), float(np.mean(rank == 1)))


def confusions(
    features: SourceFeatures,
    labels: np.ndarray,
    class_names: Sequence[str],
    classes: Tensor,
    pictures: Pictures,
    count: int = 12,
) -> Confusions:
    """The pairs of classes confused most often, then most surely, and the classes named most often in error.

    Args:
        features: The images of a source, encoded.
        labels: (n,) class of each row of `features`.
        class_names: C names.
        classes: (C, d) text features of the classes.
        pictures: Of the same source.
        count: Pairs shown at most.
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

    def picture(row: int | None) -> Picture | None:
        return None if row is None else pictures.at(int(features.indices[row]))

    rows = [
        Confusion(
            true=class_names[true],
            taken_for=class_names[other],
            true_picture=picture(rows_of[true, other][0]),
            taken_for_picture=picture(example.get(other)),
            count=len(rows_of[true, other]),
            of=int(size[true]),
            margin=margin[true, other],
        )
        for true, other in order[:count]
    ]
    magnets = []
    for label, times in Counter(taken_for[wrong].tolist()).most_common(6):
        drawn = [picture(row) for row in wrong[taken_for[wrong] == label][:6].tolist()]
        examples = [each for each in drawn if each is not None]
        if times > 1:
            magnets.append(Magnet(class_names[label], picture(example.get(label)), times, examples))
    return Confusions(rows, magnets, len(wrong), len(labels), single=bool(size.max() <= 1))


def _draw(rank: np.ndarray, owners: np.ndarray, rng: np.random.Generator, each: int) -> list[int]:
    """Rows found at once, then rows not, `each` of both where there are enough, no owner twice."""
    chosen: list[int] = []
    for group in (np.flatnonzero(rank == 1), np.flatnonzero(rank > 1)):
        taken = {int(owners[row]) for row in chosen}
        fresh = [row for row in rng.permutation(group).tolist() if int(owners[row]) not in taken]
        by_owner = {int(owners[row]): row for row in fresh}
        chosen += list(by_owner.values())[:each]
    return chosen
