"""Answers of the search view: images nearest to a text or an image, and the probabilities of classes."""

import time
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn.functional import normalize

from declip.app.requests import ImageId, OneLine, Template, Text
from declip.app.state import AppState
from declip.data.pair import printable
from declip.errors import UserError
from declip.evaluation.prompt_sets import read_templates
from declip.evaluation.zero_shot import logit_scale
from declip.search.checks import parse_where, read_classes
from declip.search.explain import has_anchors
from declip.search.index import mix
from declip.search.info import Over
from declip.search.language import language_note

MOST_PROMPTS = 8_000  # classes times templates: all are encoded while the page waits


class SearchQuestion(BaseModel):
    """A text, an image or both; `weight` is that of the text, and `classes` are those of the image."""

    text: Text = ""
    id: ImageId | None = None  # of an image of the index
    vector: list[float] | None = None  # of an uploaded image
    template: Template = ""
    weight: float = Field(0.5, ge=0, le=1)
    count: int = Field(24, ge=1, le=200)
    over: Over = "images"
    classes: list[Annotated[str, OneLine]] = []
    where: Annotated[str, OneLine] = ""  # COLUMN=VALUE
    group: Annotated[str, OneLine] = ""


def search(state: AppState, asked: SearchQuestion) -> dict[str, Any]:
    """The images nearest to a text, an image, or both, and the classes of the image."""
    started = time.perf_counter()
    answer = dict[str, Any]()
    image = _image_vector(state, asked)
    query = image
    if asked.classes:
        answer = _classify(state, asked, image)
    if asked.text:
        query = state.query_vector(asked.text, asked.template)
        if image is not None:
            query = mix(query, image, (asked.weight, 1 - asked.weight))
    if query is None:
        raise UserError("Enter a text, or choose an image.")
    where = parse_where([asked.where] if asked.where else [])
    with state.reading:  # the source, for its columns
        hits = state.index.hits(
            query, asked.count, over=asked.over, where=where, group=asked.group or None
        )
    rows = state.describe([hit.id for hit in hits])
    for row, hit in zip(rows, hits, strict=True):
        row |= {"cosine": hit.score, "copies": len(hit.copies)}
    answer["hits"] = rows
    answer["note"] = language_note(asked.text, state.index.text_model)
    answer["explained"] = bool(asked.text) and has_anchors(state.model_path)
    answer["images"] = len(state.index)
    answer["seconds"] = time.perf_counter() - started
    return answer


class WhyQuestion(BaseModel):
    """A text, and an image of the index that it found."""

    text: Text
    id: ImageId


def why(state: AppState, asked: WhyQuestion) -> dict[str, Any]:
    """The known pairs or classes that a text and an image both resemble, the most similar first."""
    with state.reading, state.encoding:
        (names,) = state.index.resembled(asked.text, [asked.id])
    return {"resembles": [printable(name) for name in names]}


def _image_vector(state: AppState, asked: SearchQuestion) -> Tensor | None:
    if asked.vector is None:
        if asked.id is None:
            return None
        return state.index.vectors([asked.id])[0]
    vector = normalize(torch.tensor(asked.vector, dtype=torch.float32), dim=0)
    if len(vector) != state.index.info.dimension or not vector.isfinite().all():
        raise UserError("The image was encoded by another model. Choose it again.")
    return vector


def _classify(state: AppState, asked: SearchQuestion, image: Tensor | None) -> dict[str, Any]:
    """Probabilities of the classes, the largest first: the softmax of scaled cosines, as CLIP is trained."""
    names = read_classes(asked.classes)
    count = len(names)
    if asked.template:
        count *= len(read_templates(asked.template)[1])
    if count > MOST_PROMPTS:
        limit = f"the limit is {MOST_PROMPTS:,}. `declip classify` has none."
        raise UserError(f"Classes times templates are {count:,} texts; {limit}")
    if image is None:
        raise UserError("There is no image to classify. Choose one, or leave the classes empty.")
    cosines = state.text_vectors(names, asked.template) @ image
    scale = logit_scale(state.index.text_model)
    softmax = torch.softmax(scale * cosines.double(), dim=0)
    rows = []
    for i in softmax.argsort(descending=True, stable=True).tolist():
        numbers = {"probability": float(softmax[i]), "cosine": float(cosines[i])}
        rows.append({"name": names[i], **numbers})
    return {"classes": rows, "scale": scale}
