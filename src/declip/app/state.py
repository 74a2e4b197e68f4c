"""State of the app: an index with its model, opened once, and the caches and background jobs of the pages."""

import io
import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from PIL import Image, features
from starlette.requests import Request
from torch import Tensor

from declip.data.pair import printable
from declip.errors import UserError
from declip.evaluation.zero_shot import class_features, read_templates
from declip.search.index import Index

log = logging.getLogger("declip")

MOST_UPLOADS = 256  # uploaded images whose vectors are kept; the images themselves are not
MOST_CLASS_SETS = 16  # sets of classes whose vectors are kept
SIDE, MOST_THUMBNAILS = 192, 2_000  # pixels of the longer side; thumbnails kept, 20 MB of usual photographs

SHOWN_CAPTIONS = 5  # captions of an image that a page shows
USUAL_SCALE = 100.0  # exp(logit scale) of a model that has none: the value that CLIP's training ends at
KIND = "webp" if features.check("webp") else "jpeg"

Progress = Callable[[float], None]
"""Takes the fraction that is done."""


@dataclass
class Job:
    """A computation in the background; `result` is None until it is done, and stays so where it fails."""

    fraction: float = 0.0
    result: Any = None
    error: str = ""

    def state(self) -> dict[str, Any]:
        """The job as a page shows it."""
        name = "failed" if self.error else "working" if self.result is None else "ready"
        return {"state": name, "fraction": self.fraction, "error": self.error}


class Jobs:
    """Jobs by name: each is started when it is first asked for, and runs once, one after the other."""

    def __init__(self) -> None:
        self._jobs: dict[object, Job] = {}
        self._lock, self._turn, self._stop = threading.Lock(), threading.Lock(), threading.Event()

    def get(self, name: object, work: Callable[[Progress], Any]) -> Job:
        """The job of a name; `work` reports its progress and returns something other than None."""
        with self._lock:
            if name not in self._jobs:
                self._jobs[name] = Job()
                threading.Thread(target=self._run, args=(self._jobs[name], work), daemon=True).start()
            return self._jobs[name]

    def stop(self) -> None:
        """End the running jobs when they next report their progress."""
        self._stop.set()

    def _run(self, job: Job, work: Callable[[Progress], Any]) -> None:
        def report(fraction: float) -> None:
            if self._stop.is_set():
                raise UserError("The server has ended.")
            job.fraction = fraction

        try:
            with self._turn:
                report(0.0)
                job.result = work(report)
        except UserError as error:
            job.error = str(error)
        except Exception:
            log.exception("A background job has failed.")
            job.error = "Something went wrong; the terminal says what."


@dataclass
class AppState:
    """Everything that requests share.

    Attributes:
        spec: Where the model was loaded from.
        version: Differs at each start, so that a browser shows no thumbnail of an earlier index.
        lock: Held while the model runs: it is put into evaluation mode and back.
        uploads: Vectors of uploaded images by a token that cannot be guessed.
    """

    index: Index
    spec: str
    version: str = field(default_factory=lambda: secrets.token_hex(4))
    lock: threading.Lock = field(default_factory=threading.Lock)
    uploads: dict[str, Tensor] = field(default_factory=dict)
    jobs: Jobs = field(default_factory=Jobs)

    def __post_init__(self) -> None:
        self.thumbnail = lru_cache(MOST_THUMBNAILS)(self._thumbnail)
        self.class_vectors = lru_cache(MOST_CLASS_SETS)(self._class_vectors)
        self._reading = threading.Lock()

    @cached_property
    def ids_of_keys(self) -> dict[str, int]:
        """The id of each key, the first where several images share one."""
        pairs = list(zip(self.index.keys(), self.index.ids.tolist(), strict=True))
        return dict(reversed(pairs))

    @cached_property
    def scale(self) -> float:
        """The model's exp(logit scale): the factor of cosines before the softmax."""
        model: Any = self.index.model
        logit_scale = getattr(model, "logit_scale", getattr(getattr(model, "model", None), "logit_scale", None))
        return USUAL_SCALE if logit_scale is None else float(torch.as_tensor(logit_scale).detach().exp())

    def query(self, text: str | None, image: Image.Image | None = None, template: str | None = None) -> Tensor:
        """(d,) float32 of length 1, the vector of a text or of an image."""
        with self.lock:
            return self.index.query(text, image, template=template)

    def add_upload(self, vector: Tensor) -> str:
        """Keep an uploaded image's vector, (d,), and forget the oldest; returns its token."""
        token = secrets.token_urlsafe(12)
        with self.lock:
            self.uploads[token] = vector
            if len(self.uploads) > MOST_UPLOADS:
                del self.uploads[next(iter(self.uploads))]
        return token

    def describe(self, id: int) -> dict[str, Any]:
        """An image as a page shows it, without paths except the source's own key."""
        row = self.index.row(id)
        captions = [printable(caption) for caption in row.captions[:SHOWN_CAPTIONS]]
        return {"id": id, "key": printable(row.key), "captions": captions}

    def _thumbnail(self, id: int) -> bytes:
        """A small copy of an image of the index, with nothing of its file except the pixels."""
        with self._reading:  # a source need not bear several threads, and one large image at a time is enough
            image = self.index.image(id)
        small, written = image.copy(), io.BytesIO()
        small.info.clear()
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.save(written, KIND, quality=82)
        return written.getvalue()

    def _class_vectors(self, names: tuple[str, ...], template: str | None) -> Tensor:
        """(C, d) of length 1."""
        templates = ["{}"] if template is None else read_templates(template)[1]
        with self.lock:
            return class_features(self.index.model, names, templates)


def state_of(request: Request) -> AppState:
    """The state of the app that answers a request."""
    state: AppState = request.app.state.shared
    return state
