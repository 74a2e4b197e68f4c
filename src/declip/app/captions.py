"""Routes of the app to caption images: their order and suggestions, and heads fitted to the captions so far."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from declip.app.caption_table import CaptionTable
from declip.app.requests import ImageId, OneLine, Question, Text
from declip.app.state import AppState, state_of
from declip.closed_form.heads import choose_heads
from declip.closed_form.solve import Heads, Pairs
from declip.errors import UserError
from declip.evaluation.results import Measure
from declip.evaluation.zero_shot import read_prompts
from declip.search.choose import choose_from

EVERY = 25  # captions after which the heads are fitted again
MOST = 2_000  # images that are offered
SUGGESTIONS = 5
HELD = 300  # seconds for which an image that one tab shows is not offered to another


class PlaceQuestion(Question):
    """An image by its place in the order; without `place` the next one after `after` that has no caption."""

    tab: Annotated[str, Field(max_length=64)]
    after: int = Field(-1, ge=-1)
    place: int | None = Field(None, ge=0)


class SaveQuestion(Question):
    """New captions of an image, and those that the page showed as saved; `replaces` is the number of one of them."""

    id: ImageId
    captions: Annotated[list[Text], Field(max_length=50)]
    seen: list[Annotated[str, OneLine]]
    replaces: int | None = Field(None, ge=0)


class Captioning:
    """The order of the images, what the tabs show, and the heads that are fitted to the captions so far."""

    def __init__(self, state: AppState, path: Path) -> None:
        self.state, self.table = state, CaptionTable(path, state.index)
        self.captions = self.table.read()
        self.order = self._order()
        # How often a left-out caption and its image fit better than others, with a 95 % interval, after each fit
        self.estimates: list[dict[str, float]] = []
        self._heads: Heads | None = None
        self._held: dict[int, tuple[str, float]] = {}  # tab and time, by image
        self._lock, self._fitting = threading.Lock(), threading.Lock()
        self.classes = list(dict.fromkeys(read_prompts("imagenet").classes.values()))
        vectors = state.class_vectors(tuple(self.classes), "")
        self._vectors = dict(zip(self.classes, vectors, strict=True))  # of texts
        self._fit()

    def _order(self) -> list[int]:
        """Captioned images in the order of the file, then those to caption: a table's by row, others by choice."""
        index, order = self.state.index, list(self.captions)
        if index.info.source.path.lower().endswith((".csv", ".tsv", ".jsonl", ".json", ".parquet")):
            order += index.ids.tolist()
        elif len(order) < len(index):
            with suppress(UserError):  # all others are near-duplicates
                order += [hit.id for hit in choose_from(index, MOST, index.vectors(order)).images]
        return list(dict.fromkeys(order))

    def next_place(self, tab: str, after: int) -> int | None:
        """The first image without a caption after a place, then from the start, that no other tab shows."""
        now = time.monotonic()
        with self._lock:
            for place in [*range(after + 1, len(self.order)), *range(min(after + 1, len(self.order)))]:
                holder, since = self._held.get(self.order[place], (tab, now))
                if self.order[place] not in self.captions and (holder == tab or now - since > HELD):
                    self._held[self.order[place]] = tab, now
                    return place
        return None

    def save(self, id: int, captions: Sequence[str], seen: Sequence[str], replaces: int | None) -> None:
        """Write captions to the disk, and fit the heads again after every 25 images."""
        with self._lock:
            before = len(self.captions)
            try:
                self.table.change(id, captions, seen, replaces)
            finally:  # also if others were added meanwhile, which the page shows next
                self.captions = self.table.read()
            due = len(self.captions) // EVERY > before // EVERY
        if due:
            threading.Thread(target=self._fit, daemon=True).start()

    def suggestions(self, id: int) -> list[str]:
        """Captions and names of ImageNet's classes that are nearest to an image, by the heads of now."""
        texts = list(dict.fromkeys([text for own in self.captions.values() for text in own] + self.classes))
        image, features, heads = self.state.index.vectors([id]), self._features(texts), self._heads
        if heads is None:
            cosines = image @ features.mT
        else:
            cosines = heads.similarities(image.to(heads.image), features.to(heads.text))
        return [texts[place] for place in cosines[0].topk(min(SUGGESTIONS, len(texts))).indices.tolist()]

    def _features(self, texts: Sequence[str]) -> Tensor:
        """(t, d), the vectors of texts, each encoded once."""
        for text in texts:
            if text not in self._vectors:
                self._vectors[text] = self.state.query(text)
        return torch.stack([self._vectors[text] for text in texts])

    def _fit(self) -> None:
        """Fit heads to the captions so far, and measure by cross-validation how well they fit."""
        with self._fitting:
            known = dict(self.captions)
            if len(known) < EVERY:
                return
            texts = [text for own in known.values() for text in own]
            owners = torch.repeat_interleave(torch.tensor([len(own) for own in known.values()]))
            pairs = Pairs(self.state.index.vectors([*known]), self._features(texts), owners)
            # Images with an equal first caption stay in one fold
            groups = np.unique([own[0] for own in known.values()], return_inverse=True)[1]
            choice = choose_heads(pairs, groups, embedded=True)
            if choice.outcome is not None:
                # Not a recall, which depends on the number of images
                value = 1 - float(choice.outcome.fit.nanmean())
                low, high = Measure("fit", value, 0.5, len(known)).interval
                estimate = {"captions": len(known), "value": value, "low": min(low, value), "high": max(high, value)}
                self.estimates.append(estimate)
            self._heads = choice.heads

    def describe(self, place: int | None) -> dict[str, Any]:
        """Numbers of images, the estimates so far, and an image as the page shows it."""
        numbers = {"done": len(self.captions), "total": len(self.order), "estimates": self.estimates}
        if place is None:
            return numbers
        id = self.order[place]
        about = {"place": place, "saved": self.captions.get(id, []), "suggestions": self.suggestions(id)}
        return {**numbers, **self.state.describe(id), **about}


def show(request: Request) -> Response:
    """Answer with an image to caption, or the numbers alone if none is left."""
    captioning, asked = _captioning(request), PlaceQuestion.of(request)
    place = captioning.next_place(asked.tab, asked.after) if asked.place is None else asked.place
    if place is not None and place >= len(captioning.order):
        raise HTTPException(404, "There is no such image.")
    return JSONResponse(captioning.describe(place))


async def save(request: Request) -> Response:
    """Add captions of an image, change one or delete it; the answer comes when the file is on the disk."""
    captioning, asked = _captioning(request), await SaveQuestion.in_body(request)
    texts = [text for text in asked.captions if text]
    if not texts and asked.replaces is None:
        raise UserError("The caption is empty.")
    if asked.id not in captioning.order:
        raise HTTPException(404, "There is no such image.")
    await run_in_threadpool(captioning.save, asked.id, texts, asked.seen, asked.replaces)
    return JSONResponse(captioning.describe(None) | {"saved": captioning.captions.get(asked.id, [])})


def _captioning(request: Request) -> Captioning:
    found: Captioning | None = state_of(request).captioning
    if found is None:
        raise HTTPException(404, "The app was started without --caption FILE.")
    return found
