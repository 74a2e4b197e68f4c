"""The nearest-neighbor queue of a run: the captions that its loss chose neighbors from."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.image_source import ImageSource
from declip.data.sources.shard_names import is_url
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import STATE, TRAINING, list_checkpoints
from declip.training.setup import build_loader, open_training_source

FEATURES, TAGS, FILLED = (
    f"objective.terms.nearest_neighbor.queue.{name}" for name in ("features", "tags", "_extra_state")
)


class RunQueue:
    """The queue in a checkpoint of a run: `filled` of `size` entries at a `step`.

    Raises:
        UserError: The run keeps no queue, it is empty, or its training pairs are not there.
    """

    def __init__(self, checkpoint: Path, recipe: Recipe, model: DualEncoder) -> None:
        with safe_open(checkpoint / TRAINING, "pt") as file:  # nothing else of the file is read
            if FEATURES not in set(file.keys()):
                raise UserError("The run keeps no queue: its loss has no nearest_neighbor term.")
            features, tags, filled = (file.get_tensor(name) for name in (FEATURES, TAGS, FILLED))
        self.step = int(checkpoint.name.removeprefix("step-"))
        self.size, self.filled = len(tags), int(filled[0])
        known = torch.nonzero(tags[: self.filled] >= 0).flatten()
        if not len(known):
            raise UserError("The queue of this run is empty, or its entries do not say which pairs they are.")
        source = _training_source(recipe)
        self._features, self._tags = features[known].float(), tags[known].numpy()
        self._loader, self._images = build_loader(recipe, source, model, workers=0), ImageSource(source)
        self.name = source.name
        self._pairs = self._tags // 2 % len(source)  # a tag is twice the number of the sample, plus the text view

    def nearest(self, query: Tensor, count: int) -> list[dict[str, Any]]:
        """The entries nearest to a query (d,) of length 1, each pair once, the best first.

        Returns:
            The text of each as it was augmented, the key of its pair, and the cosine.
        """
        cosines = (self._features @ query).numpy()
        order = np.argsort(-cosines, kind="stable")
        order = order[np.sort(np.unique(self._pairs[order], return_index=True)[1])]
        entries: list[dict[str, Any]] = []
        for slot in order.tolist():
            sample, view = divmod(int(self._tags[slot]), 2)
            with suppress(BrokenPair):  # the pairs have changed since
                key, text = self._images.key(int(self._pairs[slot])), self._loader.words(sample, view)
                entries.append({"text": text, "key": key, "cosine": float(cosines[slot])})
            if len(entries) == count:
                break
        return entries


def find_queue(where: str, model: object) -> RunQueue | str:
    """The queue of the run that a model was loaded from, or the reason why there is none."""
    path = Path(where).expanduser()
    checkpoints = [path] if (path / STATE).is_file() else list_checkpoints(path) if path.is_dir() else []
    if not checkpoints or not isinstance(model, DualEncoder) or model.recipe is None:
        return "The model is no run of this package, so there is no queue."
    try:
        return RunQueue(checkpoints[-1], model.recipe, model)
    except UserError as error:
        return str(error)
    except (OSError, SafetensorError) as error:
        return f"The queue of '{checkpoints[-1].name}' cannot be read: {type(error).__name__}."


def _training_source(recipe: Recipe) -> PairSource:
    """The run's training source; one that would have to be downloaded is not opened."""
    sources = recipe.data.source
    specs = [sources] if isinstance(sources, str) else [entry.source for entry in sources]
    if any(is_url(spec) for spec in specs):
        raise UserError("The training pairs, whose captions the queue holds, are not on this machine.")
    return open_training_source(recipe)
