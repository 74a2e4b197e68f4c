"""Runs: results and recipes of several run folders side by side, and their curves, as they stand now."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from declip.app.curves import thinned
from declip.app.gallery import Gallery
from declip.app.run_folders import RunFolder, differences, flat_recipe
from declip.data.pair import printable
from declip.evaluation.measure import Measure
from declip.evaluation.results import Result
from declip.reports.run_curves import PROGRESS, TERMS
from declip.runs.records import Run

MOST_SHOWN = 8
"""Runs side by side: as many as there are colors to tell them apart."""

Line = list[tuple[int, float]]


def runs(request: Request) -> Response:
    """All runs in a line each; of those that ?show names, or the newest, also results, recipes and curves."""
    gallery: Gallery = request.app.state.gallery
    with gallery.runs.lock:
        content = json.dumps(_tree(gallery, request.query_params.getlist("show"))).encode()
    tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="application/json", headers=headers)


def _tree(gallery: Gallery, wanted: Sequence[str]) -> dict[str, Any]:
    found = gallery.runs.look()
    shown = [each for each in found if each.id in wanted][:MOST_SHOWN] if wanted else found[:MOST_SHOWN]
    looked = {each.id: each.look() for each in found}
    recipes = {each.id: flat_recipe(looked[each.id].recipe) for each in found}
    read = [looked[each.id] for each in shown]
    named = [{name: value for name, value in recipes[each.id].items() if name != "name"} for each in shown]
    return {
        "runs": [_line(each, looked[each.id], recipes[each.id]) for each in found],
        "shown": [each.id for each in shown],
        "results": _results(read),
        "differences": [[key, [_text(value) for value in values]] for key, values in differences(named)],
        "measured": _measured(read),
        "curves": _curves(read),
    }


def _line(folder: RunFolder, run: Run, recipe: dict[str, Any]) -> dict[str, Any]:
    steps = recipe.get("train.steps")
    steps = steps if isinstance(steps, int) else 0
    return {
        "id": folder.id,
        "name": printable(folder.folder.name),
        "in": printable(folder.folder.parent.name),
        "recipe": _text(recipe.get("name", "")),
        "state": folder.state(run, steps),
        "step": run.step,
        "steps": steps,
    }


def _results(read: Sequence[Run]) -> list[list[Any]]:
    """A row for each number that any of the runs measured last: its name, chance, and value in each run."""
    rows: dict[tuple[str, str], dict[int, Any]] = {}
    for place, run in enumerate(read):
        for row in run.last():
            for measure in _measures(row.result):
                rows.setdefault((row.result.on, measure.name), {})[place] = measure
    table = []
    for (on, name), values in rows.items():
        chance = next(iter(values.values())).chance
        shares = [_finite(values[place].value) if place in values else None for place in range(len(read))]
        table.append([printable(on), name, _finite(chance), shares])
    return table


def _measured(read: Sequence[Run]) -> list[dict[str, Any]]:
    """Held-out curves: the leading numbers of what any run measured more than once, in every run."""
    charts: dict[tuple[str, str, str], dict[int, Line]] = {}
    for place, run in enumerate(read):
        for row in run.evaluations:
            for measure in _leading(_measures(row.result)):
                key = (row.result.on, row.result.protocol, measure.name)
                if (value := _finite(measure.value)) is not None:
                    charts.setdefault(key, {}).setdefault(place, []).append((row.step, value))
    return [
        {"title": f"{name}, {printable(on)}", "note": protocol, "share": True, "lines": _placed(lines, len(read))}
        for (on, protocol, name), lines in charts.items()
        if any(len(line) > 1 for line in lines.values())
    ]


def _measures(result: Result) -> list[Measure]:
    """A result's numbers; none where the row that it was read from is damaged."""
    try:
        return result.measures()
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return []


def _leading(measures: list[Measure]) -> list[Measure]:
    """Top-1, or R@1 in both directions."""
    recalls = [measure for measure in measures if measure.name.endswith("R@1")]
    return recalls or measures[:1]


def _curves(read: Sequence[Run]) -> list[dict[str, Any]]:
    """Training curves: the total, each term, and what goes on beside them."""
    terms = list(dict.fromkeys(name for run in read for name in run.terms))
    columns = [("loss", "loss"), *((name, f"losses.{name}") for name in terms), *((name, name) for name in PROGRESS)]
    charts = []
    for name, column in columns:
        title, note = {**TERMS, **PROGRESS}.get(name, (name, ""))
        lines = {place: line for place, run in enumerate(read) if (line := _column(run, column))}
        if lines:
            charts.append({"title": title, "note": note, "share": False, "lines": _placed(lines, len(read))})
    return charts


def _column(run: Run, column: str) -> Line:
    try:
        values = run.column(column)
    except (TypeError, ValueError):  # a damaged row
        return []
    return [(step, float(f"{value:.6g}")) for step, value in thinned(np.asarray(run.steps), values)]


def _placed(lines: dict[int, Line], count: int) -> list[Line]:
    return [lines.get(place, []) for place in range(count)]


def _finite(value: Any) -> float | None:
    """A number as JSON can have it."""
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _text(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value, default=str))
