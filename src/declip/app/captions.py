"""Captioning: the order of the images, suggestions, and projections fitted to the captions so far."""

import os
import shlex
import threading
import time
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from declip.app.caption_table import CaptionTable, Change
from declip.app.requests import ImageId
from declip.app.state import AppState
from declip.closed_form.choice import choose_heads
from declip.closed_form.heads import Heads
from declip.closed_form.pairs import FitData, Pairs
from declip.data.sources.names import resolve
from declip.data.sources.table import TABLE_KINDS
from declip.errors import UserError
from declip.search.choose import choose_from

EVERY = 25  # captions after which the projections are fitted again
MOST = 2_000  # images that are offered
SUGGESTIONS = 5
# Seconds for which an image that one tab shows is not offered to another, unless the tab asks again: it does so every
# 20 s, and a browser runs the timers of a hidden tab once a minute.
LEASE = 90

Tab = Annotated[str, Field(max_length=64)]


class ShowQuestion(BaseModel):
    """An image by its position in the order; without `position` the next one after `after` that has no caption."""

    tab: Tab
    after: int = Field(-1, ge=-1)
    position: int | None = Field(None, ge=0)


class HoldQuestion(BaseModel):
    """The image that a tab still shows; None once it is closed."""

    tab: Tab
    id: ImageId | None = None


class Captioning:
    """The order of the images, what the tabs show, and the projections that are fitted to the captions so far."""

    def __init__(self, state: AppState, path: Path) -> None:
        self.state = state
        self.table = CaptionTable(path, state.index)
        self.captions = self.table.read()
        self.order = self._order()
        # How often a left-out caption and its image fit better than others, with a 95 % interval, after each fit, and
        # how often without any fit
        self.estimates: list[dict[str, float]] = []
        self.fitting = threading.Lock()
        self._heads: Heads | None = None
        self._held: dict[str, tuple[int, float]] = {}  # image and time, by tab
        self._lock = threading.Lock()
        self._fit()

    def _order(self) -> list[int]:
        """Captioned images in the order of the file, then those to caption: a table's by row, others by choice."""
        index = self.state.index
        order = list(self.captions)
        if index.info.source.path.lower().endswith(TABLE_KINDS):
            order += index.ids.tolist()
        elif len(order) < len(index):
            with suppress(UserError):  # all others are near-duplicates
                chosen = choose_from(index, MOST, index.vectors(order))
                order += [hit.id for hit in chosen.images]
        return list(dict.fromkeys(order))

    def next_position(self, tab: str, after: int) -> int | None:
        """The first image without a caption after a position, then from the start, that no other tab shows."""
        self.hold(tab, None)
        with self._lock:
            held = {id for id, _ in self._held.values()}
            start = min(after + 1, len(self.order))
            for position in [*range(start, len(self.order)), *range(start)]:
                id = self.order[position]
                if id not in self.captions and id not in held:
                    self._held[tab] = id, time.monotonic()
                    return position
        return None

    def hold(self, tab: str, id: int | None) -> None:
        """Offer an image to no other tab for `LEASE` seconds, in place of the tab's last one; None holds no image."""
        now = time.monotonic()
        with self._lock:
            for other, (_, since) in list(self._held.items()):
                if other == tab or now - since > LEASE:
                    del self._held[other]
            if id is not None:
                self._held[tab] = id, now

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
        """The captions of other images that are nearest to an image, by the current projections."""
        # Not the names of ImageNet's classes: of drawings and of photographs most of these would be wrong.
        saved = self.captions.get(id, [])
        distinct = dict.fromkeys(chain(*self.captions.values()))
        texts = [text for text in distinct if text not in saved]
        if not texts:
            return []
        image = self.state.index.vectors([id])
        features = self.state.text_vectors(texts)
        heads = self._heads
        if heads is None:
            cosines = image @ features.mT
        else:
            cosines = heads.similarities(image.to(heads.image), features.to(heads.text))
        nearest = cosines[0].topk(min(SUGGESTIONS, len(texts))).indices
        return [texts[row] for row in nearest.tolist()]

    def _fit(self) -> None:
        """Fit projections to the captions so far; cross-validation says how well they fit."""
        with self.fitting:
            known = dict(self.captions)
            if len(known) < EVERY:
                return
            texts = list(chain(*known.values()))
            counts = torch.tensor([len(own) for own in known.values()])
            images = self.state.index.vectors([*known])
            features = self.state.text_vectors(texts)
            pairs = Pairs(images, features, torch.repeat_interleave(counts))
            # Images with an equal first caption stay in one fold
            firsts = [own[0] for own in known.values()]
            groups = np.unique(firsts, return_inverse=True)[1]
            choice = choose_heads(FitData.of(pairs, groups, one_space=True))
            # --- not a recall, which depends on the number of images
            if choice.outcome is not None and choice.start is not None:
                start = choice.start.percentile(groups).value
                outcome = choice.outcome.percentile(groups)._asdict()
                sizes = {"images": len(known), "captions": len(texts)}
                self.estimates.append({**sizes, **outcome, "start": start})
            self._heads = choice.heads

    def describe(self) -> dict[str, Any]:
        """Numbers of images, the estimates so far, and the commands to run after the last caption."""
        return {
            "done": len(self.captions),
            "total": len(self.order),
            "estimates": self.estimates,
            "commands": self._next_commands(),
        }

    def _next_commands(self) -> list[str]:
        """The commands that fine-tune on the captions, and search all images with the result."""
        index = self.state.index
        table = self.table.path
        source = resolve(index.info.source.path, index.folder)
        if os.path.isabs(source):
            source = os.path.relpath(source)
        run = Path("runs", table.stem)
        numbers = count(2)
        while run.exists():
            run = Path("runs", f"{table.stem}-{next(numbers)}")
        start = self.state.model_path
        finetune = ["declip", "finetune", str(table), "--from", start, "--out", str(run)]
        app = ["declip", "app", str(run), source]
        return [shlex.join(finetune), shlex.join(app)]


def show(state: AppState, asked: ShowQuestion) -> dict[str, Any]:
    """An image to caption, or the numbers alone if none is left."""
    captioning: Captioning = state.captioning
    position = asked.position
    if position is None:
        position = captioning.next_position(asked.tab, asked.after)
    if position is None:
        return captioning.describe()
    if position >= len(captioning.order):
        raise HTTPException(404, "There is no such image.")
    id = captioning.order[position]
    captioning.hold(asked.tab, id)
    return {
        **captioning.describe(),
        **state.describe([id])[0],
        "position": position,
        "saved": captioning.captions.get(id, []),
        "suggestions": captioning.suggestions(id),
    }


def hold(state: AppState, asked: HoldQuestion) -> dict[str, Any]:
    """Renew or end a tab's hold of an image."""
    state.captioning.hold(asked.tab, asked.id)
    return {}


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
