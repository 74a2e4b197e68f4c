"""The server of the app: its routes and pages, and opening or making its index."""

import logging
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import ASGIApp

from declip.app import answers, captions, pairs
from declip.app.requests import LARGEST_UPLOAD, Guard, ImageId, Question, Text
from declip.app.state import SIDE, AppState, state_of
from declip.data.pair import printable
from declip.errors import UserError
from declip.evaluation.zero_shot import prompt_names
from declip.search.embed import open_or_embed

VIEWS = ("classify", "search", "pairs", "caption")
LARGE = 768  # pixels of the longer side of an image to caption
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
EXAMPLES = 6  # captions of the index that a page offers to begin with
ENVIRONMENT = Environment(
    loader=PackageLoader("declip.app"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
TEMPLATES = Jinja2Templates(env=ENVIRONMENT)


def build(state: AppState, host: str) -> ASGIApp:
    """Make the application for a server that listens on `host`."""
    routes = [
        Route("/", lambda request: RedirectResponse("/caption" if state.captioning else "/search")),
        *(Route(f"/{name}", page) for name in VIEWS),
        Mount("/static", StaticFiles(packages=[("declip.app", "static")])),
        Route("/thumbnails/{id}", thumbnail),
        Route("/images/{id}", thumbnail),
        Route("/maps/{id}", thumbnail),
        Route("/api/caption", captions.show),
        Route("/api/caption", captions.save, methods=["POST"]),
        Route("/api/images", answers.upload, methods=["POST"]),
        Route("/api/classify", answers.classify, methods=["POST"]),
        Route("/api/search", answers.search),
        Route("/api/pairs/disagreeing", pairs.disagreeing),
        Route("/api/pairs/duplicates", pairs.duplicates),
        Route("/api/pairs/list", pairs.save_list, methods=["POST"]),
    ]
    answered = (HTTPException, UserError, ValidationError, Exception)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(answered, _answer_error))
    app.state.shared = state
    return Guard(app, host)  # around everything, so that answers to failures have the headers too


class MapQuestion(Question):
    """A text that is looked for in an image."""

    text: Text = Field(pattern=r"\S")


def page(request: Request) -> Response:
    """A view: its HTML holds no result, the scripts ask for them."""
    # What all views show, whatever the request.
    state, view = state_of(request), request.url.path[1:]
    if view == "caption" and state.captioning is None:
        raise HTTPException(404, "Start the app with --caption FILE to caption images.")
    views = VIEWS if state.captioning else VIEWS[:-1]
    context: dict[str, Any] = {"view": view, "views": views, "state": state, "info": state.index.info}
    context |= {"template_sets": prompt_names(), "examples": _examples(state)}
    context |= {"largest_upload": LARGEST_UPLOAD >> 20, "lowest": pairs.LOWEST}
    return TEMPLATES.TemplateResponse(request, f"{view}.html", context)


def thumbnail(request: Request) -> Response:
    """Answer with a small copy of an image of the index, below /maps with the heat map of a text over it."""
    state, path = state_of(request), request.url.path
    try:
        id = TypeAdapter(ImageId).validate_python(request.path_params["id"])
        if path.startswith("/maps/"):
            content = state.heat_map(id, MapQuestion.of(request).text)
        else:
            content = state.thumbnail(id, LARGE if path.startswith("/images/") else SIDE)
    except UserError:  # its message may name a path
        raise HTTPException(404, "This image no longer exists or has no heat map.") from None
    return Response(content, media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"})


def _examples(state: AppState) -> list[str]:
    """A few captions, evenly spaced over the index."""
    ids = state.index.ids
    rows = [state.index.row(int(ids[len(ids) * (2 * n + 1) // (2 * EXAMPLES)])) for n in range(EXAMPLES)]
    return list(dict.fromkeys(printable(row.caption)[:60] for row in rows if row.captions))


def _answer_error(request: Request, error: Exception) -> Response:
    """Answer with the message of an error, as JSON for scripts."""
    status, message = 400, str(error)
    if isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    elif isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        message = ": ".join([*(str(part) for part in first["loc"]), first["msg"]])
    elif not isinstance(error, UserError):
        status, message = 500, "An unexpected error; see the terminal."
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": message}, status)
    return PlainTextResponse(message, status)


def open_state(
    model: str, source: str, folder: Path | None = None, *, caption: Path | None = None, **options: Any
) -> AppState:
    """Open an index, or embed a source into one first, see `open_or_embed`; `caption` is the table to write."""
    index = open_or_embed(model, source, folder, **options)
    if not len(index):
        raise UserError(f"The index '{index.folder}' holds no image. Embed some first: declip embed.")
    state = AppState(index, model)
    if caption is not None:
        state.captioning = captions.Captioning(state, caption)
    return state


def take_port(host: str, port: int) -> socket.socket:
    """Listen on a port; raises `UserError` if the host does not exist, or the port is in use or not allowed."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"Port {port} of '{host}' cannot be used: {error.strerror}. Choose another --port (0: any free port)."
        ) from error


def address_of(bound: socket.socket) -> str:
    """The address to open in a browser."""
    host, port = bound.getsockname()[:2]
    host = ANY_ADDRESS.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def serve(state: AppState, bound: socket.socket, host: str) -> None:
    """Answer requests until Ctrl-C."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logs: dict[str, Any] = {"access_log": False, "log_config": None, "server_header": False}
    config = uvicorn.Config(build(state, host), limit_concurrency=128, timeout_graceful_shutdown=2, **logs)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[bound])
    state.stopped.set()
