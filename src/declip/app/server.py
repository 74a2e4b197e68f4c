"""The server of the app: its routes, classification and search, and opening or making its index."""

import logging
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import Field, TypeAdapter, ValidationError
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
from declip.app.caption_table import check_table
from declip.app.requests import (
    LARGEST_UPLOAD,
    Guard,
    ImageId,
    ImageQuestion,
    OneLine,
    Question,
    Template,
    Text,
    read_body,
    read_image,
)
from declip.app.state import SIDE, AppState, state_of, templates_of
from declip.data.pair import printable
from declip.errors import UserError
from declip.evaluation.zero_shot import prompt_names
from declip.search.embed import open_or_embed
from declip.search.index import mix
from declip.search.info import Over

VIEWS = ("classify", "search", "pairs", "caption")
LARGE = 768  # pixels of the longer side of an image to caption
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
MOST_PROMPTS = 8_000  # classes times templates: all are encoded while the page waits
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
        Route("/api/images", upload, methods=["POST"]),
        Route("/api/classify", classify, methods=["POST"]),
        Route("/api/search", search),
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
        text = MapQuestion.of(request).text if path.startswith("/maps/") else ""
        content = state.thumbnail(id, LARGE if path.startswith("/images/") else SIDE, text)
    except UserError:  # its message may name a path
        raise HTTPException(404, "This image no longer exists or has no heat map.") from None
    return Response(content, media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"})


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


def _examples(state: AppState) -> list[str]:
    ids = state.index.ids
    rows = [state.index.row(int(ids[len(ids) * (2 * n + 1) // (2 * EXAMPLES)])) for n in range(EXAMPLES)]
    return list(dict.fromkeys(printable(row.caption)[:60] for row in rows if row.captions))


def _answer_error(request: Request, error: Exception) -> Response:
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
    if caption is not None:
        check_table(caption)  # before images are embedded
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
