"""Approximate search by faiss beyond a million vectors: an inverted file whose recall is measured when it is made."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from declip.errors import UserError
from declip.evaluation.prompt_sets import read_prompts
from declip.io.atomic import atomic_write
from declip.search.exact import merged, nearest
from declip.search.manifest import ELSEWHERE, Approximate, Recall
from declip.search.store import Store

EXACT_UP_TO = 1_000_000
"""Vectors up to which search is exact unless an approximate index is asked for: half a second or so a query."""

FEWEST = 1_000
"""Vectors below which no approximate index is made: exact search takes a millisecond."""

PER_LIST, TRAINING_PER_LIST, MOST_TRAINING = 39, 64, 262_144
"""Vectors of a list at least, as faiss asks for; vectors of a list that the lists are found from; of all together."""

GROWTH = 3
"""Once this many times as many vectors are in the lists as when they were found, they are found anew."""

TARGET, K, QUERIES = 0.99, 10, 200
"""Recall that is aimed at, of how many nearest, measured with how many queries of each kind."""

RESCORED = 4
"""Candidates, as a multiple of what is asked for, that are scored again with the vectors as they are stored."""

RESCORED_BYTES = 64 << 20
"""Of the candidates' vectors that are held at a time."""

NUMBER = re.compile(r"\d+")


class Queries(NamedTuple):
    """What recall is measured with.

    Attributes:
        own: (n,) int64, ids of pictures of the index; each looks for others than itself.
        images: (n, d) float32, their vectors.
        texts: (m, d) float32, vectors of texts; None where the model reads none.
    """

    own: np.ndarray
    images: Tensor
    texts: Tensor | None


def import_faiss() -> Any:
    """The module.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise UserError(
            f"Approximate search needs faiss ({error}). Install it: pip install 'declip[search]'. Exact search needs "
            "nothing, and takes half a second or so for a million images."
        ) from error


def sample_queries(store: Store, encode: Callable[[list[str]], Tensor] | None) -> Queries:
    """Draw pictures and captions evenly from an index; ImageNet's class names where no picture has a caption.

    Texts lie apart from pictures in a model's space, so what finds the neighbors of pictures may fail them.

    Args:
        store: The index.
        encode: Texts to (m, d) float32; None for a model without text.
    """
    places = store.live[np.unique(np.linspace(0, len(store.live) - 1, QUERIES, dtype=np.int64))]
    words = [row.captions[0] for row in map(store.row, places.tolist()) if row.captions]
    if not words:
        names = list(read_prompts("imagenet").classes.values())
        words = names[:: max(1, len(names) // QUERIES)][:QUERIES]
    texts = None if encode is None else encode(words)
    return Queries(store.ids[places], store.vectors(places), texts)


def make(store: Store, queries: Queries) -> Approximate:
    """Make the approximate index of all live rows, or bring the one that is there up to date.

    The vectors go into about 4 √n lists by their nearest center, 8 bits a number. A search looks into the fewest
    lists, a power of two, with which the recall of `queries` reaches `TARGET`.

    Args:
        store: The rows.
        queries: What to measure recall with.

    Returns:
        The entry for the manifest; the file is written, the manifest is not.

    Raises:
        UserError: faiss is not installed, there are too few rows, or the file cannot be written.
    """
    if len(store.live) < FEWEST:
        raise UserError(
            f"'{store.folder}' has {len(store.live):,} images. An approximate index needs {FEWEST:,} or more; exact "
            "search of so few takes a millisecond."
        )
    faiss = import_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    there = store.manifest.approximate
    lists = max(1, min(round(4 * math.sqrt(len(store.live))), len(store.live) // PER_LIST))
    if there is not None and lists**2 <= GROWTH * there.lists**2:
        index, first, lists = _read(faiss, store, there, mapped=False), there.covered, there.lists
        index.remove_ids(store.ids[store.dead])
    else:
        index, first = _trained(faiss, store, lists), 0
    _add(index, store, first)
    entry = Approximate(
        **_written(faiss, index, store),
        covered=store.manifest.next_id,
        lists=lists,
        probed=1,
        images=Recall(recall=0, k=K, queries=1),
    )
    return _tuned(ApproximateSearch(store, entry), queries)


def without_hidden(store: Store, there: Approximate) -> Approximate:
    """Take the hidden rows out of the approximate index; as `make` otherwise, but the recall is not measured again."""
    faiss = import_faiss()
    index = _read(faiss, store, there, mapped=False)
    index.remove_ids(store.ids[store.dead])
    return there.model_copy(update=_written(faiss, index, store))


class ApproximateSearch:
    """Searches an index by its inverted file, and what was added later exactly.

    Args:
        store: The rows.
        entry: What the manifest says of the file.

    Raises:
        UserError: The file is missing or damaged, or faiss is not installed.
    """

    def __init__(self, store: Store, entry: Approximate) -> None:
        self.store, self.entry, self._faiss = store, entry, import_faiss()
        self._index = _read(self._faiss, store, entry, mapped=True)
        self._later = store.blocks(first=entry.covered)

    def nearest(self, queries: Tensor, k: int, probed: int | None = None) -> tuple[Tensor, Tensor]:
        """As `exact.nearest`, but some of the nearest may be missing; scores are exact.

        Args:
            queries: (n, d) float32.
            k: How many, at most.
            probed: Lists to look into; as the manifest says.
        """
        params = self._faiss.SearchParametersIVF(nprobe=probed or self.entry.probed, sel=self._alive)
        _, found = self._index.search(queries.numpy(), RESCORED * k, params=params)
        scores = torch.full(found.shape, -torch.inf)
        at_once = max(1, RESCORED_BYTES // (4 * queries.shape[1] * max(1, found.shape[1])))
        for start in range(0, len(found), at_once):
            rows, places = np.nonzero(found[start : start + at_once] >= 0)
            vectors = self.store.vectors(np.searchsorted(self.store.ids, found[start + rows, places]))
            scores[start + rows, places] = (vectors * queries[start + rows]).sum(1)
        return merged([(torch.from_numpy(found), scores), nearest(queries, self._later, k)], k)

    @cached_property
    def _alive(self) -> Any:
        """What lets hidden rows be passed over; None where there are none."""
        dead = self.store.ids[self.store.dead]
        self._dead = self._faiss.IDSelectorBatch(dead)  # kept: the other one only points to it
        return self._faiss.IDSelectorNot(self._dead) if len(dead) else None


def _trained(faiss: Any, store: Store, lists: int) -> Any:
    """An empty inverted file with its centers."""
    wanted = min(TRAINING_PER_LIST * lists, MOST_TRAINING, len(store.live))
    places = store.live[np.unique(np.linspace(0, len(store.live) - 1, wanted, dtype=np.int64))]
    index = faiss.index_factory(store.manifest.dimension, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(store.vectors(places).numpy())
    return index


def _add(index: Any, store: Store, first: int) -> None:
    for ids, vectors, dead in store.blocks(first=first):
        alive = torch.ones(len(ids), dtype=torch.bool) if dead is None else ~dead
        if alive.any():
            index.add_with_ids(vectors[alive].float().numpy(), ids[alive].numpy())


def _written(faiss: Any, index: Any, store: Store) -> dict[str, Any]:
    """Write the file under a name of its own, and what the manifest says of it."""
    there = store.manifest.approximate
    number = 0 if there is None else int(NUMBER.findall(there.file)[0]) + 1
    path = store.folder / f"approximate-{number:06d}.faiss"
    with atomic_write(path, ELSEWHERE, durable=True) as beside:
        faiss.write_index(index, str(beside))
    return {"file": path.name, "bytes": path.stat().st_size}


def _read(faiss: Any, store: Store, entry: Approximate, mapped: bool) -> Any:
    path = store.folder / entry.file
    try:
        if path.stat().st_size != entry.bytes:
            raise ValueError(f"{path.stat().st_size:,} bytes instead of {entry.bytes:,}")
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if mapped else 0)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"The approximate index '{path}' is damaged: {str(error).splitlines()[0]}. Search with --exact, or make it "
            f"anew: declip index approximate {store.folder}."
        ) from error


def _tuned(search: ApproximateSearch, queries: Queries) -> Approximate:
    """The entry with the fewest probed lists that reach the target, and the recall with them."""
    store, entry = search.store, search.entry
    exact = nearest(queries.images, store.blocks(), K + 1)[0]
    exact_texts = None if queries.texts is None else nearest(queries.texts, store.blocks(), K)[0]
    probed = 1
    while True:
        images = _recall(search.nearest(queries.images, K + 1, probed)[0], exact, queries.own)
        texts = None
        if queries.texts is not None and exact_texts is not None:
            texts = _recall(search.nearest(queries.texts, K, probed)[0], exact_texts)
        reached = min(each.recall for each in (images, texts) if each is not None) >= TARGET
        if reached or probed == entry.lists:
            return entry.model_copy(update={"probed": probed, "images": images, "texts": texts})
        probed = min(2 * probed, entry.lists)


def _recall(found: Tensor, exact: Tensor, own: np.ndarray | None = None) -> Recall:
    """Share of the exact nearest that were found; `own` are the ids of the queries themselves, which do not count."""
    shares = []
    for number, (have, want) in enumerate(zip(found.tolist(), exact.tolist(), strict=True)):
        others = [id_ for id_ in want if own is None or id_ != own[number]][:K]
        shares.append(len(set(others) & set(have)) / len(others))
    return Recall(recall=float(np.mean(shares)), k=K, queries=len(shares))
