"""What a comparison found: every run's numbers, as curves and factors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from declip.comparison.statistics import Curve, Factor, curve_of, factor
from declip.comparison.study import Study, read_study
from declip.comparison.trial import read_cell
from declip.comparison.worker import failure
from declip.errors import UserError, unknown
from declip.evaluation.results import RetrievalResult, ZeroShotResult, read_result
from declip.io.atomic import atomic_write

RESULTS = "results.json"


@dataclass(frozen=True)
class Outcome:
    """The runs that are done.

    Attributes:
        study: The plan.
        rows: Result of each run by its id, see `cell.py`.
        tuning: Result of each try by its id.
        failures: Why a run failed, by its id.
    """

    study: Study
    rows: Mapping[str, Mapping[str, Any]]
    tuning: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every run is done."""
        return all(cell.id in self.rows for cell in self.study.cells())

    @property
    def measures(self) -> list[str]:
        """What was measured, the foremost first."""
        names: dict[str, None] = {}
        for row in self.rows.values():
            names |= dict.fromkeys(scores(row["results"]))
        return list(names)

    def curve(self, arm: str, budget: str, measure: str) -> Curve:
        """A measure of an arm under a budget against the number of pairs."""
        if measure not in self.measures:
            raise unknown("measure", measure, self.measures)
        values: dict[int, dict[int, float]] = {}
        for pairs in self.study.pairs:
            rows = {seed: self.rows.get(self.study.cell(arm, budget, pairs, seed).id) for seed in self.study.seeds}
            values[pairs] = {seed: scores(row["results"])[measure] for seed, row in rows.items() if row is not None}
        return curve_of(values)

    def factor(self, a: str, b: str, budget: str, measure: str) -> Factor:
        """How many times fewer pairs arm `a` needs than arm `b`."""
        return factor(self.curve(a, budget, measure), self.curve(b, budget, measure))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the plan, every run and try."""
        return {
            "study": self.study.to_dict(),
            "runs": list(self.rows.values()),
            "tuning": list(self.tuning.values()),
            "failures": dict(self.failures),
        }


def scores(results: list[dict[str, Any]]) -> dict[str, float]:
    """The number that a comparison looks at, by set and protocol: top-1, or the mean of R@1 both ways."""
    found = {}
    for row in results:
        result = read_result(row)
        if isinstance(result, ZeroShotResult):
            found[f"{result.on}: zero-shot top-1"] = result.top1
        elif isinstance(result, RetrievalResult):
            found[f"{result.on}: R@1"] = (result.text_to_image.r1 + result.image_to_text.r1) / 2
        elif result is not None:
            first = result.measures()[0]
            found[f"{result.on}: {first.name}"] = first.value
    return found


def read_outcome(folder: str | Path) -> Outcome:
    """Read what is done of a comparison.

    Raises:
        UserError: the folder holds none.
    """
    folder = Path(folder)
    study = read_study(folder)
    if study is None:
        raise UserError(f"'{folder}' holds no comparison. Make one with `declip compare RECIPE… --out {folder}`.")
    if any(arm.name not in study.seconds for arm in study.arms):
        raise UserError(
            f"The comparison in '{folder}' was stopped before its steps were timed. Give its command again."
        )
    done = {cell.id: read_cell(folder, cell) for cell in (*study.cells(), *study.tuning_cells())}
    found = {name: row for name, row in done.items() if row is not None}
    tries = {cell.id for cell in study.tuning_cells()}
    failed = {cell.id: failure(folder, cell) for cell in (*study.tuning_cells(), *study.cells())}
    return Outcome(
        study,
        rows={name: row for name, row in found.items() if name not in tries},
        tuning={name: row for name, row in found.items() if name in tries},
        failures={name: reason for name, reason in failed.items() if reason is not None},
    )


def write_results(outcome: Outcome, folder: Path) -> Path:
    """Write results.json."""
    with atomic_write(folder / RESULTS) as path:
        path.write_text(json.dumps(outcome.to_dict(), indent=1), encoding="utf-8")
    return folder / RESULTS


def tuning_score(row: Mapping[str, Any]) -> float:
    """What tuning goes by: top-5 where there are 100 classes or more, as it is less noisy than top-1, else `scores`."""
    result = read_result(row["results"][0])
    if isinstance(result, ZeroShotResult) and result.classes >= 100:
        return result.top5
    return next(iter(scores(row["results"]).values()))
