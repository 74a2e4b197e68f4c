"""The queue of a run as nearest-neighbor supervision saw it: its captions, and which lie nearest to a caption."""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from declip.data.loader import PairLoader
from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.image_source import ImageSource
from declip.data.sources.shard_names import is_url
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import STATE, TRAINING, list_checkpoints
from declip.training.setup import build_loader, open_training_source

FEATURES, TAGS, PLACE = (
    f"objective.terms.nearest_neighbor.queue.{name}" for name in ("features", "tags", "_extra_state")
)


class Entry(NamedTuple):
    """An entry of the queue that lies near a caption.

    Attributes:
        words: The text that it was made of, after augmentation.
        key: Of its pair, as the training source calls it.
        cosine: To the caption that was asked for.
    """

    words: str
    key: str
    cosine: float


class QueueOfRun:
    """The queue in a run's newest checkpoint.

    Args:
        checkpoint: The checkpoint's folder.
        model: The run's.

    Attributes:
        step: Of the checkpoint.
        size: Entries that the queue can hold.
        held: Entries that it holds.

    Raises:
        UserError: The run keeps no queue, it is empty, its entries do not say which pairs they are, or the training
            pairs are not there.
    """

    def __init__(self, checkpoint: Path, model: DualEncoder) -> None:
        features, tags, place = _read(checkpoint)
        recipe = model.recipe
        self.step = int(checkpoint.name.removeprefix("step-"))
        self.size, self.held = len(tags), int(place[0])
        if recipe is None or not self.held:
            raise UserError("The queue of this run is still empty.")
        known = torch.nonzero(tags[: self.held] >= 0).flatten()
        if not len(known):
            raise UserError("The entries of this run's queue do not say which pairs they are.")
        self._features, self._tags = features[known].float(), tags[known].numpy()
        self._source, self._loader = _training_pairs(recipe, model)
        self.name = self._source.name
        self._pairs = self._tags // 2 % len(self._source)

    def nearest(self, query: Tensor, count: int) -> list[Entry]:
        """The nearest entries, each pair once, the best first.

        Args:
            query: (d,) float32 of length 1.
            count: How many, at most.
        """
        cosines = (self._features @ query).numpy()
        found: list[Entry] = []
        met: set[int] = set()
        for slot in np.argsort(-cosines, kind="stable").tolist():
            pair, tag = int(self._pairs[slot]), int(self._tags[slot])
            if pair in met:
                continue
            met.add(pair)
            try:
                words = self._loader.words(tag // 2, tag % 2)
                found.append(Entry(words, self._images.key(pair), float(cosines[slot])))
            except BrokenPair:  # the pairs have changed since
                continue
            if len(found) == count:
                break
        return found

    @cached_property
    def _images(self) -> ImageSource:
        return ImageSource(self._source)


def find_queue(where: str, model: object) -> QueueOfRun | str:
    """The queue of what a model was loaded from, or why there is none.

    Args:
        where: What `declip.load` opened.
        model: What it gave.
    """
    path = Path(where).expanduser()
    if not isinstance(model, DualEncoder) or not path.is_dir():
        return "The model is no run of this package, so there is no queue."
    checkpoints = [path] if (path / STATE).is_file() else list_checkpoints(path)
    if not checkpoints:
        return "The model is no run of this package, so there is no queue."
    try:
        return QueueOfRun(checkpoints[-1], model)
    except UserError as error:
        return str(error)


def _read(checkpoint: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Features, tags, and how much of them is written; nothing else of the file is read."""
    try:
        with safe_open(checkpoint / TRAINING, "pt") as file:
            if FEATURES not in set(file.keys()):
                raise UserError("The run keeps no queue: its nearest_neighbor term has no weight.")
            return file.get_tensor(FEATURES), file.get_tensor(TAGS), file.get_tensor(PLACE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The queue of step '{checkpoint.name}' cannot be read: {type(error).__name__}.") from error


def _training_pairs(recipe: Recipe, model: DualEncoder) -> tuple[PairSource, PairLoader]:
    sources = recipe.data.source
    words = [sources] if isinstance(sources, str) else [each.source for each in sources]
    if any(is_url(part) for word in words for part in word.split("::")):
        raise UserError("The training pairs, whose captions the queue holds, are not on this machine.")
    try:
        source = open_training_source(recipe)
    except UserError as error:
        raise UserError(f"The training pairs, whose captions the queue holds, are not there: {error}") from error
    return source, build_loader(recipe, source, model, workers=0)
