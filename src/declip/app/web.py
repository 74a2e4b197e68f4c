"""The server: which address is answered by what, and what is said where something is wrong."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from http import HTTPStatus
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from declip.app import asked, classify, pairs, runs, search
from declip.app.duplicates import LOWEST
from declip.app.gallery import Gallery
from declip.app.guard import Guard, known_names
from declip.app.layout import has_umap
from declip.app.queue import QueueOfRun
from declip.app.thumbnails import MEDIA_TYPE
from declip.app.uploads import LARGEST_PICTURE
from declip.errors import UserError
from declip.evaluation.prompt_sets import prompt_names, read_prompts

log = logging.getLogger("declip")

STATIC_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}

UPLOADS_AT_ONCE = 4
"""Pictures that are received at the same time; others wait."""

VIEWS = {
    "classify": "Classify",
    "search": "Search",
    "neighbors": "Neighbors",
    "pairs": "Pairs",
    "runs": "Runs",
}
"""The pages by address, in the order of the navigation."""

EXAMPLES = 6
"""Captions of the index that a page offers to begin with."""

Endpoint = Callable[[Request], Response | Awaitable[Response]]


def build(gallery: Gallery, host: str) -> ASGIApp:
    """Make the server's application.

    Args:
        gallery: What is shown.
        host: What the server listens on.
    """
    routes = [
        Route("/", lambda request: RedirectResponse("/search")),
        *(Route(f"/{name}", _page(name)) for name in VIEWS),
        Route("/static/{name}", _static()),
        Route("/thumbnails/{id}", thumbnail),
        Route("/api/pictures", classify.send_picture, methods=["POST"]),
        Route("/api/classify", classify.classify, methods=["POST"]),
        Route("/api/search", search.search),
        Route("/api/neighbors", search.neighbors),
        Route("/api/images/{id}", search.row),
        Route("/api/pairs", pairs.state),
        Route("/api/pairs/disagreeing", pairs.disagreeing),
        Route("/api/pairs/duplicates", pairs.duplicates),
        Route("/api/pairs/captions", pairs.captions),
        Route("/api/pairs/map", pairs.points),
        Route("/api/pairs/chosen", pairs.chosen),
        Route("/api/pairs/list", pairs.save_list, methods=["POST"]),
        Route("/api/runs", runs.runs),
    ]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        gallery.jobs.stop()

    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: _refused, UserError: _mistaken, Exception: _failed},
        lifespan=lifespan,
    )
    app.state.gallery, app.state.classes = gallery, classify.Classes(gallery)
    app.state.uploads = asyncio.Semaphore(UPLOADS_AT_ONCE)
    app.state.pages = Environment(
        loader=PackageLoader("declip.app"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    _sets()  # read now, so that the first page need not wait
    return Guard(app, known_names(host))  # around everything, so that a failure of ours passes it too


def thumbnail(request: Request) -> Response:
    """A small copy of an image of the index, by its id alone."""
    gallery: Gallery = request.app.state.gallery
    id = asked.whole(request.path_params, "id", 0, 0, asked.LARGEST_ID)
    large = asked.choice(request.query_params, "size", ("small", "large")) == "large"
    try:
        content = gallery.thumbnails.get(id, "large" if large else "small")
    except UserError:
        raise HTTPException(HTTPStatus.NOT_FOUND, "There is no such picture any more.") from None
    return Response(content, media_type=MEDIA_TYPE, headers={"Cache-Control": "private, max-age=3600"})


def _page(name: str) -> Endpoint:
    def page(request: Request) -> Response:
        return _rendered(request, name, HTTPStatus.OK, **_content(name, request.app.state.gallery))

    return page


def _rendered(request: Request, view: str, status: int, **content: Any) -> Response:
    gallery: Gallery = request.app.state.gallery
    manifest = gallery.index.manifest
    text = request.app.state.pages.get_template(f"{view}.html").render(
        view=view,
        views=VIEWS,
        title=VIEWS.get(view, "Not here"),
        version=gallery.version,
        images=len(gallery.index),
        source=manifest.source.name,
        model=Path(gallery.spec).name,
        **content,
    )
    return HTMLResponse(text, status)


def _content(view: str, gallery: Gallery) -> dict[str, Any]:
    """What the page of a view needs besides what all have."""
    manifest = gallery.index.manifest
    sets = _sets()
    if view == "classify":
        return {"sets": sets, "examples": _examples(gallery), "largest": LARGEST_PICTURE >> 20}
    if view == "search":
        asked_with = {"sets": sets, "largest": LARGEST_PICTURE >> 20}
        return {**asked_with, "captions": manifest.captions, "examples": _examples(gallery)}
    if view == "neighbors":
        queue = gallery.queue
        there = queue if isinstance(queue, QueueOfRun) else None
        why = "" if isinstance(queue, QueueOfRun) else queue
        return {"queue": there, "why": why, "captions": manifest.captions, "examples": _examples(gallery)}
    if view == "pairs":
        return {"umap": has_umap(), "captions": manifest.captions, "lowest": LOWEST}
    return {"places": len(gallery.runs.places)}


@cache
def _sets() -> list[tuple[str, int]]:
    """The shipped template sets, and how many templates each has."""
    return [(name, len(read_prompts(name).templates)) for name in prompt_names()]


def _examples(gallery: Gallery) -> list[str]:
    """A few captions, evenly spaced over the index."""
    ids = gallery.index.ids
    rows = [gallery.index.row(int(ids[len(ids) * (2 * n + 1) // (2 * EXAMPLES)])) for n in range(EXAMPLES)]
    return list(dict.fromkeys(row.captions[0][:60] for row in rows if row.captions))


def _static() -> Endpoint:
    """The page's own files, all held in memory: no path is made of what a request says."""
    folder = resources.files("declip.app") / "static"
    files = {
        entry.name: (entry.read_bytes(), STATIC_TYPES[ending])
        for entry in folder.iterdir()
        if (ending := "." + entry.name.rpartition(".")[2]) in STATIC_TYPES
    }

    def static(request: Request) -> Response:
        found = files.get(request.path_params["name"])
        if found is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "There is no such file.")
        return Response(found[0], media_type=found[1], headers={"Cache-Control": "no-cache"})

    return static


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _said(request, error.status_code, error.detail)


def _mistaken(request: Request, error: Exception) -> Response:
    return _said(request, HTTPStatus.BAD_REQUEST, str(error))


def _failed(request: Request, error: Exception) -> Response:
    return _said(request, HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong; the terminal says what.")


def _said(request: Request, status: int, message: str) -> Response:
    """An error, as what asked for it can show it."""
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": message}, status)
    if request.url.path.startswith(("/static/", "/thumbnails/")):
        return PlainTextResponse(message, status)
    return _rendered(request, "error", status, message=message)
