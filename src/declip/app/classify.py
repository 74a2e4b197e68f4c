"""Classify: the probabilities of classes that the user names, for a picture."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from declip.app import asked
from declip.app.gallery import Gallery
from declip.app.uploads import LARGEST_PICTURE, read_body, read_json, read_picture
from declip.evaluation.zero_shot import class_features, read_templates

MOST_CLASSES = 1_000
LONGEST_CLASS = 200
"""Characters."""

MOST_PROMPTS = 8_000
"""Classes times templates: all are encoded while the page waits."""

MOST_KEPT = 16
"""Sets of classes whose vectors are kept."""


class Classes:
    """Vectors of classes, kept while the same are asked for again.

    Args:
        gallery: Has the model.
    """

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._kept: OrderedDict[tuple[str | None, tuple[str, ...]], Tensor] = OrderedDict()

    def vectors(self, names: Sequence[str], template: str | None) -> Tensor:
        """(C, d); raises `HTTPException` where there are too many, `UserError` for an unknown template set."""
        templates = ["{}"] if template is None else read_templates(template)[1]
        if len(names) * len(templates) > MOST_PROMPTS:
            raise asked.wrong(
                f"{len(names):,} classes with {len(templates)} templates each are {len(names) * len(templates):,} "
                f"texts; at most {MOST_PROMPTS:,} are encoded at once. Name fewer classes or take one template."
            )
        key = (template, tuple(names))
        with self._gallery.lock:
            if key not in self._kept:
                self._kept[key] = class_features(self._gallery.index.model, names, templates)
            self._kept.move_to_end(key)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]


async def send_picture(request: Request) -> Response:
    """Take a picture: its vector is kept under the token in the answer, the picture itself is forgotten."""
    gallery: Gallery = request.app.state.gallery
    async with request.app.state.uploads:
        content = await read_body(request, LARGEST_PICTURE)
        vector = await run_in_threadpool(lambda: gallery.query(None, read_picture(content)))
    return JSONResponse({"picture": gallery.kept.add(vector)})


async def classify(request: Request) -> Response:
    """Answer {"picture" or "id", "classes", "template"} with the classes' probabilities, the largest first."""
    gallery: Gallery = request.app.state.gallery
    classes: Classes = request.app.state.classes
    given = await read_json(request)
    names = _names(given.get("classes"))
    template = asked.template(given.get("template", ""))
    vector = await run_in_threadpool(asked.picture, gallery, given.get("picture"), given.get("id"))
    if vector is None:
        raise asked.wrong("There is no picture yet. Choose one first.")
    vectors = await run_in_threadpool(classes.vectors, names, template)
    return JSONResponse({"classes": probabilities(vector, vectors, names, gallery.scale), "scale": gallery.scale})


def probabilities(image: Tensor, classes: Tensor, names: Sequence[str], scale: float) -> list[dict[str, Any]]:
    """The softmax over the classes of scale · cosine, as CLIP trains it.

    Args:
        image: (d,) of length 1.
        classes: (C, d) of length 1.
        names: The C names.
        scale: exp(logit scale).

    Returns:
        Of each class its name, probability and cosine, the most probable first.
    """
    cosines = classes @ image
    shares = torch.softmax(scale * cosines.double(), dim=0)
    order = shares.argsort(descending=True, stable=True).tolist()
    return [{"name": names[i], "probability": float(shares[i]), "cosine": float(cosines[i])} for i in order]


def _names(given: object) -> list[str]:
    if not isinstance(given, list):
        raise asked.wrong("Classes must be a list of names.")
    names = [asked.words(name, "name of a class", LONGEST_CLASS) for name in given[: 10 * MOST_CLASSES]]
    distinct = list(dict.fromkeys(name for name in names if name))
    if not distinct:
        raise asked.wrong("Name some classes, one a line.")
    if len(distinct) > MOST_CLASSES:
        raise asked.wrong(f"{len(distinct):,} classes are too many: at most {MOST_CLASSES:,}.")
    return distinct
