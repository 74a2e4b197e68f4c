"""Held-out examples on the page of a run: retrieved images and confused classes.

`thumbnails` returns the image of a row of the features.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from declip.data.images.thumbnails import Thumbnail, Thumbnails
from declip.evaluation.encode import SourceFeatures
from declip.evaluation.retrieval import carriers_of, ranks

SHOWN = 5  # candidates of a query


class Candidate(NamedTuple):
    """A retrieved image with its first caption; it is correct if it has the caption of the query."""

    caption: str
    image: Thumbnail | None
    cosine: float
    correct: bool


class Query(NamedTuple):
    """A caption, its nearest images, and the rank of the first correct one."""

    caption: str
    hits: list[Candidate]
    rank: int


class Confusion(NamedTuple):
    """A class, and another one that `times` of its `size` images were assigned to, each with an example image."""

    name: str
    image: Thumbnail | None
    other: str
    other_image: Thumbnail | None
    times: int
    size: int


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
    chosen: dict[int, int] = {}  # image → one of its captions
    for group in (np.flatnonzero(rank == 1), np.flatnonzero(rank > 1)):
        by_image = {int(features.image_rows[row]): row for row in rng.permutation(group).tolist()}
        chosen |= dict([(image, row) for image, row in by_image.items() if image not in chosen][:each])
    queries = []
    for row in chosen.values():
        cosines, images = (features.images @ features.texts[row]).topk(min(SHOWN, len(features)))
        hits = [
            Candidate(features.captions[image][0], thumbnails(image), cosine, image in correct[row])
            for cosine, image in zip(cosines.tolist(), images.tolist(), strict=True)
        ]
        queries.append(Query(captions[row], hits, int(rank[row])))
    return queries, float(np.mean(rank == 1))


def confusions(
    features: SourceFeatures,
    labels: np.ndarray,
    class_names: Sequence[str],
    classes: Tensor,
    thumbnails: Thumbnails,
    most: int = 12,
) -> tuple[list[Confusion], int]:
    """List the most frequent confusions of two classes, then the most confident, and count the wrong predictions.

    Args:
        classes: (C, d) text features of the classes.
    """
    highest, predicted = (part.numpy() for part in (features.images @ classes.T).max(1))
    margins = highest - (features.images * classes[torch.from_numpy(labels)]).sum(1).numpy()
    rows_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in np.flatnonzero(predicted != labels).tolist():
        rows_of[int(labels[row]), int(predicted[row])].append(row)
    order = sorted(rows_of, key=lambda pair: (-len(rows_of[pair]), -float(np.mean(margins[rows_of[pair]]))))
    example = {int(label): row for row, label in reversed(list(enumerate(labels)))}
    shown = []
    for true, other in order[:most]:
        rows, image = rows_of[true, other], thumbnails(example[other]) if other in example else None
        size = int(np.sum(labels == true))
        shown.append(Confusion(class_names[true], thumbnails(rows[0]), class_names[other], image, len(rows), size))
    return shown, int(np.sum(predicted != labels))
