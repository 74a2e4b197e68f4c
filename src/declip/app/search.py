"""Search images by a text or an image, and look for the captions nearest to a caption."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from declip.app import params
from declip.app.state import AppState, state_of
from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.image_source import ImageSource
from declip.data.sources.shard_names import is_url
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import STATE, TRAINING, list_checkpoints
from declip.search.index import mix
from declip.training.setup import build_loader, open_training_source

MOST_HITS, MOST_NEIGHBORS = 200, 48
FEATURES, TAGS, STATE_OF_QUEUE = (
    f"objective.terms.nearest_neighbor.queue.{name}" for name in ("features", "tags", "_extra_state")
)


def search(request: Request) -> Response:
    """Answer ?text, ?image or ?id, text and image balanced by ?weight, with the nearest images."""
    state, given, started = state_of(request), request.query_params, time.perf_counter()
    count, over = params.whole(given, "count", 24, 1, MOST_HITS), params.over(given)
    ids, cosines = state.index.nearest(_query(state, given)[None], count, over=over)
    hits = _hits(state, ids[0], cosines[0])
    return JSONResponse({"hits": hits, "images": len(state.index), "seconds": time.perf_counter() - started})


def neighbors(request: Request) -> Response:
    """Answer ?text with the nearest captions of the run's queue or of the index, as ?where says."""
    state, given = state_of(request), request.query_params
    queue: RunQueue | str = request.app.state.queue
    text = params.text(given.get("text", ""), "caption")
    count = params.whole(given, "count", 12, 1, MOST_NEIGHBORS)
    if not text:
        raise params.bad_request("Type a caption first.")
    where = params.choice(given, "where", "queue" if isinstance(queue, RunQueue) else "index", "queue", "index")
    query = state.query(text)
    if where == "index":
        ids, cosines = state.index.nearest(query[None], count, over="captions")
        hits = [{**hit, "text": hit["captions"][0]} for hit in _hits(state, ids[0], cosines[0])]
        return JSONResponse({"where": where, "hits": hits})
    if isinstance(queue, str):
        raise params.bad_request(queue)
    hits = []
    for entry in queue.nearest(query, count):
        id = state.ids_of_keys.get(entry.key)
        image = {"id": None, "key": entry.key, "captions": []} if id is None else state.describe(id)
        hits.append({**image, "text": entry.text, "cosine": entry.cosine})
    return JSONResponse({"where": where, "hits": hits})


def image(request: Request) -> Response:
    """Answer with an image's key and captions."""
    return JSONResponse(state_of(request).describe(params.image_id(request.path_params)))


def _query(state: AppState, given: Mapping[str, str]) -> Tensor:
    text, image = params.text(given.get("text", ""), "text"), params.image_vector(state, given)
    if not text:
        if image is None:
            raise params.bad_request("Type what to look for, or choose an image.")
        return image
    query = state.query(text, template=params.template(given.get("template", "")))
    weight = params.number(given, "weight", 0.5, 0, 1)
    return query if image is None else mix(query, image, (weight, 1 - weight))


def _hits(state: AppState, ids: Tensor, cosines: Tensor) -> list[dict[str, Any]]:
    pairs = zip(ids.tolist(), cosines.tolist(), strict=True)
    return [{**state.describe(id), "cosine": cosine} for id, cosine in pairs]


class QueueEntry(NamedTuple):
    """An entry near a caption: its text as it was augmented, the key of its pair, and the cosine."""

    text: str
    key: str
    cosine: float


class RunQueue:
    """The nearest-neighbor queue in a checkpoint of a run: `filled` of `size` entries at a `step`.

    Raises:
        UserError: The run keeps no queue, it is empty, or its training pairs are not there.
    """

    def __init__(self, checkpoint: Path, recipe: Recipe, model: DualEncoder) -> None:
        features, tags, extra = _read_queue(checkpoint)
        self.step = int(checkpoint.name.removeprefix("step-"))
        self.size, self.filled = len(tags), int(extra[0])
        known = torch.nonzero(tags[: self.filled] >= 0).flatten()
        if not len(known):
            raise UserError("The queue of this run is empty, or its entries do not say which pairs they are.")
        source = _training_source(recipe)
        self._features, self._tags = features[known].float(), tags[known].numpy()
        self._loader, self._images = build_loader(recipe, source, model, workers=0), ImageSource(source)
        self.name = source.name
        self._pairs = self._tags // 2 % len(source)  # a tag is twice the number of the sample, plus the text view

    def nearest(self, query: Tensor, count: int) -> list[QueueEntry]:
        """The entries nearest to a query (d,) of length 1, each pair once, the best first."""
        cosines = (self._features @ query).numpy()
        order = np.argsort(-cosines, kind="stable")
        order = order[np.sort(np.unique(self._pairs[order], return_index=True)[1])]
        entries: list[QueueEntry] = []
        for slot in order.tolist():
            sample, view = divmod(int(self._tags[slot]), 2)
            try:
                text = self._loader.words(sample, view)
                entries.append(QueueEntry(text, self._images.key(int(self._pairs[slot])), float(cosines[slot])))
            except BrokenPair:  # the pairs have changed since
                continue
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


def _read_queue(checkpoint: Path) -> tuple[Tensor, ...]:
    """Features, tags and fill level; nothing else of the file is read."""
    try:
        with safe_open(checkpoint / TRAINING, "pt") as file:
            if FEATURES not in set(file.keys()):
                raise UserError("The run keeps no queue: its loss has no nearest_neighbor term.")
            return tuple(file.get_tensor(name) for name in (FEATURES, TAGS, STATE_OF_QUEUE))
    except (OSError, SafetensorError) as error:
        raise UserError(f"The queue of '{checkpoint.name}' cannot be read: {type(error).__name__}.") from error


def _training_source(recipe: Recipe) -> PairSource:
    """The run's training source; one that would have to be downloaded is not opened."""
    sources = recipe.data.source
    specs = [sources] if isinstance(sources, str) else [entry.source for entry in sources]
    try:
        if any(is_url(spec) for spec in specs):
            raise UserError("they are not on this machine.")
        return open_training_source(recipe)
    except UserError as error:
        raise UserError(f"The training pairs, whose captions the queue holds, are not there: {error}") from error
