"""Queries that name several of the start's classes, such as "animal": images of these classes are compared too.

The sentence encoder knows what an animal is called, the classifier what 398 animals look like.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.data.asset_files import read_lines
from declip.models.neighbors import NeighborProjection
from declip.models.posteriors import PosteriorProjection
from declip.recipe.starts import STARTS

CLASSES = 1_000  # of ImageNet, whose numbers the table has
ARTICLE = re.compile("^(a|an|the) ")


def add_classes(vector: Tensor, text: str, text_model: Any, model: Callable[[], Any]) -> Tensor:
    """Average the vector (d,) of a text with that of its classes as images, if it is a word for several of them.

    The model must be or begin as a built-in start, whose classifier knows what "animal" looks like; it is only called
    for such a word.
    """
    classes = classes_of(text, text_model)
    if not classes:
        return vector
    images = class_direction(model(), classes)
    if images is None:
        return vector
    return normalize(vector + images.to(vector), dim=0)


def classes_of(query: str, model: Any) -> tuple[int, ...]:
    """Numbers of the classes that a query is a word for, if the model began as a built-in start."""
    recipe = model.recipe
    if recipe is None or recipe.text.hf_model not in STARTS:
        return ()
    word = " ".join(query.lower().split()).rstrip(".")
    return _table().get(ARTICLE.sub("", word), ())


@cache
def _table() -> dict[str, tuple[int, ...]]:
    """The shipped table, read once per process: classes by word, in singular and plural."""
    classes = dict[str, tuple[int, ...]]()
    for line in read_lines("class_words.txt"):
        words, numbers = line.split("\t")
        own = tuple(map(int, numbers.split()))
        classes |= dict.fromkeys(words.split("|"), own)
    return classes


@torch.no_grad()
def class_direction(model: Any, classes: tuple[int, ...]) -> Tensor | None:
    """Return the mean of classes as images, (d,) float32 of length 1 on the CPU; None without their classifier."""
    projection = model.image_tower.proj
    classifier = projection
    if isinstance(projection, NeighborProjection):
        classifier = projection.projection
    if not isinstance(classifier, PosteriorProjection) or len(classifier.classes) != CLASSES:
        return None
    embedded = projection.embed_classes().float()[list(classes)]
    mean = normalize(embedded, dim=-1).mean(dim=0)
    return normalize(mean, dim=0).cpu()
