"""Approximate search with faiss beyond a million vectors: an inverted file whose recall is measured when it is made."""

import importlib
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from declip.errors import UserError
from declip.evaluation.prompt_sets import read_prompts
from declip.io.atomic import atomic_write
from declip.search.exact import merge, nearest
from declip.search.manifest import ELSEWHERE, ApproximateEntry, MeasuredRecall
from declip.search.store import Store

EXACT_UP_TO = 1_000_000  # vectors up to which search is exact by default: about half a second per query

FEWEST = 1_000  # vectors below which no approximate index is made: exact search takes a millisecond
PER_LIST, TRAINING_PER_LIST, MOST_TRAINING = 39, 64, 262_144  # fewest vectors of a list, as faiss asks; for training

GROWTH = 3  # the lists are trained again once this many times as many vectors are in them as when they were trained
TARGET, K, QUERIES = 0.99, 10, 200  # recall to reach, of how many nearest, with how many queries of each kind

RESCORED = 4  # candidates that are scored again with the stored vectors, as a multiple of the results asked for
RESCORED_BYTES = 64 << 20  # bytes of candidates' vectors in memory at a time


class RecallQueries(NamedTuple):
    """Ids (n,) of images of the index, their vectors (n, d), and vectors (m, d) of texts; None without a text tower."""

    ids: np.ndarray
    images: Tensor
    texts: Tensor | None


def import_faiss() -> Any:
    """Import faiss, or say how to install it."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise UserError(
            f"Approximate search needs faiss ({error}). Install it: pip install 'declip[search]'. Exact search needs "
            "nothing, and takes half a second or so for a million images."
        ) from error


def refresh(store: Store, encode: Callable[[list[str]], Tensor] | None) -> ApproximateEntry:
    """Make the approximate index of a locked index, or bring it up to date, and save the manifest.

    The vectors go into about 4 √n lists by their nearest center, 8 bits a number. A search looks into the fewest
    lists, a power of two, with which the recall reaches `TARGET`.

    Args:
        encode: Texts to (m, d) float32, so that recall is measured with texts as queries too.

    Raises:
        UserError: faiss is not installed, there are too few images, or the file cannot be written.
    """
    count = len(store.live)
    if count < FEWEST:
        raise UserError(
            f"'{store.folder}' has {count:,} images. An approximate index needs {FEWEST:,} or more; exact search of so "
            "few takes a millisecond."
        )
    faiss = import_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    queries = _sample_queries(store, encode)
    old = store.manifest.approximate
    lists = max(1, min(round(4 * math.sqrt(count)), count // PER_LIST))
    if old is not None and lists**2 <= GROWTH * old.lists**2:
        index, first, lists = _read(faiss, store, old, mapped=False), old.covered, old.lists
        index.remove_ids(store.ids[store.dead])
    else:
        index, first = _train(faiss, store, lists), 0
    for ids, vectors, dead in store.blocks(first=first):
        alive = torch.ones(len(ids), dtype=torch.bool) if dead is None else ~dead
        if alive.any():
            index.add_with_ids(vectors[alive].float().numpy(), ids[alive].numpy())
    entry = ApproximateEntry(
        **_write(faiss, index, store),
        covered=store.manifest.next_id,
        lists=lists,
        probed=1,
        images=MeasuredRecall(recall=0, k=K, queries=1),
    )
    store.manifest.approximate = _tune(ApproximateSearch(store, entry), queries)
    store.manifest.save(store.folder)
    return store.manifest.approximate


def without_hidden(store: Store, old: ApproximateEntry) -> ApproximateEntry:
    """Take the hidden rows out of the approximate index; its recall is not measured again."""
    faiss = import_faiss()
    index = _read(faiss, store, old, mapped=False)
    index.remove_ids(store.ids[store.dead])
    return old.model_copy(update=_write(faiss, index, store))


class ApproximateSearch:
    """Search by the inverted file, and exact search of the rows that were added later.

    Raises:
        UserError: The file is missing or damaged, or faiss is not installed.
    """

    def __init__(self, store: Store, entry: ApproximateEntry) -> None:
        self.store, self.entry, self._faiss = store, entry, import_faiss()
        self._index = _read(self._faiss, store, entry, mapped=True)
        self._later = store.blocks(first=entry.covered)

    def nearest(self, queries: Tensor, k: int, probed: int | None = None) -> tuple[Tensor, Tensor]:
        """Find the nearest like `exact.nearest`, but some may be missing; scores are exact.

        Args:
            queries: (n, d) float32.
            probed: Lists to look into; the manifest's number by default.
        """
        params = self._faiss.SearchParametersIVF(nprobe=probed or self.entry.probed, sel=self._alive)
        _, ids = self._index.search(queries.numpy(), RESCORED * k, params=params)
        scores = torch.full(ids.shape, -torch.inf)
        at_once = max(1, RESCORED_BYTES // (4 * queries.shape[1] * max(1, ids.shape[1])))
        for start in range(0, len(ids), at_once):
            rows, columns = np.nonzero(ids[start : start + at_once] >= 0)
            vectors = self.store.vectors(np.searchsorted(self.store.ids, ids[start + rows, columns]))
            scores[start + rows, columns] = (vectors * queries[start + rows]).sum(1)
        return merge([(torch.from_numpy(ids), scores), nearest(queries, self._later, k)], k)

    @cached_property
    def _alive(self) -> Any:
        """Selector that passes over hidden rows; None where there are none."""
        dead = self.store.ids[self.store.dead]
        self._dead = self._faiss.IDSelectorBatch(dead)  # kept: the other selector only points to it
        return self._faiss.IDSelectorNot(self._dead) if len(dead) else None


def _sample_queries(store: Store, encode: Callable[[list[str]], Tensor] | None) -> RecallQueries:
    """Sample images and captions evenly from an index; ImageNet's class names where no image has a caption.

    Texts lie apart from images in a model's space, so lists that find the neighbors of images may fail them.
    """
    positions = store.live[_evenly(len(store.live), QUERIES)]
    texts = [row.captions[0] for row in map(store.row, positions.tolist()) if row.captions]
    if not texts:
        names = list(read_prompts("imagenet").classes.values())
        texts = names[:: max(1, len(names) // QUERIES)][:QUERIES]
    vectors = None if encode is None else encode(texts)
    return RecallQueries(store.ids[positions], store.vectors(positions), vectors)


def _evenly(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, most, dtype=np.int64))


def _train(faiss: Any, store: Store, lists: int) -> Any:
    """Make an empty inverted file with its centers."""
    wanted = min(TRAINING_PER_LIST * lists, MOST_TRAINING, len(store.live))
    index = faiss.index_factory(store.manifest.dimension, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(store.vectors(store.live[_evenly(len(store.live), wanted)]).numpy())
    return index


def _write(faiss: Any, index: Any, store: Store) -> dict[str, Any]:
    """Write the file under a new name; the old one stays until the manifest names this one."""
    old = store.manifest.approximate
    number = 0 if old is None else 1 + int(old.file.removeprefix("approximate-").removesuffix(".faiss"))
    path = store.folder / f"approximate-{number:06d}.faiss"
    with atomic_write(path, ELSEWHERE, durable=True) as beside:
        faiss.write_index(index, str(beside))
    return {"file": path.name, "bytes": path.stat().st_size}


def _read(faiss: Any, store: Store, entry: ApproximateEntry, mapped: bool) -> Any:
    path = store.folder / entry.file
    try:
        if path.stat().st_size != entry.bytes:
            raise ValueError(f"{path.stat().st_size:,} bytes instead of {entry.bytes:,}")
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if mapped else 0)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"The approximate index '{path}' is damaged: {str(error).splitlines()[0]}. Search with --exact, or make it "
            f"again: declip index approximate {store.folder}."
        ) from error


def _tune(search: ApproximateSearch, queries: RecallQueries) -> ApproximateEntry:
    """Find the fewest probed lists that reach the target, and measure the recall with them."""
    blocks, lists = search.store.blocks(), search.entry.lists
    exact = nearest(queries.images, blocks, K + 1)[0]
    exact_texts = None if queries.texts is None else nearest(queries.texts, blocks, K)[0]
    probed, texts = 1, None
    while True:
        images = _recall(search.nearest(queries.images, K + 1, probed)[0], exact, queries.ids)
        if queries.texts is not None and exact_texts is not None:
            texts = _recall(search.nearest(queries.texts, K, probed)[0], exact_texts)
        lowest = min(measured.recall for measured in (images, texts) if measured is not None)
        if lowest >= TARGET or probed == lists:
            return search.entry.model_copy(update={"probed": probed, "images": images, "texts": texts})
        probed = min(2 * probed, lists)


def _recall(ids: Tensor, exact: Tensor, query_ids: np.ndarray | None = None) -> MeasuredRecall:
    """Recall of ids (n, any) against the exact ones; an image of the index does not count as its own neighbor."""
    fractions = []
    for number, (answer, wanted) in enumerate(zip(ids.tolist(), exact.tolist(), strict=True)):
        others = [id for id in wanted if query_ids is None or id != query_ids[number]][:K]
        fractions.append(len(set(others) & set(answer)) / len(others))
    return MeasuredRecall(recall=float(np.mean(fractions)), k=K, queries=len(fractions))
