"""What requests share: an open index and its model, used by several threads."""

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from declip.data.images.decode import encode
from declip.data.images.thumbnails import shrink
from declip.data.pair import printable
from declip.errors import UserError
from declip.evaluation.prompt_sets import read_templates
from declip.evaluation.zero_shot import class_features
from declip.runs.fitted import FittedRun, fit_folder
from declip.search.class_words import add_classes
from declip.search.index import Index

MOST_TEXTS = 20_000  # texts whose vectors stay in memory
SHOWN_CAPTIONS = 5  # captions of an image that a page shows

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True, eq=False)
class AppState:
    """An open index; `model_path` is what its model was loaded from."""

    index: Index
    model_path: str
    captioning: Any = None  # `declip.app.captions.Captioning`, with --caption
    # No browser shows images of an earlier index
    version: str = field(default_factory=lambda: secrets.token_hex(4))
    stopped: threading.Event = field(default_factory=threading.Event)  # once set, comparisons end
    compared: dict[object, Any] = field(default_factory=dict)
    vectors: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # by text and template
    # A query switches the model's mode and back, sources may not be thread-safe, and comparisons use all cores.
    encoding: threading.Lock = field(default_factory=threading.Lock)
    reading: threading.Lock = field(default_factory=threading.Lock)
    comparing: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def ranks(self) -> dict[tuple[int, str], float]:
        """Out-of-fold ranks by image and caption, 0 best and 1 worst.

        Empty unless the model is a run that cross-validated at least half of the images.
        """
        index = self.index
        known = FittedRun(fit_folder(self.model_path)).caption_ranks
        ranks: dict[tuple[int, str], float] = {}
        if not known:
            return ranks
        rows = zip(index.ids.tolist(), index.keys(), index.captions(), strict=True)
        for id, key, captions in rows:
            for caption in captions:
                if (key, caption) in known:
                    ranks[id, caption] = known[key, caption]
        images = {id for id, _ in ranks}
        if 2 * len(images) >= len(index):
            return ranks
        return {}

    def once(self, compare: "Callable[[AppState], Any]") -> Any:
        """The result of a comparison of all images, which the first request computes while others wait."""
        with self.comparing:
            if compare not in self.compared:
                self.compared[compare] = compare(self)
            return self.compared[compare]

    def check_running(self) -> None:
        """Raise a `UserError` once the server has stopped, which ends a long comparison."""
        if self.stopped.is_set():
            raise UserError("The server has stopped.")

    def text_vectors(self, texts: Sequence[str], template: str = "") -> Tensor:
        """(t, d) float32 of length 1, the vectors of texts in a template or in those of a set; each is encoded once."""
        templates = read_templates(template)[1] if template else ["{}"]
        keys = [(text, template) for text in texts]
        with self.encoding:
            if len(self.vectors) > MOST_TEXTS:
                self.vectors.clear()
            new = [key for key in dict.fromkeys(keys) if key not in self.vectors]
            if new:
                given = [text for text, _ in new]
                features = class_features(self.index.text_model, given, templates)
                self.vectors.update(zip(new, features, strict=True))
            return torch.stack([self.vectors[key] for key in keys])

    def query_vector(self, text: str, template: str) -> Tensor:
        """(d,) float32 of length 1, the vector that a text is searched by."""
        vector = self.text_vectors([text], template)[0]
        with self.encoding:
            return add_classes(vector, text, self.index.text_model, lambda: self.index.model)

    def image_vector(self, image: Image.Image) -> Tensor:
        """(d,) float32 of length 1, the vector of an image that is not in the index."""
        with self.encoding:
            return self.index.query(None, image)

    def describe(self, ids: Ids) -> list[dict[str, Any]]:
        """Images as a page shows them, without paths except the source's own key."""
        shown = []
        for row in self.index.rows(ids):
            captions = [*map(printable, row.captions[:SHOWN_CAPTIONS])]
            shown.append({"id": row.id, "key": printable(row.key), "captions": captions})
        return shown

    def thumbnail(self, id: int, side: int) -> bytes:
        """A small copy of an image of the index as WebP."""
        with self.reading:
            image = shrink(self.index.image(id), side)
        return encode(image, "WEBP", quality=82)
