"""What a run folder holds, read so that a run that is not finished, or was killed, can be shown too."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from declip.errors import UserError
from declip.evaluation.results import Result, read_result


@dataclass(frozen=True)
class Evaluated:
    """A result and the step after which it was measured."""

    step: int
    result: Result


@dataclass(frozen=True)
class Run:
    """A run folder in memory.

    Attributes:
        name: The folder's name.
        metrics: Rows of metrics.jsonl, in the order of their steps.
        evaluations: Rows of evaluations.jsonl whose protocol is known here, in the order of their steps.
        skipped: Reason to count and example keys, of skipped.json; None when it was not written yet.
        seen: Pairs seen when skipped.json was written.
        recipe: The text of recipe.yaml, empty when there is none.
    """

    name: str
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluated]
    skipped: Mapping[str, Mapping[str, Any]] | None
    seen: int
    recipe: str

    @property
    def step(self) -> int:
        """The last step that was logged; 0 when none was."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def samples_seen(self) -> int:
        """Pairs seen until then, counted again each time they come."""
        return int(self.metrics[-1]["samples_seen"]) if self.metrics else 0

    @property
    def samples_per_second(self) -> float | None:
        """Median over the logged steps."""
        rates = self.column("samples_per_second")
        return float(np.nanmedian(rates)) if np.isfinite(rates).any() else None

    @property
    def seconds(self) -> float:
        """Seconds of training, without evaluations and checkpoints."""
        return float(np.nansum(self.column("seconds"))) if self.metrics else 0.0

    @property
    def steps(self) -> np.ndarray:
        """(rows,) the logged steps."""
        return np.array([row["step"] for row in self.metrics], dtype=np.int64)

    @property
    def terms(self) -> list[str]:
        """Names of the terms, in the order of the first row."""
        return list(dict.fromkeys(name for row in self.metrics for name in row.get("losses", {})))

    def column(self, name: str) -> np.ndarray:
        """(rows,) float64 of a metric; "losses.NAME" for a term; NaN where a row lacks it."""
        return np.array([_number(row, name.split(".", 1)) for row in self.metrics], dtype=np.float64)

    def measured(self, protocol: str, on: str) -> list[Evaluated]:
        """The evaluations of one protocol on one source."""
        return [row for row in self.evaluations if (row.result.protocol, row.result.on) == (protocol, on)]

    def last(self) -> list[Evaluated]:
        """The last evaluation of each protocol on each source."""
        return list({(row.result.on, row.result.protocol): row for row in self.evaluations}.values())


def read_run(folder: str | Path) -> Run:
    """Read a run folder; files that are not there yet count as empty.

    Raises:
        UserError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no run folder '{folder}'. A report is written into the folder of a run.")
    skipped = _json(folder / "skipped.json")
    evaluations = [(int(row.get("step", 0)), read_result(row)) for row in _rows(folder / "evaluations.jsonl")]
    return Run(
        name=folder.resolve().name,
        metrics=_by_step(_rows(folder / "metrics.jsonl")),
        evaluations=sorted(
            (Evaluated(step, result) for step, result in evaluations if result is not None),
            key=lambda row: row.step,
        ),
        skipped=None if skipped is None else skipped.get("reasons", {}),
        seen=0 if skipped is None else int(skipped.get("seen", 0)),
        recipe=_text(folder / "recipe.yaml"),
    )


def _by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorted by step; of a step that was logged twice, as after a resume, the later row."""
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without a line that was cut off when its writer was killed."""
    found = []
    for line in _text(path).splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _json(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    return json.loads(text) if text else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _number(row: Any, keys: list[str]) -> float:
    for key in keys:
        row = row.get(key) if isinstance(row, Mapping) else None
    return float("nan") if row is None else float(row)
