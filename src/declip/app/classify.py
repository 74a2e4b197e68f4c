"""Classify: probabilities of classes that the user names, for an image."""

from typing import Annotated

import torch
from pydantic import Field, StringConstraints
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from declip.app.params import LARGEST_UPLOAD, ImageQuestion, OneLine, Template, bad_request, read_body, read_image
from declip.app.state import state_of, templates_of

MOST_PROMPTS = 8_000  # classes times templates: all are encoded while the page waits


class ClassifyQuestion(ImageQuestion):
    """An image, the classes, and a template for them."""

    classes: list[Annotated[str, StringConstraints(max_length=200), OneLine]] = Field(max_length=1_000)
    template: Template = ""


async def upload(request: Request) -> Response:
    """Take an image: its vector is kept under the token in the answer, the image itself is forgotten."""
    state = state_of(request)
    async with state.uploading:
        content = await read_body(request, LARGEST_UPLOAD)
        vector = await run_in_threadpool(lambda: state.query(None, read_image(content)))
    return JSONResponse({"image": state.add_upload(vector)})


async def classify(request: Request) -> Response:
    """Answer with the classes' probabilities, the largest first."""
    return await run_in_threadpool(_classify, request, await ClassifyQuestion.in_body(request))


def _classify(request: Request, asked: ClassifyQuestion) -> Response:
    state = state_of(request)
    names = [name for name in dict.fromkeys(asked.classes) if name]
    count = len(names) * len(templates_of(asked.template))
    if not names or count > MOST_PROMPTS:
        raise bad_request(
            f"{len(names):,} classes are {count:,} texts with their templates; from 1 to {MOST_PROMPTS:,} are encoded. "
            "Name classes, one a line, or take one template."
        )
    image = state.image_vector(asked.image, asked.id)
    if image is None:
        raise bad_request("There is no image yet. Choose one first.")
    # Softmax of scale · cosine, as CLIP is trained.
    cosines = state.class_vectors(tuple(names), asked.template) @ image
    softmax = torch.softmax(state.scale * cosines.double(), dim=0)
    order = softmax.argsort(descending=True, stable=True).tolist()
    rows = [{"name": names[i], "probability": float(softmax[i]), "cosine": float(cosines[i])} for i in order]
    return JSONResponse({"classes": rows, "scale": state.scale})
