"""What the page's answers are made from: an index with its model, opened once, used by one request at a time."""

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from declip.app.jobs import Jobs
from declip.app.queue import QueueOfRun, find_queue
from declip.app.run_folders import RunFolders
from declip.app.thumbnails import Thumbnails
from declip.data.pair import printable
from declip.search.encoding import query_vector
from declip.search.index import Index
from declip.search.parts import Row

MOST_PICTURES = 256
"""Pictures that were sent whose vectors are kept; the pictures themselves are not."""

SHOWN_CAPTIONS = 5
"""Of an image."""

USUAL_SCALE = 100.0
"""exp(logit scale) where a model does not tell: what CLIP's training ends at."""


class Kept:
    """Vectors of pictures that were sent, by a token that cannot be guessed; the oldest go first."""

    def __init__(self, most: int = MOST_PICTURES) -> None:
        self._vectors: OrderedDict[str, Tensor] = OrderedDict()
        self._most, self._lock = most, threading.Lock()

    def add(self, vector: Tensor) -> str:
        """Keep a vector, (d,); returns its token."""
        token = secrets.token_urlsafe(12)
        with self._lock:
            self._vectors[token] = vector
            if len(self._vectors) > self._most:
                self._vectors.popitem(last=False)
        return token

    def get(self, token: str) -> Tensor | None:
        """The vector of a token, None where it is not known any more."""
        return self._vectors.get(token)


@dataclass
class Gallery:
    """An index, its model, and what is shown beside them.

    Attributes:
        index: With its model loaded.
        spec: What the model was opened from.
        runs: The run folders that are shown.
        version: Another one at each start, so that a browser shows no picture of an earlier index.
        lock: Held while the model works: it is put into its evaluation mode and back.
    """

    index: Index
    spec: str
    runs: RunFolders
    version: str = field(default_factory=lambda: secrets.token_hex(4))
    lock: threading.Lock = field(default_factory=threading.Lock)
    kept: Kept = field(default_factory=Kept)
    jobs: Jobs = field(default_factory=Jobs)

    @cached_property
    def thumbnails(self) -> Thumbnails:
        """Of the index's pictures."""
        return Thumbnails(self.index.picture)

    @cached_property
    def queue(self) -> QueueOfRun | str:
        """The queue of the model's run, or why there is none."""
        return find_queue(self.spec, self.index.model)

    @cached_property
    def ids_of_keys(self) -> dict[str, int]:
        """The id of each key, the first where several images share one."""
        found: dict[str, int] = {}
        for key, id in zip(self.index.keys(), self.index.ids.tolist(), strict=True):
            found.setdefault(key, id)
        return found

    @cached_property
    def scale(self) -> float:
        """The model's inverse temperature: what cosines are multiplied with before the softmax."""
        model: Any = self.index.model
        logit_scale = getattr(model, "logit_scale", getattr(getattr(model, "model", None), "logit_scale", None))
        return USUAL_SCALE if logit_scale is None else float(torch.as_tensor(logit_scale).detach().exp())

    def query(self, text: str | None, image: Image.Image | None = None, template: str | None = None) -> Tensor:
        """(d,) float32 of length 1, the vector of a text or of a picture."""
        with self.lock:
            return query_vector(self.index.model, text, image, template=template)

    def described(self, id: int) -> dict[str, Any]:
        """An image as the page shows it; raises `UserError` where there is no such id."""
        return described(self.index.row(id))


def described(row: Row) -> dict[str, Any]:
    """A row as the page shows it: no path of this machine but what the source itself calls the image."""
    captions = [printable(caption) for caption in row.captions]
    return {"id": row.id, "key": printable(row.key), "captions": captions[:SHOWN_CAPTIONS], "of": len(captions)}
