"""The results of a comparison: the numbers of every trial, as curves, factors and differences."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from declip.comparison.statistics import EfficiencyCurve, Factor, curve_of, factor, t_half_width
from declip.comparison.study import Study, read_study
from declip.comparison.worker import failure, read_trial
from declip.errors import UserError, unknown
from declip.evaluation.results import RetrievalResult, ZeroShotResult, read_result

RESULTS = "results.json"


@dataclass(frozen=True)
class Difference:
    """Mean difference between two variants over the n seeds that both have, with its 95 % interval by Student's t."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Outcome:
    """The trials that are done, by id."""

    study: Study
    rows: Mapping[str, Mapping[str, Any]]  # results, as `worker.run_trial` writes them
    sweep: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the same of the tries of the sweep
    failures: Mapping[str, str] = field(default_factory=dict)  # reasons

    @property
    def complete(self) -> bool:
        """Whether every trial is done."""
        return all(trial.id in self.rows for trial in self.study.trials())

    @property
    def measures(self) -> list[str]:
        """Names of the measures, the headline's first."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in scores(row["results"])))

    def values(self, variant: str, budget: str, pairs: int, measure: str) -> dict[int, float]:
        """Values of a measure by seed, as far as measured."""
        values = {}
        for seed in self.study.seeds:
            row = self.rows.get(self.study.trial(variant, budget, pairs, seed).id, {"results": []})
            values[seed] = scores(row["results"]).get(measure)
        return {seed: value for seed, value in values.items() if value is not None}

    def curve(self, variant: str, budget: str, measure: str) -> EfficiencyCurve:
        """A measure of a variant under a budget against the number of pairs."""
        if measure not in self.measures:
            raise unknown("measure", measure, self.measures)
        return curve_of({pairs: self.values(variant, budget, pairs, measure) for pairs in self.study.pairs})

    def factor(self, a: str, b: str, budget: str, measure: str) -> Factor:
        """How many times fewer pairs variant `a` needs than variant `b`."""
        return factor(self.curve(a, budget, measure), self.curve(b, budget, measure))

    def difference(self, a: str, b: str, budget: str, pairs: int, measure: str) -> Difference | None:
        """How much more variant `a` reaches than variant `b`; None when they share no seed."""
        first, second = (self.values(name, budget, pairs, measure) for name in (a, b))
        more = [value - second[seed] for seed, value in first.items() if seed in second]
        if not more:
            return None
        mean, half = float(np.mean(more)), t_half_width(more)
        low, high = (None, None) if half is None else (mean - half, mean + half)
        return Difference(mean, low, high, len(more))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the plan, every trial and try."""
        return {
            "study": asdict(self.study),
            "runs": list(self.rows.values()),
            "sweep": list(self.sweep.values()),
            "failures": dict(self.failures),
        }


def scores(results: list[dict[str, Any]]) -> dict[str, float]:
    """The number that a comparison looks at, by dataset and task: top-1, or the mean of R@1 both ways."""
    found = {}
    for row in results:
        result = read_result(row)
        if isinstance(result, ZeroShotResult):
            found[f"{result.dataset}: zero-shot top-1"] = result.top1
        elif isinstance(result, RetrievalResult):
            found[f"{result.dataset}: R@1"] = (result.text_to_image.r1 + result.image_to_text.r1) / 2
        elif result is not None:
            first = result.measures()[0]
            found[f"{result.dataset}: {first.name}"] = first.value
    return found


def sweep_score(row: Mapping[str, Any]) -> float:
    """The number that chooses among tries: a mean over the sets, each by its first task.

    That is top-5 with 100 classes or more, as it is less noisy, else the number of `scores`.
    """
    found: dict[str, float] = {}
    for each in row["results"]:
        result = read_result(each)
        top5 = result.top5 if isinstance(result, ZeroShotResult) and result.classes >= 100 else None
        found.setdefault(each["dataset"], next(iter(scores([each]).values())) if top5 is None else top5)
    return float(np.mean(list(found.values())))


def read_outcome(folder: str | Path) -> Outcome:
    """Read the trials of a comparison that are done; raises `UserError` where the folder holds none."""
    folder = Path(folder)
    study = read_study(folder)
    if study is None:
        raise UserError(f"'{folder}' holds no comparison. Make one with `declip compare RECIPE… --out {folder}`.")
    timed = tuple(variant for variant in study.variants if variant.name in study.seconds)
    if study.compute_budget_of not in study.seconds:
        raise UserError(
            f"The comparison in '{folder}' was stopped before its steps were timed. Give its command again."
        )
    study = replace(study, variants=timed)  # another process may be timing one that joined
    trials, tries = study.trials(), study.sweep_trials()
    rows, sweep = (
        {trial.id: row for trial in part if (row := read_trial(folder, trial)) is not None} for part in (trials, tries)
    )
    reasons = {trial.id: failure(folder, trial) for trial in (*tries, *trials)}
    return Outcome(study, rows, sweep, {id: reason for id, reason in reasons.items() if reason is not None})
