"""State of the app: an index with its model, opened once, uploaded images, and the background jobs of the pages."""

import asyncio
import io
import logging
import secrets
import threading
from collections.abc import Callable
from functools import cached_property, lru_cache
from http import HTTPStatus
from typing import Any

from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from torch import Tensor

from declip.app.run_queue import find_queue
from declip.data.pair import printable
from declip.errors import UserError
from declip.evaluation.zero_shot import class_features, logit_scale, read_templates
from declip.search.index import Index

log = logging.getLogger("declip")

MOST_UPLOADS = 256  # uploaded images whose vectors are kept; the images themselves are not
UPLOADS_AT_ONCE = 4  # images that are received at the same time; others wait
MOST_CLASS_SETS = 16  # sets of classes whose vectors are kept
SIDE = 192  # pixels of the longer side of a thumbnail
SHOWN_CAPTIONS = 5  # captions of an image that a page shows

Progress = Callable[[float], None]
"""Takes the fraction that is done."""


class Jobs:
    """Computations in the background: each is started when it is first asked for, and runs once, one at a time."""

    def __init__(self) -> None:
        self.results: dict[object, Any] = {}  # by name
        self.stopped = threading.Event()  # once set, jobs end when they next report their progress
        self._states: dict[object, dict[str, Any]] = {}
        self._lock, self._turn = threading.Lock(), threading.Lock()

    def state(self, name: object, work: Callable[[Progress], Any]) -> dict[str, Any]:
        """The state of a job as a page shows it; `work` is its computation."""
        with self._lock:
            if name not in self._states:
                self._states[name] = {"state": "working", "fraction": 0.0}
                threading.Thread(target=self._run, args=(name, work), daemon=True).start()
        return self._states[name]

    def _run(self, name: object, work: Callable[[Progress], Any]) -> None:
        def report(fraction: float) -> None:
            if self.stopped.is_set():
                raise UserError("The server has ended.")
            self._states[name] = {"state": "working", "fraction": fraction}

        try:
            with self._turn:
                report(0.0)
                self.results[name] = work(report)
            self._states[name] = {"state": "ready"}
        except Exception as error:
            message = str(error)
            if not isinstance(error, UserError):
                log.exception("A background job has failed.")
                message = "Something went wrong; the terminal says what."
            self._states[name] = {"state": "failed", "error": message}


class AppState:
    """Everything that requests share.

    Args:
        spec: Where the model was loaded from.

    Attributes:
        version: Differs at each start, so that a browser shows no thumbnail of an earlier index.
        lock: Held while the model runs: it is put into evaluation mode and back.
        uploads: Vectors of uploaded images by a token that cannot be guessed.
        queue: The queue of the run that the model was loaded from, or the reason why there is none.
    """

    def __init__(self, index: Index, spec: str) -> None:
        self.index, self.spec = index, spec
        self.version = secrets.token_hex(4)
        self.lock, self._reading = threading.Lock(), threading.Lock()
        self.uploads: dict[str, Tensor] = {}
        self.uploading = asyncio.Semaphore(UPLOADS_AT_ONCE)
        self.jobs = Jobs()
        self.queue = find_queue(spec, index.model)
        self.class_vectors = lru_cache(MOST_CLASS_SETS)(self._class_vectors)

    @cached_property
    def ids_of_keys(self) -> dict[str, int]:
        """The id of each key, the first where several images share one."""
        return dict(zip(reversed(self.index.keys()), reversed(self.index.ids.tolist()), strict=True))

    @cached_property
    def scale(self) -> float:
        """The model's exp(logit scale): the factor of cosines before the softmax."""
        return logit_scale(self.index.model)

    def query(self, text: str | None, image: Image.Image | None = None, template: str = "") -> Tensor:
        """(d,) float32 of length 1, the vector of a text or of an image."""
        with self.lock:
            return self.index.query(text, image, template=template or None)

    def add_upload(self, vector: Tensor) -> str:
        """Keep an uploaded image's vector, (d,), and forget the oldest; returns its token."""
        token = secrets.token_urlsafe(12)
        with self.lock:
            self.uploads[token] = vector
            if len(self.uploads) > MOST_UPLOADS:
                del self.uploads[next(iter(self.uploads))]
        return token

    def image_vector(self, token: str | None, id: int | None) -> Tensor | None:
        """(d,), the vector of an uploaded image or of one of the index; None without either."""
        if token:
            if token not in self.uploads:
                raise HTTPException(HTTPStatus.GONE, "The image is no longer held here. Choose it again.")
            return self.uploads[token]
        return None if id is None else self.index.vectors([id])[0]

    def describe(self, id: int) -> dict[str, Any]:
        """An image as a page shows it, without paths except the source's own key."""
        row = self.index.row(id)
        captions = [printable(caption) for caption in row.captions[:SHOWN_CAPTIONS]]
        return {"id": id, "key": printable(row.key), "captions": captions}

    def thumbnail(self, id: int) -> bytes:
        """A small copy of an image of the index, with nothing of its file except the pixels."""
        with self._reading:  # a source need not bear several threads, and one large image at a time is enough
            image = self.index.image(id)
        small, written = image.copy(), io.BytesIO()
        small.info.clear()
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.save(written, "WEBP", quality=82)
        return written.getvalue()

    def _class_vectors(self, names: tuple[str, ...], template: str) -> Tensor:
        """(C, d) of length 1."""
        with self.lock:
            return class_features(self.index.model, names, templates_of(template))


def templates_of(template: str) -> list[str]:
    """The prompt templates of a set's name or of one template; the words as they are where it is empty."""
    return read_templates(template)[1] if template else ["{}"]


def state_of(request: Request) -> AppState:
    """The state of the app that answers a request."""
    state: AppState = request.app.state.shared
    return state
