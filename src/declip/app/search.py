"""Search images by a text or an image, and look for the captions nearest to a caption."""

import time
from typing import Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from declip.app.params import ImageQuestion, Question, Template, Text, bad_request
from declip.app.run_queue import RunQueue
from declip.app.state import AppState, state_of
from declip.search.index import mix
from declip.search.manifest import Over


class SearchQuestion(ImageQuestion):
    """A text, an image or both; `weight` is the text's."""

    text: Text = ""
    template: Template = ""
    weight: float = Field(0.5, ge=0, le=1)
    count: int = Field(24, ge=1, le=200)
    over: Over = "images"


class NeighborsQuestion(Question):
    """A caption, and where to look for the nearest: in the run's queue, if there is one, by default."""

    text: Text
    count: int = Field(12, ge=1, le=48)
    where: Literal["queue", "index"] | None = None


def search(request: Request) -> Response:
    """Answer with the images nearest to a text, an image, or both."""
    state, asked, started = state_of(request), SearchQuestion.of(request), time.perf_counter()
    query = image = state.image_vector(asked.image, asked.id)
    if asked.text:
        text = state.query(asked.text, template=asked.template)
        query = text if image is None else mix(text, image, (asked.weight, 1 - asked.weight))
    if query is None:
        raise bad_request("Type what to look for, or choose an image.")
    ids, cosines = state.index.nearest(query[None], asked.count, over=asked.over)
    hits = _hits(state, ids[0], cosines[0])
    return JSONResponse({"hits": hits, "images": len(state.index), "seconds": time.perf_counter() - started})


def neighbors(request: Request) -> Response:
    """Answer with the captions nearest to a caption."""
    state, asked = state_of(request), NeighborsQuestion.of(request)
    if not asked.text:
        raise bad_request("Type a caption first.")
    query, queue = state.query(asked.text), state.queue
    where = asked.where or ("queue" if isinstance(queue, RunQueue) else "index")
    if where == "index":
        ids, cosines = state.index.nearest(query[None], asked.count, over="captions")
        hits = [{**hit, "text": hit["captions"][0]} for hit in _hits(state, ids[0], cosines[0])]
        return JSONResponse({"where": where, "hits": hits})
    if isinstance(queue, str):
        raise bad_request(queue)
    hits = []
    for entry in queue.nearest(query, asked.count):
        id = state.ids_of_keys.get(entry["key"])
        image = {"id": None, "captions": []} if id is None else state.describe(id)
        hits.append(image | entry)
    return JSONResponse({"where": where, "hits": hits})


def _hits(state: AppState, ids: Tensor, cosines: Tensor) -> list[dict[str, Any]]:
    pairs = zip(ids.tolist(), cosines.tolist(), strict=True)
    return [{**state.describe(id), "cosine": cosine} for id, cosine in pairs]
