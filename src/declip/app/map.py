"""The map of an index: a point in the plane for each image, by its vector or by its captions'."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from declip.app import params
from declip.app.pairs import NO_CAPTIONS, Agreement, agreement_job, when_done
from declip.app.state import Progress, state_of
from declip.errors import UserError
from declip.search.index import Index
from declip.search.manifest import Over

MOST_POINTS = 20_000  # points that are shown; of more images an even selection
GRID = 10_000  # coordinates are whole numbers from 0 to this
CLIPPED = 0.5  # percent of points on either side that are moved to the border, so that strays do not shrink the rest


class Layout(NamedTuple):
    """Points of a map: ids (n,) int64, x and y (n, 2) int64, and the fraction of the variance; None for UMAP."""

    ids: np.ndarray
    places: np.ndarray
    explained: float | None


def points(request: Request) -> Response:
    """The map: ids, places, and the deviation of each pair's cosine."""
    state = state_of(request)
    over, method = params.over(request.query_params), params.choice(request.query_params, "method", *METHODS)
    job = state.jobs.get(("map", over, method), partial(lay_out, state.index, over, method))
    agreement = agreement_job(state)
    if job.result is not None and agreement.state()["state"] == "working":
        return JSONResponse(agreement.state())

    def answer(layout: Layout) -> dict[str, Any]:
        places = {"ids": layout.ids.tolist(), "x": layout.places[:, 0].tolist(), "y": layout.places[:, 1].tolist()}
        colors = None if agreement.result is None else _deviations(agreement.result, layout.ids)
        return {**places, "explained": layout.explained, "images": len(state.index), "deviations": colors}

    return when_done(job, answer)


def has_umap() -> bool:
    """Whether the package umap-learn is installed."""
    return importlib.util.find_spec("umap") is not None


def lay_out(index: Index, over: Over, method: str, report: Progress) -> Layout:
    """Lay the images of an index out in the plane.

    Args:
        over: Whether the images' or the captions' vectors decide which points are near.
        method: "pca", or "umap" where umap-learn is installed.

    Raises:
        UserError: The method is not installed, captions have no vectors, or there are too few pairs.
    """
    if over == "captions" and not index.manifest.captions:
        raise UserError(NO_CAPTIONS)
    ids = index.ids
    if len(ids) > MOST_POINTS:
        ids = ids[np.linspace(0, len(ids) - 1, MOST_POINTS).round().astype(np.int64)]
    vectors = index.vectors(ids, over).numpy()
    known = vectors.any(1)
    ids, vectors = ids[known], vectors[known]
    if len(ids) < 3:
        raise UserError("A map needs three pairs or more.")
    report(0.1)
    places, explained = METHODS[method](vectors)
    low, high = np.percentile(places, [CLIPPED, 100 - CLIPPED], axis=0)
    width = float((high - low).max()) or 1.0
    on_grid = ((places - (low + high) / 2) / width + 0.5).clip(0, 1) * GRID
    return Layout(ids, on_grid.round().astype(np.int64), explained)


def _pca(vectors: np.ndarray) -> tuple[np.ndarray, float | None]:
    """The two directions of the largest variance."""
    centered = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centered.T @ centered)
    directions = directions[:, :-3:-1]
    largest = np.abs(directions).argmax(0)
    directions = directions * np.sign(directions[largest, range(2)])  # the sign is free: fixed for equal maps
    return centered @ directions, float(np.nan_to_num(variances[-2:].sum() / variances.sum()))


def _umap(vectors: np.ndarray) -> tuple[np.ndarray, float | None]:
    """Neighbors kept together (McInnes et al. 2018), with the package's own defaults, by cosine."""
    if not has_umap():
        raise UserError("UMAP needs a package that is not installed: pip install umap-learn. PCA needs none.")
    umap: Any = importlib.import_module("umap")
    return np.asarray(umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(vectors)), None


METHODS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, float | None]]] = {"pca": _pca, "umap": _umap}


def _deviations(agreement: Agreement, ids: np.ndarray) -> list[float | None]:
    """Standard deviations between each id's cosine and the median; None without a caption."""
    cosines = agreement.by_id()
    return [round(agreement.deviations(cosines[id]), 1) if id in cosines else None for id in ids.tolist()]
