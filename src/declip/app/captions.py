"""Captioning: the order of the images, suggestions, and projections fitted to the captions so far."""

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from declip.app.caption_table import CaptionTable, Change
from declip.app.state import AppState
from declip.closed_form.heads import choose_heads
from declip.closed_form.solve import Heads, Pairs
from declip.data.sources.table import TABLE_KINDS
from declip.errors import UserError
from declip.evaluation.zero_shot import read_prompts
from declip.search.choose import choose_from

EVERY = 25  # captions after which the projections are fitted again
MOST = 2_000  # images that are offered
SUGGESTIONS = 5
HELD = 300  # seconds for which an image that one tab shows is not offered to another


class ShowQuestion(BaseModel):
    """An image by its position in the order; without `position` the next one after `after` that has no caption."""

    tab: Annotated[str, Field(max_length=64)]
    after: int = Field(-1, ge=-1)
    position: int | None = Field(None, ge=0)


class Captioning:
    """The order of the images, what the tabs show, and the projections that are fitted to the captions so far."""

    def __init__(self, state: AppState, path: Path) -> None:
        self.state, self.table = state, CaptionTable(path, state.index)
        self.captions = self.table.read()
        self.order = self._order()
        self.classes = list(dict.fromkeys(read_prompts("imagenet").classes.values()))
        # How often a left-out caption and its image fit better than others, with a 95 % interval, after each fit
        self.estimates: list[dict[str, float]] = []
        self.fitting = threading.Lock()
        self._heads: Heads | None = None
        self._held: dict[int, tuple[str, float]] = {}  # tab and time, by image
        self._lock = threading.Lock()
        state.text_vectors(self.classes)  # before the first page asks for suggestions
        self._fit()

    def _order(self) -> list[int]:
        """Captioned images in the order of the file, then those to caption: a table's by row, others by choice."""
        index, order = self.state.index, list(self.captions)
        if index.info.source.path.lower().endswith(TABLE_KINDS):
            order += index.ids.tolist()
        elif len(order) < len(index):
            with suppress(UserError):  # all others are near-duplicates
                order += [hit.id for hit in choose_from(index, MOST, index.vectors(order)).images]
        return list(dict.fromkeys(order))

    def next_position(self, tab: str, after: int) -> int | None:
        """The first image without a caption after a position, then from the start, that no other tab shows."""
        now = time.monotonic()
        with self._lock:
            for position in [*range(after + 1, len(self.order)), *range(min(after + 1, len(self.order)))]:
                id = self.order[position]
                holder, since = self._held.get(id, (tab, now))
                if id not in self.captions and (holder == tab or now - since > HELD):
                    self._held[id] = tab, now
                    return position
        return None

    def save(self, change: Change) -> None:
        """Write captions to the disk, and fit the projections again after every 25 images."""
        with self._lock:
            before = len(self.captions)
            try:
                self.table.change(change)
            finally:  # also if others were added meanwhile, which the page shows next
                self.captions = self.table.read()
            due = len(self.captions) // EVERY > before // EVERY
        if due:
            threading.Thread(target=self._fit, daemon=True).start()

    def suggestions(self, id: int) -> list[str]:
        """Captions and names of ImageNet's classes that are nearest to an image, by the current projections."""
        texts = list(dict.fromkeys([text for own in self.captions.values() for text in own] + self.classes))
        image, features, heads = self.state.index.vectors([id]), self.state.text_vectors(texts), self._heads
        if heads is None:
            cosines = image @ features.mT
        else:
            cosines = heads.similarities(image.to(heads.image), features.to(heads.text))
        return [texts[row] for row in cosines[0].topk(min(SUGGESTIONS, len(texts))).indices.tolist()]

    def _fit(self) -> None:
        """Fit projections to the captions so far; cross-validation says how well they fit."""
        with self.fitting:
            known = dict(self.captions)
            if len(known) < EVERY:
                return
            texts = [text for own in known.values() for text in own]
            owners = torch.repeat_interleave(torch.tensor([len(own) for own in known.values()]))
            pairs = Pairs(self.state.index.vectors([*known]), self.state.text_vectors(texts), owners)
            # Images with an equal first caption stay in one fold
            groups = np.unique([own[0] for own in known.values()], return_inverse=True)[1]
            choice = choose_heads(pairs, groups, embedded=True)
            if choice.outcome is not None:  # not a recall, which depends on the number of images
                self.estimates.append({"captions": len(known), **choice.outcome.percentile(groups)._asdict()})
            self._heads = choice.heads

    def describe(self) -> dict[str, Any]:
        """Numbers of images, and the estimates so far."""
        return {"done": len(self.captions), "total": len(self.order), "estimates": self.estimates}


def show(state: AppState, asked: ShowQuestion) -> dict[str, Any]:
    """An image to caption, or the numbers alone if none is left."""
    captioning: Captioning = state.captioning
    position = captioning.next_position(asked.tab, asked.after) if asked.position is None else asked.position
    if position is None:
        return captioning.describe()
    if position >= len(captioning.order):
        raise HTTPException(404, "There is no such image.")
    id = captioning.order[position]
    about = {"position": position, "saved": captioning.captions.get(id, []), "suggestions": captioning.suggestions(id)}
    return {**captioning.describe(), **state.describe([id])[0], **about}


def save(state: AppState, change: Change) -> dict[str, Any]:
    """Add captions of an image, change one or delete it; the answer comes when the file is on the disk."""
    captioning: Captioning = state.captioning
    change.captions = [text for text in change.captions if text]
    if not change.captions and change.replaces is None:
        raise UserError("The caption is empty.")
    if change.id not in captioning.order:
        raise HTTPException(404, "There is no such image.")
    captioning.save(change)
    return {**captioning.describe(), "saved": captioning.captions.get(change.id, [])}
