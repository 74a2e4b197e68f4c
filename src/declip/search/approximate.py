"""Approximate search with faiss, for millions of vectors: an inverted file whose recall is measured when it is made."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from declip.errors import UserError
from declip.evaluation.prompt_sets import read_prompts
from declip.io.atomic import atomic_write
from declip.search.exact import merge, nearest
from declip.search.manifest import ELSEWHERE, ApproximateEntry
from declip.search.store import Store

FILE = "approximate.faiss"
PER_LIST, TRAINING_PER_LIST, MOST_TRAINING = 39, 64, 262_144  # fewest vectors of a list, as faiss asks; for training
TARGET, K, QUERIES = 0.99, 10, 200  # recall to reach, of how many nearest, with how many queries of each kind
RESCORED = 4  # candidates that are scored again with the stored vectors, as a multiple of the results asked for
RESCORED_BYTES = 64 << 20  # bytes of candidates' vectors in memory at a time


def import_faiss() -> Any:
    """Import faiss, or say how to install it."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise UserError(
            f"Approximate search needs faiss ({error}): pip install 'declip[search]'. Exact search needs nothing, and "
            "takes half a second or so for a million images."
        ) from error


def build_approximate(store: Store, encode: Callable[[list[str]], Tensor] | None) -> ApproximateEntry:
    """Make the approximate index of a locked index, and save the manifest.

    The vectors go into about 4 √n lists by their nearest center, 8 bits a number. A search looks into the fewest
    lists, a power of two, with which the recall reaches `TARGET` for images and for texts. These lie apart in a
    model's space, so lists that find the neighbors of images may fail them.

    Args:
        encode: Texts to (m, d) float32 for measuring: captions, or ImageNet's class names; None measures images alone.
    """
    count, manifest = len(store.ids), store.manifest
    if count < PER_LIST:
        raise UserError(f"'{store.folder}' has {count} images; an approximate index needs {PER_LIST} or more.")
    faiss = import_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    lists = min(round(4 * math.sqrt(count)), count // PER_LIST)
    index = faiss.index_factory(manifest.dimension, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(store.vectors(_evenly(count, min(TRAINING_PER_LIST * lists, MOST_TRAINING))).numpy())
    for ids, vectors, _ in store.blocks():
        index.add_with_ids(vectors.float().numpy(), ids.numpy())
    probed, recalls = _tune(ApproximateSearch(store, index, manifest.next_id), lists, _sample_queries(store, encode))
    manifest.approximate = None  # until the new file is there
    manifest.save(store.folder)
    path = store.folder / FILE
    with atomic_write(path, ELSEWHERE, durable=True) as temporary:
        faiss.write_index(index, str(temporary))
    size, covered = path.stat().st_size, manifest.next_id
    manifest.approximate = ApproximateEntry(bytes=size, covered=covered, lists=lists, probed=probed, **recalls)
    manifest.save(store.folder)
    return manifest.approximate


def open_approximate(store: Store, entry: ApproximateEntry) -> "ApproximateSearch":
    """Map the inverted file into memory; raises `UserError` where it is damaged, or faiss is not installed."""
    faiss, path = import_faiss(), store.folder / FILE
    try:
        if path.stat().st_size != entry.bytes:
            raise ValueError(f"{path.stat().st_size:,} bytes instead of {entry.bytes:,}")
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"The approximate index '{path}' is damaged: {str(error).splitlines()[0]}. Search with --exact, or make it "
            f"again: declip index approximate {store.folder}."
        ) from error
    return ApproximateSearch(store, index, entry.covered, entry.probed)


class ApproximateSearch:
    """Search by the inverted file, and exact search of the rows that were added later."""

    def __init__(self, store: Store, index: Any, covered: int, probed: int = 1) -> None:
        self.store, self.probed = store, probed
        self._index, self._faiss, self._later = index, import_faiss(), store.blocks(first=covered)
        present = np.zeros(covered, bool)  # rows may have left since
        present[store.ids[store.ids < covered]] = True
        packed = np.packbits(present, bitorder="little")
        self._present = None if present.all() else self._faiss.IDSelectorBitmap(packed)  # a selector costs time

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the nearest like `exact.nearest`, but some may be missing; scores are exact."""
        params = self._faiss.SearchParametersIVF(nprobe=self.probed, sel=self._present)
        _, ids = self._index.search(queries.numpy(), RESCORED * k, params=params)
        scores = torch.full(ids.shape, -torch.inf)
        at_once = max(1, RESCORED_BYTES // (4 * queries.shape[1] * max(1, ids.shape[1])))
        for start in range(0, len(ids), at_once):
            rows, columns = np.nonzero(ids[start : start + at_once] >= 0)
            rows += start
            vectors = self.store.vectors(self.store.positions(ids[rows, columns]))
            scores[rows, columns] = (vectors * queries[rows]).sum(1)
        return merge([(torch.from_numpy(ids), scores), nearest(queries, self._later, k)], k)


def _evenly(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, most, dtype=np.int64))


def _sample_queries(store: Store, encode: Callable[[list[str]], Tensor] | None) -> dict[str, Tensor]:
    """Vectors of images sampled evenly from an index, and of their captions or else ImageNet's class names."""
    positions = _evenly(len(store.ids), QUERIES)
    queries = {"image_recall": store.vectors(positions)}
    if encode is not None:
        texts = [row.caption for row in map(store.row, positions.tolist()) if row.captions]
        queries["text_recall"] = encode(texts or list(read_prompts("imagenet").classes.values())[::5])
    return queries


def _tune(search: ApproximateSearch, lists: int, queries: dict[str, Tensor]) -> tuple[int, dict[str, float]]:
    """Find the fewest probed lists that reach the target, and the recall of each kind of queries with them."""
    exact = {kind: nearest(vectors, search.store.blocks(), K + 1)[0] for kind, vectors in queries.items()}
    exact["image_recall"] = exact["image_recall"][:, 1:]  # an image of the index finds itself first
    while True:
        recalls = {
            kind: _recall(search.nearest(vectors, K + 1)[0], exact[kind][:, :K]) for kind, vectors in queries.items()
        }
        if min(recalls.values()) >= TARGET or search.probed == lists:
            return search.probed, recalls
        search.probed = min(2 * search.probed, lists)


def _recall(ids: Tensor, exact: Tensor) -> float:
    """Fraction of the exact ids (n, k) that are among the first ids (n, any)."""
    return float((exact[:, :, None] == ids[:, None]).any(2).float().mean())
