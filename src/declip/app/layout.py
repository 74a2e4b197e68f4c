"""The map of an index: a place in the plane for each image, by its vector or its caption's."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from declip.app.agreement import NO_CAPTIONS
from declip.app.jobs import Progress
from declip.errors import UserError, unknown
from declip.search.index import Index
from declip.search.store import Over

Method = Literal["pca", "umap"]

MOST_POINTS = 20_000
"""Shown; of more images an even selection."""

GRID = 10_000
"""Coordinates are whole numbers from 0 to this."""

CUT = 0.5
"""Percent of the points on either side that are moved to the border, so that a few strays do not shrink the rest."""


@dataclass(frozen=True)
class Layout:
    """Points of a map.

    Attributes:
        ids: (n,) int64.
        places: (n, 2) int64, x and y, 0 to `GRID`.
        explained: The share of the variance that the two directions have; None for UMAP.
    """

    ids: np.ndarray
    places: np.ndarray
    explained: float | None


def has_umap() -> bool:
    """Whether the package umap-learn is installed."""
    return importlib.util.find_spec("umap") is not None


def lay_out(index: Index, over: Over, method: str, tell: Progress) -> Layout:
    """Lay the images of an index out in the plane.

    Args:
        index: Its vectors.
        over: Whether images' or captions' vectors say what is near.
        method: "pca", or "umap" where umap-learn is installed.
        tell: Is told the share that is done.

    Raises:
        UserError: The method is not known or not installed, captions have no vectors, or there are too few.
    """
    if method not in METHODS:
        raise unknown("map", method, METHODS)
    if over == "captions" and not index.manifest.captions:
        raise UserError(NO_CAPTIONS)
    ids = index.ids
    if len(ids) > MOST_POINTS:
        ids = ids[np.linspace(0, len(ids) - 1, MOST_POINTS).round().astype(np.int64)]
    vectors = index.vectors(ids, over).numpy()
    there = vectors.any(1)
    ids, vectors = ids[there], vectors[there]
    if len(ids) < 3:
        raise UserError("A map needs three pairs or more.")
    tell(0.1)
    places, explained = METHODS[method](vectors)
    return Layout(ids, _on_grid(places), explained)


def _pca(vectors: np.ndarray) -> tuple[np.ndarray, float | None]:
    """The two directions of the largest variance."""
    from sklearn.decomposition import PCA

    found = PCA(2, svd_solver="covariance_eigh")
    places = found.fit_transform(vectors.astype(np.float64))
    return places, float(np.nan_to_num(found.explained_variance_ratio_.sum()))


def _umap(vectors: np.ndarray) -> tuple[np.ndarray, float | None]:
    """Neighbors kept together (McInnes et al. 2018), with the package's own defaults, by cosine."""
    if not has_umap():
        raise UserError("UMAP needs a package that is not installed: pip install umap-learn. PCA needs none.")
    umap: Any = importlib.import_module("umap")
    return np.asarray(umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(vectors)), None


METHODS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, float | None]]] = {"pca": _pca, "umap": _umap}


def _on_grid(places: np.ndarray) -> np.ndarray:
    low, high = np.percentile(places, [CUT, 100 - CUT], axis=0)
    wide = float((high - low).max()) or 1.0
    middle = (low + high) / 2
    return (((places - middle) / wide + 0.5).clip(0, 1) * GRID).round().astype(np.int64)
