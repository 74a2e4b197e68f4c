"""The server of the app: its routes and pages, and the index that it opens or makes first."""

import asyncio
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import ASGIApp

from declip.app import classify, map, pairs, params, search
from declip.app.middleware import Guard
from declip.app.state import KIND, AppState, state_of
from declip.errors import UserError
from declip.evaluation.prompt_sets import prompt_names, read_prompts
from declip.interchange.read import load
from declip.search.embed import embed
from declip.search.index import Index, fingerprint
from declip.search.manifest import MANIFEST

VIEWS = ("classify", "search", "neighbors", "pairs")

UPLOADS_AT_ONCE = 4  # images that are received at the same time; others wait
EXAMPLES = 6  # captions of the index that a page offers to begin with
SMALLEST_MANIFEST = {"layout", "parts", "model"}
"""Keys that distinguish an index's manifest from another file of its name."""

TEMPLATES = Jinja2Templates(
    env=Environment(
        loader=PackageLoader("declip.app"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
)


def build(state: AppState, host: str) -> ASGIApp:
    """Make the application for a server that listens on `host`."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        state.jobs.stop()

    app = Starlette(
        routes=[
            Route("/", lambda request: RedirectResponse("/search")),
            *(Route(f"/{name}", page) for name in VIEWS),
            Mount("/static", StaticFiles(packages=[("declip.app", "static")])),
            Route("/thumbnails/{id}", thumbnail),
            Route("/api/images", classify.upload, methods=["POST"]),
            Route("/api/images/{id}", search.image),
            Route("/api/classify", classify.classify, methods=["POST"]),
            Route("/api/search", search.search),
            Route("/api/neighbors", search.neighbors),
            Route("/api/pairs", pairs.overview),
            Route("/api/pairs/disagreeing", pairs.disagreeing),
            Route("/api/pairs/duplicates", pairs.duplicates),
            Route("/api/pairs/captions", pairs.captions),
            Route("/api/pairs/map", map.points),
            Route("/api/pairs/chosen", pairs.chosen),
            Route("/api/pairs/list", pairs.save_list, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _answer_error, UserError: _answer_error, Exception: _answer_error},
        lifespan=lifespan,
    )
    app.state.shared, app.state.uploading = state, asyncio.Semaphore(UPLOADS_AT_ONCE)
    app.state.queue = search.find_queue(state.spec, state.index.model)
    _template_sets()  # read now, so that the first page need not wait
    return Guard(app, host)  # around everything, so that answers to failures have the headers too


def page(request: Request) -> Response:
    """A view: its HTML holds no result, the scripts ask for them."""
    return _render(request, request.url.path[1:])


def thumbnail(request: Request) -> Response:
    """A small copy of an image of the index, by its id alone."""
    try:
        content = state_of(request).thumbnail(params.image_id(request.path_params))
    except UserError:
        raise HTTPException(HTTPStatus.NOT_FOUND, "There is no such image any more.") from None
    return Response(content, media_type=f"image/{KIND}", headers={"Cache-Control": "private, max-age=3600"})


def _render(request: Request, view: str, status: int = HTTPStatus.OK, message: str = "") -> Response:
    state, queue = state_of(request), request.app.state.queue
    manifest = state.index.manifest
    context = {
        "view": view,
        "views": VIEWS,
        "version": state.version,
        "images": len(state.index),
        "source": manifest.source.name,
        "model": Path(state.spec).name,
        "captions": manifest.captions,
        "message": message,
        "queue": None if isinstance(queue, str) else queue,
        "no_queue": queue if isinstance(queue, str) else "",
        "template_sets": _template_sets(),
        "examples": _examples(state) if view in VIEWS else [],
        "largest_upload": params.LARGEST_UPLOAD >> 20,
        "lowest": pairs.LOWEST,
        "umap": map.has_umap(),
    }
    return TEMPLATES.TemplateResponse(request, f"{view}.html", context, status)


@cache
def _template_sets() -> list[tuple[str, int]]:
    """The shipped template sets, and the number of templates in each."""
    return [(name, len(read_prompts(name).templates)) for name in prompt_names()]


def _examples(state: AppState) -> list[str]:
    """A few captions, evenly spaced over the index."""
    ids = state.index.ids
    rows = [state.index.row(int(ids[len(ids) * (2 * n + 1) // (2 * EXAMPLES)])) for n in range(EXAMPLES)]
    return list(dict.fromkeys(row.captions[0][:60] for row in rows if row.captions))


def _answer_error(request: Request, error: Exception) -> Response:
    """An error in the form that the asking page, script or image can show."""
    status, message = HTTPStatus.INTERNAL_SERVER_ERROR.value, "Something went wrong; the terminal says what."
    if isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    elif isinstance(error, UserError):
        status, message = HTTPStatus.BAD_REQUEST, str(error)
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": message}, status)
    if request.url.path.startswith(("/static/", "/thumbnails/")):
        return PlainTextResponse(message, status)
    return _render(request, "error", status, message)


def is_index(source: str) -> bool:
    """Whether a source is the folder of an index."""
    try:
        tree = json.loads((Path(source).expanduser() / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and tree.keys() >= SMALLEST_MANIFEST


def open_state(
    model: str, source: str, folder: Path | None = None, *, device: str = "auto", **options: Any
) -> AppState:
    """Open an index, or embed a source into one first; later calls embed only what is new.

    Args:
        model: What `declip.load` opens; for an index, the model that made it.
        source: An index, or what `declip.embed` embeds.
        folder: Where the index of a source goes; by default below "indices", named after the source and the model.
        options: Options of `declip.embed`.
    """
    if is_index(source):
        if folder is not None:
            raise UserError(f"'{source}' is an index already, so --index '{folder}' has no use. Leave it out.")
        index = Index.open(source, model=model, device=device)
    else:
        loaded = load(model, device)
        out = folder or default_folder(fingerprint(loaded), source)
        index = embed(loaded, source, out=out, captions=True, loaded_from=model, **options)
    if not len(index):
        raise UserError(f"The index '{index.folder}' holds no image. Embed some first: declip embed.")
    _ = index.model  # another model is refused now
    return AppState(index, model)


def default_folder(digest: str, source: str) -> Path:
    """The default folder of a source's index; each model has another, so that none is refused."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(source).name.removeprefix("builtin:")).strip("-") or "source"
    return Path("indices") / f"{name[:40]}-{digest[:8]}"


def serve(state: AppState, bound: socket.socket, host: str, ready: Callable[[], Any]) -> None:
    """Answer requests until Ctrl-C; `ready` is called once before the first."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        build(state, host),
        access_log=False,
        log_config=None,
        server_header=False,
        limit_concurrency=128,
        timeout_graceful_shutdown=2,
        lifespan="on",
    )
    ready()
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[bound])
