"""State of the app: an open index with its model, uploaded images, and comparisons of all pairs."""

import asyncio
import hashlib
import io
import secrets
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from torch import Tensor

from declip.data.pair import printable
from declip.errors import UserError
from declip.evaluation.zero_shot import class_features, logit_scale, read_templates
from declip.reports.sheets import heat_map
from declip.runs.folder import OUT_OF_FOLD, read_run
from declip.search.index import Index

MOST_UPLOADS = 256  # uploaded images whose vectors stay in memory; the images themselves do not
UPLOADS_AT_ONCE = 4  # images that are received at the same time; others wait
MOST_CLASS_SETS = 16  # sets of classes whose vectors stay in memory
SIDE = 192  # pixels of the longer side of a thumbnail
SHOWN_CAPTIONS = 5  # captions of an image that a page shows


class AppState:
    """Everything that requests share; `model_path` is what the model was loaded from."""

    def __init__(self, index: Index, model_path: str) -> None:
        self.index, self.model_path = index, model_path
        # Loads the text tower now, which may be refused, and the image tower with the first image that asks for it.
        self.scale = logit_scale(index.text_model)
        self.version = secrets.token_hex(4)  # so that a browser shows no thumbnail of an earlier index
        # The browser's list of marked pairs stays the same at each start with this index.
        name = f"{index.info.created} {index.info.model.fingerprint}"
        self.list_name = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        self.ranks = out_of_fold_ranks(index, Path(model_path).expanduser())
        self.uploads: dict[str, Tensor] = {}  # vectors by a token that cannot be guessed
        self.uploading = asyncio.Semaphore(UPLOADS_AT_ONCE)
        self.stopped = threading.Event()  # once set, comparisons end
        self.class_vectors = lru_cache(MOST_CLASS_SETS)(self._class_vectors)
        self.compared: dict[object, Any] = {}
        self.captioning: Any = None  # `declip.app.captions.Captioning`, with --caption
        # A query switches the model's mode and back, sources may not be thread-safe, and comparisons use all cores.
        self._encoding, self._reading, self._comparing = threading.Lock(), threading.Lock(), threading.Lock()

    def once(self, compare: "Callable[[AppState], Any]") -> Any:
        """The result of a comparison of the whole index, which the first request computes while others wait."""
        with self._comparing:
            if compare not in self.compared:
                self.compared[compare] = compare(self)
        return self.compared[compare]

    def check_running(self) -> None:
        """Raise a `UserError` once the server has stopped, which ends a long comparison."""
        if self.stopped.is_set():
            raise UserError("The server has stopped.")

    def query(self, text: str | None, image: Image.Image | None = None, template: str = "") -> Tensor:
        """(d,) float32 of length 1, the vector of a text or of an image."""
        with self._encoding:
            return self.index.query(text, image, template=template or None)

    def add_upload(self, vector: Tensor) -> str:
        """Store an uploaded image's vector (d,), and drop the oldest one; returns its token."""
        token = secrets.token_urlsafe(12)
        with self._encoding:
            self.uploads[token] = vector
            if len(self.uploads) > MOST_UPLOADS:
                del self.uploads[next(iter(self.uploads))]
        return token

    def image_vector(self, token: str | None, id: int | None) -> Tensor | None:
        """(d,), the vector of an uploaded image or of one of the index; None without either."""
        if token:
            if token not in self.uploads:
                raise HTTPException(410, "The server no longer has this image. Choose it again.")
            return self.uploads[token]
        return None if id is None else self.index.vectors([id])[0]

    def describe(self, id: int) -> dict[str, Any]:
        """An image as a page shows it, without paths except the source's own key."""
        row = self.index.row(id)
        captions = [printable(caption) for caption in row.captions[:SHOWN_CAPTIONS]]
        return {"id": id, "key": printable(row.key), "captions": captions}

    def thumbnail(self, id: int, side: int = SIDE, text: str = "") -> bytes:
        """A small copy of an image of the index as WebP; with a text, the places similar to it are in color."""
        with self._reading:
            image = self.index.image(id).copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        if text:
            with self._encoding:
                similarities = self.index.model.similarity_map(image, text)  # type: ignore[attr-defined]  # of declip
            image = heat_map(image, similarities.numpy())
        # --- without the metadata of its file
        image.info.clear()
        written = io.BytesIO()
        image.save(written, "WEBP", quality=82)
        return written.getvalue()

    def _class_vectors(self, names: tuple[str, ...], template: str) -> Tensor:
        """(C, d) of length 1."""
        with self._encoding:
            return class_features(self.index.text_model, names, templates_of(template))


def out_of_fold_ranks(index: Index, run: Path) -> dict[int, float]:
    """The worst rank of each image's captions, 0 best and 1 worst, by projections that were fitted without them.

    Empty unless the model is a run that cross-validated at least half of the images.
    """
    known = read_run(run).caption_ranks if (run / OUT_OF_FOLD).is_file() else {}
    ranks: dict[int, float] = {}
    for id, key, captions in zip(index.ids.tolist(), index.keys(), index.captions(), strict=True) if known else ():
        if own := [known[key, caption] for caption in captions if (key, caption) in known]:
            ranks[id] = max(own)
    return ranks if 2 * len(ranks) >= len(index) else {}


def templates_of(template: str) -> list[str]:
    """The prompt templates of a set or of one template; empty means the text itself."""
    return read_templates(template)[1] if template else ["{}"]


def state_of(request: Request) -> AppState:
    """The state of the app that received a request."""
    state: AppState = request.app.state.shared
    return state
