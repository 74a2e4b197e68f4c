"""The results of a comparison: the scores of every trial, as curves and factors."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from declip.comparison.statistics import EfficiencyCurve, Factor, curve_of, factor
from declip.comparison.study import Study, Trial, read_study
from declip.comparison.trials import failure, read_trial
from declip.errors import UserError, unknown
from declip.evaluation.results import Measure, Result, ZeroShotResult, read_result


class ComparedFactor(NamedTuple):
    """The factor of a variant over the baseline; None before both were measured."""

    variant: str
    factor: Factor | None


Curves = Mapping[str, EfficiencyCurve]
"""Curves of one measure, by variant."""


@dataclass(frozen=True)
class Outcome:
    """The finished trials of a study, by id."""

    study: Study
    rows: Mapping[str, Mapping[str, Any]]  # results, as `trials.run_trial` writes them
    failures: Mapping[str, str] = field(default_factory=dict)  # reasons

    @property
    def complete(self) -> bool:
        """Whether every trial is finished."""
        return all(trial.id in self.rows for trial in self.study.trials())

    @cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """Scores by trial and measure."""
        return {id: scores(row["results"]) for id, row in self.rows.items()}

    @property
    def measures(self) -> list[str]:
        """Names of the measures, the headline first."""
        return list(dict.fromkeys(name for of_trial in self.scores.values() for name in of_trial))

    def curve(self, variant: str, measure: str) -> EfficiencyCurve:
        """The score of a variant against the number of pairs, of the finished trials."""
        if measure not in self.measures:
            raise unknown("measure", measure, self.measures)
        values: dict[int, dict[int, float]] = {pairs: {} for pairs in self.study.pairs}
        # Unfinished trials leave gaps, which the curve skips.
        for pairs in self.study.pairs:
            for seed in self.study.seeds:
                of_trial = self.scores.get(Trial(variant, pairs, seed).id, {})
                values[pairs] |= {seed: of_trial[measure]} if measure in of_trial else {}
        return curve_of(values)

    def curves(self) -> dict[str, Curves]:
        """All curves by measure."""
        return {m: {variant: self.curve(variant, m) for variant in self.study.names} for m in self.measures}

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready tree: the study, the finished runs and the failures."""
        return {"study": asdict(self.study), "runs": list(self.rows.values()), "failures": dict(self.failures)}


def scores(results: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The compared score of each dataset and task: top-1, or the mean of R@1 in both directions."""
    return {_measure(result): result.headline.value for result in filter(None, map(read_result, results))}


def measured(outcome: Outcome) -> dict[str, Result]:
    """The first result of each measure, for its test set and chance level."""
    rows = (row for trial in outcome.rows.values() for row in trial["results"])
    found: dict[str, Result] = {}
    for result in filter(None, map(read_result, rows)):
        found.setdefault(_measure(result), result)
    return found


def _measure(result: Result) -> str:
    name = result.headline.name
    return f"{result.dataset}: {f'zero-shot {name}' if isinstance(result, ZeroShotResult) else name}"


def compared_factors(study: Study, curves: Curves) -> list[ComparedFactor]:
    """The factor of each variant over the baseline."""
    baseline, found = curves[study.baseline], []
    for name in (name for name in study.names if name != study.baseline):
        both = curves[name].pairs and baseline.pairs
        found.append(ComparedFactor(name, factor(curves[name], baseline) if both else None))
    return found


def near_chance(curve: EfficiencyCurve, facts: Measure) -> list[int]:
    """The numbers of pairs at which a curve is within two standard errors of chance."""
    limit = facts.chance + 2 * sqrt(facts.chance * (1 - facts.chance) / facts.n)
    return [pairs for pairs, mean in zip(curve.pairs, curve.means, strict=True) if mean <= limit]


def read_outcome(folder: str | Path) -> Outcome:
    """Read the finished trials of a comparison; raises `UserError` if the folder has no comparison."""
    folder = Path(folder)
    # Every trial has its own files, so that processes may still be writing others.
    study = read_study(folder)
    if study is None:
        raise UserError(f"'{folder}' has no comparison. Run one with `declip compare RECIPE… --out {folder}`.")
    trials = study.trials()
    rows = {trial.id: row for trial in trials if (row := read_trial(folder, trial)) is not None}
    failures = {trial.id: reason for trial in trials if (reason := failure(folder, trial)) is not None}
    return Outcome(study, rows, failures)
