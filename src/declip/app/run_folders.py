"""The run folders that the page shows: found anew at each look, and read only as far as they have grown."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from declip.errors import UserError
from declip.evaluation.results import read_result
from declip.recipe.load import read_yaml
from declip.runs.folder import EVALUATIONS, METRICS, RECIPE, flat
from declip.runs.records import Evaluated, Run

MOST_RUNS = 200
"""Run folders that are looked at."""

LARGEST_RECIPE = 1 << 20
"""Bytes."""

LARGEST_READ = 64 << 20
"""Bytes of rows that are read at a look; the next one goes on."""

QUIET = 120.0
"""Seconds without a new row after which a run counts as stopped, unless its rows come more slowly."""

SLOW_ROWS = 5
"""Times the seconds of its last row."""


class GrowingRows:
    """The rows of a JSON-lines file that is still written to.

    A file that has become shorter, or another one, is read anew: a resumed run has dropped rows.

    Args:
        path: The file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.changed = 0.0
        self._end, self._file = 0, 0

    def look(self) -> list[dict[str, Any]]:
        """All whole rows so far, without lines that are no JSON object with a step."""
        try:
            with self.path.open("rb") as file:
                status = self.path.stat()
                if status.st_size < self._end or status.st_ino != self._file:
                    self.rows, self._end, self._file = [], 0, status.st_ino
                self.changed = status.st_mtime
                file.seek(self._end)
                fresh = file.read(LARGEST_READ)
        except OSError:
            return self.rows
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._end += len(whole)
        self.rows += _objects(whole)
        return self.rows


@dataclass
class RunFolder:
    """A run folder.

    Attributes:
        id: Names it in the page's addresses.
        folder: Where it is.
        metrics: Its metrics.jsonl.
        evaluations: Its evaluations.jsonl.
    """

    id: str
    folder: Path
    metrics: GrowingRows = field(init=False)
    evaluations: GrowingRows = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = GrowingRows(self.folder / METRICS)
        self.evaluations = GrowingRows(self.folder / EVALUATIONS)

    def look(self) -> Run:
        """What it holds now."""
        rows = {row["step"]: row for row in self.metrics.look() if isinstance(row.get("losses", {}), dict)}
        results = [(row["step"], _result(row)) for row in self.evaluations.look()]
        return Run(
            name=self.folder.name,
            metrics=[row for _, row in sorted(rows.items())],
            evaluations=[Evaluated(step, result) for step, result in results if result is not None],
            skipped=None,
            seen=0,
            recipe=_text(self.folder / RECIPE),
        )

    def state(self, run: Run, steps: int) -> str:
        """ "finished", "training", or "stopped" where no row has come for long."""
        if steps and run.step >= steps:
            return "finished"
        last = float(run.metrics[-1].get("seconds") or 0) if run.metrics else 0.0
        return "training" if time.time() - self.metrics.changed < max(QUIET, SLOW_ROWS * last) else "stopped"


class RunFolders:
    """The runs in some folders.

    Args:
        places: Run folders, or folders that hold some, themselves or one level deeper.

    Raises:
        UserError: One of them is not there.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        for place in places:
            if not place.is_dir():
                raise UserError(
                    f"There is no folder '{place}'. Give a run folder, or one that holds some, with --runs."
                )
        self.places = [place.resolve() for place in places]
        self.lock = threading.Lock()
        """Held by who looks at the runs: rows are read on from where the last look ended."""
        self._known: dict[Path, RunFolder] = {}

    def look(self) -> list[RunFolder]:
        """The run folders that are there now, those that were written to last first."""
        found = list(dict.fromkeys(folder for place in self.places for folder in _runs_in(place)))
        found.sort(key=_changed, reverse=True)
        for folder in found[:MOST_RUNS]:
            if folder not in self._known:
                digest = hashlib.blake2b(str(folder).encode("utf-8", "surrogateescape"), digest_size=6)
                self._known[folder] = RunFolder(digest.hexdigest(), folder)
        return [self._known[folder] for folder in found[:MOST_RUNS]]


def flat_recipe(text: str) -> dict[str, Any]:
    """A recipe's values by dotted key; empty where it cannot be read."""
    try:
        tree = read_yaml(text)
    except yaml.YAMLError:
        return {}
    return flat(tree) if isinstance(tree, dict) else {}


def differences(recipes: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The keys whose values are not the same in all recipes, with the values; None where one lacks the key."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [(key, [recipe.get(key) for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _runs_in(place: Path) -> Iterator[Path]:
    for pattern in (RECIPE, f"*/{RECIPE}", f"*/*/{RECIPE}"):
        yield from (recipe.parent for recipe in sorted(place.glob(pattern)))


def _changed(folder: Path) -> float:
    for name in (METRICS, RECIPE):
        try:
            return (folder / name).stat().st_mtime
        except OSError:
            continue
    return 0.0


def _objects(lines: bytes) -> list[dict[str, Any]]:
    found = []
    for line in lines.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append(row)
    return found


def _result(row: dict[str, Any]) -> Any:
    try:
        return read_result(row)
    except (KeyError, TypeError, ValueError, AttributeError):  # of another version, or damaged
        return None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_RECIPE).decode("utf-8", "replace")
    except OSError:
        return ""
