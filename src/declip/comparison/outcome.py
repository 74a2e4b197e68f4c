"""The results of a comparison: the scores of every trial, as curves and factors."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from declip.comparison.statistics import EfficiencyCurve, Factor, curve_of, factor
from declip.comparison.study import Study, read_study
from declip.comparison.worker import failure, read_trial
from declip.errors import UserError, unknown
from declip.evaluation.results import ClassificationResult, RetrievalResult, ZeroShotResult, read_result
from declip.io.text import percent

RESULTS = "results.json"


class MeasureFacts(NamedTuple):
    """The test set behind a measure: number of images, chance level, and a description of the candidates."""

    n: int
    chance: float
    among: str


class ComparedFactor(NamedTuple):
    """The factor of a variant over the baseline under a budget; None before both were measured."""

    variant: str
    budget: str
    factor: Factor | None


Curves = Mapping[str, Mapping[str, EfficiencyCurve]]
"""Curves of one measure, by budget and variant."""


@dataclass(frozen=True)
class Outcome:
    """The finished trials of a study, by id."""

    study: Study
    rows: Mapping[str, Mapping[str, Any]]  # results, as `worker.run_trial` writes them
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

    def curve(self, variant: str, budget: str, measure: str) -> EfficiencyCurve:
        """The score of a variant under a budget against the number of pairs, of the finished trials."""
        if measure not in self.measures:
            raise unknown("measure", measure, self.measures)
        study, values = self.study, dict[int, dict[int, float]]()
        for pairs, seed in product(study.pairs, study.seeds):
            value = self.scores.get(study.trial(variant, budget, pairs, seed).id, {}).get(measure)
            values.setdefault(pairs, {}).update({} if value is None else {seed: value})
        return curve_of(values)

    def factor(self, a: str, b: str, budget: str, measure: str) -> Factor:
        """How many times fewer pairs variant `a` needs than variant `b`."""
        return factor(self.curve(a, budget, measure), self.curve(b, budget, measure))

    def curves(self) -> dict[str, Curves]:
        """All curves by measure."""
        names, budgets = self.study.names, self.study.budgets
        return {m: {b: {v: self.curve(v, b, m) for v in names} for b in budgets} for m in self.measures}

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready tree: the study, the finished runs and the failures."""
        return {"study": asdict(self.study), "runs": list(self.rows.values()), "failures": dict(self.failures)}


def scores(results: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The compared score of each dataset and task: top-1, or the mean of R@1 in both directions."""
    return {name: value for name, value, _ in filter(None, map(_score, results))}


def measure_facts(outcome: Outcome) -> dict[str, MeasureFacts]:
    """The test set behind each measure, from the first trial that has it."""
    facts: dict[str, MeasureFacts] = {}
    for result in (result for row in outcome.rows.values() for result in row["results"]):
        if (scored := _score(result)) is not None:
            facts.setdefault(scored[0], scored[2])
    return facts


def _score(row: Mapping[str, Any]) -> tuple[str, float, MeasureFacts] | None:
    """Name and value of the measure of a result, and its facts; None for an unknown task."""
    result = read_result(row)
    if isinstance(result, RetrievalResult):
        text, image = result.text_to_image, result.image_to_text
        among = f"{result.images:,} images and {result.texts:,} captions"
        facts = MeasureFacts(result.images, (text.chance1 + image.chance1) / 2, among)
        return f"{result.dataset}: R@1", (text.r1 + image.r1) / 2, facts
    if not isinstance(result, ClassificationResult):
        return None
    first = result.measures()[0]
    name = f"zero-shot {first.name}" if isinstance(result, ZeroShotResult) else first.name
    largest = "" if first.majority is None else f", the largest with {percent(first.majority)}"
    facts = MeasureFacts(first.n, first.chance, f"{result.classes:,} classes{largest}")
    return f"{result.dataset}: {name}", first.value, facts


def compared_factors(study: Study, curves: Curves) -> list[ComparedFactor]:
    """The factor of each variant over the baseline under each budget."""
    found = []
    for name, budget in product((name for name in study.names if name != study.baseline), study.budgets):
        of_variant, of_baseline = curves[budget][name], curves[budget][study.baseline]
        both = of_variant.pairs and of_baseline.pairs
        found.append(ComparedFactor(name, budget, factor(of_variant, of_baseline) if both else None))
    return found


def near_chance(study: Study, curves: Curves, facts: MeasureFacts) -> dict[str, list[int]]:
    """By budget, the numbers of pairs at which the baseline is within two standard errors of chance."""
    limit = facts.chance + 2 * sqrt(facts.chance * (1 - facts.chance) / facts.n)
    found = {}
    for budget in study.budgets:
        curve = curves[budget][study.baseline]
        found[budget] = [pairs for pairs, mean in zip(curve.pairs, curve.means, strict=True) if mean <= limit]
    return found


def read_outcome(folder: str | Path) -> Outcome:
    """Read the finished trials of a comparison; raises `UserError` if the folder has no comparison."""
    folder = Path(folder)
    study = read_study(folder)
    if study is None:
        raise UserError(f"'{folder}' has no comparison. Run one with `declip compare RECIPE… --out {folder}`.")
    if study.reference not in study.seconds:
        raise UserError(f"The comparison in '{folder}' was stopped before its steps were timed. Run its command again.")
    timed = tuple(variant for variant in study.variants if variant.name in study.seconds)
    study = replace(study, variants=timed)  # another process may be timing a variant that joined
    trials = study.trials()
    rows = {trial.id: row for trial in trials if (row := read_trial(folder, trial)) is not None}
    failures = {trial.id: reason for trial in trials if (reason := failure(folder, trial)) is not None}
    return Outcome(study, rows, failures)
