"""Search and neighbors: images by a text or a picture, and captions by a caption."""

import time
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor
from torch.nn.functional import normalize

from declip.app import asked
from declip.app.gallery import Gallery
from declip.app.queue import QueueOfRun
from declip.search.encoding import SHORTEST

MOST_HITS = 200
USUAL_HITS = 24


def search(request: Request) -> Response:
    """Answer ?text, ?picture or ?id, both weighed by ?weight, with the nearest images."""
    gallery: Gallery = request.app.state.gallery
    given, started = request.query_params, time.perf_counter()
    count = asked.whole(given, "count", USUAL_HITS, 1, MOST_HITS)
    over = asked.over(given)
    if over == "captions" and not gallery.index.manifest.captions:
        raise asked.wrong("This index holds no vectors of captions to search in.")
    query = _query(gallery, given)
    ids, cosines = gallery.index.nearest(query[None], count, over=over)
    hits = _hits(gallery, ids[0], cosines[0])
    return JSONResponse({"hits": hits, "images": len(gallery.index), "seconds": time.perf_counter() - started})


def neighbors(request: Request) -> Response:
    """Answer ?text with the nearest captions of the run's queue or of the index, as ?where says."""
    gallery: Gallery = request.app.state.gallery
    given = request.query_params
    text = asked.words(given.get("text", ""), "caption")
    count = asked.whole(given, "count", 12, 1, 48)
    if not text:
        raise asked.wrong("Type a caption first.")
    queue = gallery.queue
    where = given.get("where", "")
    if where == "index" or (not where and not isinstance(queue, QueueOfRun)):
        return JSONResponse(_in_index(gallery, gallery.query(text), count))
    if not isinstance(queue, QueueOfRun):
        raise asked.wrong(queue)
    return JSONResponse(_in_queue(gallery, queue, gallery.query(text), count))


def row(request: Request) -> Response:
    """Answer with an image's key and captions."""
    return JSONResponse(request.app.state.gallery.described(asked.whole(request.path_params, "id", 0, 0, 2**62)))


def _query(gallery: Gallery, given: Any) -> Tensor:
    text = asked.words(given.get("text", ""), "text")
    image = asked.picture(gallery, given.get("picture"), given.get("id"))
    if not text and image is None:
        raise asked.wrong("Type what to look for, or choose a picture.")
    if not text and image is not None:
        return image
    words = gallery.query(text, template=asked.template(given.get("template", "")))
    if image is None:
        return words
    weight = asked.number(given, "weight", 0.5, 0, 1)
    both = weight * words + (1 - weight) * image
    if both.norm() < SHORTEST:
        raise asked.wrong("Text and picture cancel out: nothing is left to look for. Move the balance.")
    return normalize(both, dim=-1)


def _hits(gallery: Gallery, ids: Tensor, cosines: Tensor) -> list[dict[str, Any]]:
    pairs = zip(ids.tolist(), cosines.tolist(), strict=True)
    return [{**gallery.described(id), "cosine": cosine} for id, cosine in pairs]


def _in_index(gallery: Gallery, query: Tensor, count: int) -> dict[str, Any]:
    if not gallery.index.manifest.captions:
        raise asked.wrong("This index holds no vectors of captions, so there are none to look among.")
    ids, cosines = gallery.index.nearest(query[None], count, over="captions")
    hits = [{**hit, "words": hit["captions"][0]} for hit in _hits(gallery, ids[0], cosines[0])]
    return {"where": "index", "hits": hits}


def _in_queue(gallery: Gallery, queue: QueueOfRun, query: Tensor, count: int) -> dict[str, Any]:
    hits: list[dict[str, Any]] = []
    for entry in queue.nearest(torch.as_tensor(query), count):
        id = gallery.ids_of_keys.get(entry.key)
        captions = [] if id is None else gallery.described(id)["captions"]
        hits.append({"id": id, "key": entry.key, "words": entry.words, "captions": captions, "cosine": entry.cosine})
    return {"where": "queue", "hits": hits}
