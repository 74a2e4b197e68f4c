"""Pairs: which images and captions disagree, what comes twice, the map, and the list of pairs to leave out."""

from functools import partial
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from declip.app import asked
from declip.app.agreement import Agreement, agreement, ranks
from declip.app.duplicates import LOWEST, Couples, Group, equal_captions, find_couples
from declip.app.gallery import Gallery
from declip.app.jobs import Job
from declip.app.layout import Layout, has_umap, lay_out
from declip.app.uploads import read_json
from declip.data.exclude import write_drop_list

PAGE = 24
"""Pairs or groups that are sent at a time."""

MEMBERS = 12
"""Of a group that are shown."""

REASONS = {
    "disagree": "image and caption disagree",
    "duplicate": "near-duplicate image",
    "caption": "equal caption",
    "hand": "chosen by hand",
}
"""Why a pair is on the list, as `declip data prepare --exclude` counts it."""


def state(request: Request) -> Response:
    """How far the comparison is, and what it found."""
    gallery: Gallery = request.app.state.gallery
    job = _agreement(gallery)
    said: dict[str, Any] = {**job.state(), "images": len(gallery.index), "umap": has_umap()}
    if job.done:
        found: Agreement = job.result
        counts, edges = found.histogram()
        numbers = {"median": found.median, "spread": found.spread, "counts": counts, "edges": edges}
        said |= {"pairs": len(found.ids), "without": found.without, **numbers}
    return JSONResponse(said)


def disagreeing(request: Request) -> Response:
    """The pairs whose image and caption agree least, from ?start on."""
    gallery: Gallery = request.app.state.gallery
    job = _agreement(gallery)
    if not job.done:
        return JSONResponse(job.state())
    found: Agreement = job.result
    start = asked.whole(request.query_params, "start", 0, 0, len(found.ids))
    ids, cosines = found.ids[start : start + PAGE].tolist(), found.cosines[start : start + PAGE].tolist()
    rows = []
    for id, cosine, rank in zip(ids, cosines, ranks(gallery.index, ids) if ids else [], strict=True):
        nearer = None if rank.rank == 1 else (gallery.described(rank.nearest)["captions"] or [None])[0]
        deviations = found.deviations(cosine)
        place = {"rank": rank.rank, "pairs": len(found.ids), "nearer": nearer}
        row = {"cosine": cosine, "deviations": deviations, **place}
        rows.append({**gallery.described(id), **row})
    return JSONResponse({**job.state(), "rows": rows, "total": len(found.ids), "start": start})


def duplicates(request: Request) -> Response:
    """Groups of images whose cosine is ?threshold or more, from ?start on."""
    gallery: Gallery = request.app.state.gallery
    job = gallery.jobs.get("couples", partial(find_couples, gallery.index))
    if not job.done:
        return JSONResponse(job.state())
    couples: Couples = job.result
    return _groups(request, job, couples.groups(_threshold(request)))


def captions(request: Request) -> Response:
    """Groups of images that share their caption, from ?start on."""
    gallery: Gallery = request.app.state.gallery
    job = gallery.jobs.get("captions", lambda tell: equal_captions(gallery.index))
    return _groups(request, job, job.result) if job.done else JSONResponse(job.state())


def points(request: Request) -> Response:
    """The map: ids, places and cosines of image and caption."""
    gallery: Gallery = request.app.state.gallery
    over = asked.over(request.query_params)
    method = asked.choice(request.query_params, "method", ("pca", "umap"))
    job = gallery.jobs.get(("map", over, method), partial(lay_out, gallery.index, over, method))
    compared = _agreement(gallery)
    if not job.done or not (compared.done or compared.error):
        return JSONResponse(job.state() if job.error or not job.done else compared.state())
    found: Layout = job.result
    shares = {"explained": found.explained, "images": len(gallery.index)}
    colors = _colors(compared.result, found.ids) if compared.done else None
    places = {"ids": found.ids.tolist(), "x": found.places[:, 0].tolist(), "y": found.places[:, 1].tolist()}
    return JSONResponse({**job.state(), **places, **shares, "deviations": colors})


def chosen(request: Request) -> Response:
    """The ids that a rule chooses: "disagree" those below ?below, "duplicate" all but the first of each group."""
    gallery: Gallery = request.app.state.gallery
    rule = asked.choice(request.query_params, "rule", ("disagree", "duplicate"))
    job = (
        _agreement(gallery) if rule == "disagree" else gallery.jobs.get("couples", partial(find_couples, gallery.index))
    )
    if not job.done:
        return JSONResponse(job.state())
    if rule == "disagree":
        ids = job.result.below(asked.number(request.query_params, "below", -1, -1, 1)).tolist()
    else:
        ids = [id for group in job.result.groups(_threshold(request)) for id in group.ids[1:]]
    return JSONResponse({**job.state(), "ids": ids})


async def save_list(request: Request) -> Response:
    """Turn {reason: [id, …]} into the list as CSV."""
    given = await read_json(request)
    gallery: Gallery = request.app.state.gallery
    job = _agreement(gallery)
    cosines = dict(zip(job.result.ids.tolist(), job.result.cosines.tolist(), strict=True)) if job.done else {}
    written: dict[int, tuple[str, int, str, float | None, str]] = {}
    for reason, ids in given.items():
        if reason not in REASONS or not isinstance(ids, list):
            raise asked.wrong("The list must hold ids by reason.")
        for id in ids:
            row = gallery.index.row(asked.whole({"id": str(id)}, "id", 0, 0, 2**62))
            caption = row.captions[0] if row.captions else ""
            written.setdefault(row.id, (row.key, row.place, REASONS[reason], cosines.get(row.id), caption))
    if not written:
        raise asked.wrong("The list is empty.")
    text = write_drop_list(written[id] for id in sorted(written))
    headers = {"Content-Disposition": 'attachment; filename="drop.csv"'}
    return Response(text.encode("utf-8", "replace"), media_type="text/csv; charset=utf-8", headers=headers)


def _agreement(gallery: Gallery) -> Job:
    return gallery.jobs.get("agreement", partial(agreement, gallery.index))


def _threshold(request: Request) -> float:
    return asked.number(request.query_params, "threshold", 0.98, LOWEST, 1)


def _groups(request: Request, job: Job, groups: list[Group]) -> Response:
    gallery: Gallery = request.app.state.gallery
    start = asked.whole(request.query_params, "start", 0, 0, max(0, len(groups)))
    shown = []
    for group in groups[start : start + PAGE]:
        members = [gallery.described(id) for id in group.ids[:MEMBERS]]
        shown.append({"cosine": group.cosine, "size": len(group.ids), "members": members})
    extra = sum(len(group.ids) - 1 for group in groups)
    return JSONResponse({**job.state(), "groups": shown, "total": len(groups), "extra": extra, "start": start})


def _colors(found: Agreement, ids: np.ndarray) -> list[float | None]:
    """Of each id, how many standard deviations its cosine lies above the median; None without a caption."""
    order = np.argsort(found.ids)
    at = np.searchsorted(found.ids, ids, sorter=order).clip(0, len(order) - 1)
    values = found.cosines[order][at]
    known = found.ids[order][at] == ids
    return [
        round(found.deviations(float(value)), 1) if there else None for value, there in zip(values, known, strict=True)
    ]
