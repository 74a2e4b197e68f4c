"""The server of the app: its requests and pages, and opening or making its index."""

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import ASGIApp

from declip.app import captions, pairs
from declip.app.caption_table import Change, check_table
from declip.app.requests import LARGEST_JSON, LARGEST_UPLOAD, Guard, ImageId, read_body, read_image
from declip.app.search import SearchQuestion, WhyQuestion, search, why
from declip.app.state import AppState
from declip.data.pair import printable
from declip.errors import UserError
from declip.evaluation.prompt_sets import prompt_names
from declip.search.embed import open_or_embed

VIEWS = ("search", "pairs", "caption")
SMALL, LARGE = 192, 768  # pixels of the longer side of a thumbnail, and of an image to caption
UPLOADS_AT_ONCE = 4  # images that are received at the same time; others wait
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
EXAMPLES = 6  # captions of the index that a page offers to begin with
HTML: dict[str, Any] = {
    "autoescape": True,
    "undefined": StrictUndefined,
    "trim_blocks": True,
    "lstrip_blocks": True,
}
TEMPLATES = Jinja2Templates(env=Environment(loader=PackageLoader("declip.app"), **HTML))


class ImageQuestion(BaseModel):
    """An image of the index."""

    id: ImageId
    large: bool = False


def image(state: AppState, asked: ImageQuestion) -> Response:
    """A small copy of an image of the index."""
    try:
        content = state.thumbnail(asked.id, LARGE if asked.large else SMALL)
    except UserError:  # its message may name a path
        raise HTTPException(404, "This image no longer exists.") from None
    return Response(
        content, media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"}
    )


# Methods, address, parameters in the address or in a JSON object, and the function that answers.
Answered = tuple[str, str, type[BaseModel], Callable[..., Any]]
REQUESTS: tuple[Answered, ...] = (
    ("GET", "/images/{id}", ImageQuestion, image),
    ("GET POST", "/api/search", SearchQuestion, search),
    ("POST", "/api/why", WhyQuestion, why),
    ("POST", "/api/caption", Change, captions.save),
    # These hold images, which a link from another site must not do: no GET.
    ("POST", "/api/caption/next", captions.ShowQuestion, captions.show),
    ("POST", "/api/caption/hold", captions.HoldQuestion, captions.hold),
    ("GET", "/api/pairs/disagreeing", pairs.PairsQuestion, pairs.disagreeing),
    ("GET", "/api/pairs/duplicates", pairs.PairsQuestion, pairs.duplicates),
    ("POST", "/api/pairs/list", pairs.Marked, pairs.save_list),
)


def build(state: AppState, host: str) -> ASGIApp:
    """Make the application for a server that listens on `host`."""
    uploading = asyncio.Semaphore(UPLOADS_AT_ONCE)
    first = "/caption" if state.captioning else "/search"
    routes = [
        Route("/", lambda request: RedirectResponse(first)),
        Mount("/static", StaticFiles(packages=[("declip.app", "static")])),
        Route("/api/images", partial(_upload, state, uploading), methods=["POST"]),
    ]
    for view in VIEWS:
        routes.append(Route(f"/{view}", partial(_page, state, view)))
    for methods, path, question, answer in REQUESTS:
        if state.captioning or not path.startswith("/api/caption"):
            endpoint = partial(_answer, state, question, answer)
            routes.append(Route(path, endpoint, methods=methods.split()))
    answered = (HTTPException, UserError, ValidationError, Exception)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(answered, _answer_error))
    return Guard(app, host)  # around everything, so that answers to failures have the headers too


async def _answer(
    state: AppState, question: type[BaseModel], answer: Callable[..., Any], request: Request
) -> Response:
    if request.method == "POST":
        asked = question.model_validate_json(await read_body(request, LARGEST_JSON))
    else:
        asked = question.model_validate({**request.query_params, **request.path_params})
    result = await run_in_threadpool(answer, state, asked)
    if isinstance(result, Response):
        return result
    return JSONResponse(result)


async def _upload(state: AppState, uploading: asyncio.Semaphore, request: Request) -> Response:
    """Answer with the vector of an uploaded image, which the page sends from then on; nothing is stored here."""
    async with uploading:
        content = await read_body(request, LARGEST_UPLOAD)
        vector = await run_in_threadpool(lambda: state.image_vector(read_image(content)))
    return JSONResponse({"vector": vector.tolist()})


def _page(state: AppState, view: str, request: Request) -> Response:
    """A view: its HTML holds no result, the scripts ask for them."""
    if view == "caption" and not state.captioning:
        raise HTTPException(404, "Start the app with --caption FILE to caption images.")
    context: dict[str, Any] = {
        "view": view,
        "views": VIEWS if state.captioning else VIEWS[:-1],
        "state": state,
        "info": state.index.info,
        "lowest": pairs.LOWEST,
        "largest_upload": LARGEST_UPLOAD >> 20,
        "template_sets": prompt_names(),
        "examples": _examples(state) if view == "search" else [],
        "columns": state.index.column_names,
    }
    return TEMPLATES.TemplateResponse(request, f"{view}.html", context)


def _examples(state: AppState) -> list[str]:
    """Captions of images at equal distances."""
    ids = state.index.ids
    captions = dict[str, None]()
    for number in range(1, 2 * EXAMPLES, 2):
        row = state.index.row(ids[len(ids) * number // (2 * EXAMPLES)])
        if row.captions:
            captions[printable(row.caption)[:60]] = None
    return list(captions)


def _answer_error(request: Request, error: Exception) -> Response:
    status = 400
    message = str(error)
    if isinstance(error, HTTPException):
        status = error.status_code
        message = error.detail
    elif isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        message = ": ".join([*map(str, first["loc"]), first["msg"]])
    elif not isinstance(error, UserError):
        status = 500
        message = "An unexpected error; see the terminal."
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": message}, status)
    return PlainTextResponse(message, status)


def open_state(
    model: str,
    source: str,
    folder: Path | None = None,
    *,
    caption: Path | None = None,
    **options: Any,
) -> AppState:
    """Open an index, or embed a source into one first, see `open_or_embed`; `caption` is the table to write."""
    if caption is not None:
        check_table(caption)  # before images are embedded
    index = open_or_embed(model, source, folder, **options)
    if not len(index):
        raise UserError(
            f"The index '{index.folder}' holds no image. Embed some first: declip embed."
        )
    state = AppState(index, model)
    state.text_vectors([""])  # another model than the index's is refused now
    if caption is None:
        return state
    return replace(state, captioning=captions.Captioning(state, caption))


def take_port(host: str, port: int) -> socket.socket:
    """Listen on a port; raises `UserError` if the host does not exist, or the port is in use or not allowed."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        raise UserError(
            f"Port {port} of '{host}' cannot be used: {error.strerror}. Choose another --port (0: any free port)."
        ) from error


def address_of(bound: socket.socket) -> str:
    """The address to open in a browser."""
    host, port = bound.getsockname()[:2]
    host = ANY_ADDRESS.get(host, host)
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{port}/"


def serve(state: AppState, bound: socket.socket, host: str) -> None:
    """Answer requests until Ctrl-C."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logs: dict[str, Any] = {"access_log": False, "log_config": None, "server_header": False}
    config = uvicorn.Config(
        build(state, host), limit_concurrency=128, timeout_graceful_shutdown=2, **logs
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[bound])
    state.stopped.set()
