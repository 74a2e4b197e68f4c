"""Routes of the app: upload an image, classify it, and search by a text, an image or both."""

import time
from typing import Annotated

import torch
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from declip.app.requests import LARGEST_UPLOAD, ImageQuestion, OneLine, Template, Text, read_body, read_image
from declip.app.state import state_of, templates_of
from declip.errors import UserError
from declip.search.index import mix
from declip.search.info import Over

MOST_PROMPTS = 8_000  # classes times templates: all are encoded while the page waits


class ClassifyQuestion(ImageQuestion):
    """An image, the classes, and a prompt template for them."""

    classes: list[Annotated[str, OneLine]]
    template: Template = ""


class SearchQuestion(ImageQuestion):
    """A text, an image or both; `weight` is that of the text."""

    text: Text = ""
    template: Template = ""
    weight: float = Field(0.5, ge=0, le=1)
    count: int = Field(24, ge=1, le=200)
    over: Over = "images"


async def upload(request: Request) -> Response:
    """Encode an uploaded image and answer with the token of its vector; the image itself is not stored."""
    state = state_of(request)
    async with state.uploading:
        content = await read_body(request, LARGEST_UPLOAD)
        vector = await run_in_threadpool(lambda: state.query(None, read_image(content)))
    return JSONResponse({"image": state.add_upload(vector)})


async def classify(request: Request) -> Response:
    """Answer with the classes' probabilities, the largest first."""
    return await run_in_threadpool(_classify, request, await ClassifyQuestion.in_body(request))


def _classify(request: Request, asked: ClassifyQuestion) -> Response:
    # --- input
    state = state_of(request)
    names = [name for name in dict.fromkeys(asked.classes) if name]
    count = len(names) * len(templates_of(asked.template))
    if not names:
        raise UserError("There is no class yet. Enter some, one per line.")
    if count > MOST_PROMPTS:
        raise UserError(
            f"Classes times templates are {count:,} texts; the limit is {MOST_PROMPTS:,}. `declip classify` takes more."
        )
    image = state.image_vector(asked.image, asked.id)
    if image is None:
        raise UserError("There is no image yet. Choose one first.")
    # --- softmax of scale · cosine, as CLIP is trained
    cosines = state.class_vectors(tuple(names), asked.template) @ image
    softmax = torch.softmax(state.scale * cosines.double(), dim=0)
    order = softmax.argsort(descending=True, stable=True).tolist()
    rows = [{"name": names[i], "probability": float(softmax[i]), "cosine": float(cosines[i])} for i in order]
    return JSONResponse({"classes": rows, "scale": state.scale})


def search(request: Request) -> Response:
    """Answer with the images nearest to a text, an image, or both."""
    state, asked, started = state_of(request), SearchQuestion.of(request), time.perf_counter()
    query = image = state.image_vector(asked.image, asked.id)
    if asked.text:
        text = state.query(asked.text, template=asked.template)
        query = text if image is None else mix(text, image, (asked.weight, 1 - asked.weight))
    if query is None:
        raise UserError("Enter a text, or choose an image.")
    ids, cosines = state.index.nearest(query[None], asked.count, over=asked.over)
    hits = [
        {**state.describe(id), "cosine": cosine}
        for id, cosine in zip(ids[0].tolist(), cosines[0].tolist(), strict=True)
    ]
    return JSONResponse({"hits": hits, "images": len(state.index), "seconds": time.perf_counter() - started})
