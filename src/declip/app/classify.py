"""Classify: probabilities of classes that the user names, for an image."""

from collections.abc import Sequence
from typing import Any

import torch
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from declip.app import params
from declip.app.state import state_of
from declip.evaluation.zero_shot import read_templates

MOST_CLASSES, LONGEST_CLASS = 1_000, 200  # classes, and characters of a name
MOST_PROMPTS = 8_000  # classes times templates: all are encoded while the page waits


async def upload(request: Request) -> Response:
    """Take an image: its vector is kept under the token in the answer, the image itself is forgotten."""
    state = state_of(request)
    async with request.app.state.uploading:
        content = await params.read_body(request, params.LARGEST_UPLOAD)
        vector = await run_in_threadpool(lambda: state.query(None, params.read_image(content)))
    return JSONResponse({"image": state.add_upload(vector)})


async def classify(request: Request) -> Response:
    """Answer {"image" or "id", "classes", "template"} with the classes' probabilities, the largest first."""
    return await run_in_threadpool(_classify, request, await params.read_json(request))


def _classify(request: Request, given: dict[str, Any]) -> Response:
    state = state_of(request)
    names = _class_names(given.get("classes"))
    template = params.template(given.get("template", ""))
    count = 1 if template is None else len(read_templates(template)[1])
    if len(names) * count > MOST_PROMPTS:
        raise params.bad_request(
            f"{len(names):,} classes with {count} templates each are {len(names) * count:,} texts; at most "
            f"{MOST_PROMPTS:,} are encoded at once. Name fewer classes or take one template."
        )
    image = params.image_vector(state, given)
    if image is None:
        raise params.bad_request("There is no image yet. Choose one first.")
    rows = probabilities(image, state.class_vectors(tuple(names), template), names, state.scale)
    return JSONResponse({"classes": rows, "scale": state.scale})


def probabilities(image: Tensor, classes: Tensor, names: Sequence[str], scale: float) -> list[dict[str, Any]]:
    """Softmax over the classes of scale · cosine, as CLIP is trained, the most probable class first.

    Args:
        image: (d,) of length 1.
        classes: (C, d) of length 1.
        scale: exp(logit scale).
    """
    cosines = classes @ image
    softmax = torch.softmax(scale * cosines.double(), dim=0)
    order = softmax.argsort(descending=True, stable=True).tolist()
    return [{"name": names[i], "probability": float(softmax[i]), "cosine": float(cosines[i])} for i in order]


def _class_names(given: object) -> list[str]:
    if not isinstance(given, list):
        raise params.bad_request("Classes must be a list of names.")
    names = [params.text(name, "name of a class", LONGEST_CLASS) for name in given[: 10 * MOST_CLASSES]]
    distinct = list(dict.fromkeys(name for name in names if name))
    if not distinct:
        raise params.bad_request("Name some classes, one a line.")
    if len(distinct) > MOST_CLASSES:
        raise params.bad_request(f"{len(distinct):,} classes are too many: at most {MOST_CLASSES:,}.")
    return distinct
