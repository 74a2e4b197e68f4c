"""Choose the value of a key for each recipe of a comparison, by short runs that another set measures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from declip.comparison import runner
from declip.comparison.study import Study, Variant
from declip.errors import UserError
from declip.recipe.load import read_value
from declip.runs.folder import log


@dataclass(frozen=True)
class Grid:
    """The values of a key that are tried, and the set that chooses, which should not be the test set."""

    key: str
    values: tuple[str, ...]
    dataset: str

    @classmethod
    def of(cls, tune: str, dataset: str | None) -> "Grid":
        """Read KEY=V1,V2,… of the option --tune."""
        key, _, given = tune.partition("=")
        values = tuple(value.strip() for value in given.split(",") if value.strip())
        if not key or len(set(values)) < max(2, len(values)):
            raise UserError(
                f"--tune is '{tune}'. Write a key and two or more values: train.lr=0.001,0.002,0.004."
            )
        if dataset is None:
            raise UserError(
                "--tune needs a set that chooses. Name one with --tune-on, not the test set."
            )
        return cls(key, values, dataset)


def tune_study(study: Study, grid: Grid, out: str | Path, progress: bool = True) -> Study:
    """Choose a value for each recipe with the largest number of pairs and the first seed, and return the study with it.

    The runs are a comparison of their own in the folder OUT-tuning, and are repeated by no later call.
    """
    if grid.dataset in study.datasets:
        raise UserError(
            f"'{grid.dataset}' is a test set of the comparison. Name another set with --tune-on."
        )
    tried = {}
    for variant, value in product(study.variants, grid.values):
        overrides = {**variant.overrides, grid.key: read_value(grid.key, value)}
        candidate = Variant.of(variant.recipe, overrides)
        tried[variant.name, value] = replace(candidate, name=f"{variant.name}-{value}")
    trials = replace(
        study,
        variants=tuple(tried.values()),
        pairs=study.pairs[-1:],
        seeds=study.seeds[:1],
        datasets=(grid.dataset,),
        tasks=study.tasks[:1],
        budget="samples",
    )
    outcome = runner.run(trials, f"{Path(out).expanduser()}-tuning", progress)
    if not outcome.complete:
        stopped = "it was stopped; run the command again to continue"
        reason = next(iter(outcome.failures.values()), stopped)
        raise UserError(f"Tuning is not finished: {reason}")
    curves = outcome.curves()[next(iter(outcome.facts))]
    chosen = []
    for variant in study.variants:
        of_values = [curves[tried[variant.name, value].name] for value in grid.values]
        scores = [float(curve.means[0]) for curve in of_values]
        best = grid.values[scores.index(max(scores))]
        _report(variant.name, grid, best, scores)
        chosen.append(replace(tried[variant.name, best], name=variant.name))
    return replace(study, variants=tuple(chosen))


def _report(name: str, grid: Grid, best: str, scores: Sequence[float]) -> None:
    """Log the choice, and warn of one at an edge of the grid, beyond which the best value may lie."""
    shown = ", ".join(
        f"{value}: {score:.1%}" for value, score in zip(grid.values, scores, strict=True)
    )
    log.info("%s: %s=%s (%s)", name, grid.key, best, shown)
    try:
        ordered = sorted(grid.values, key=float)
    except ValueError:  # not numbers
        return
    if best in (ordered[0], ordered[-1]):
        advice = "Add values beyond it to --tune"
        log.warning(
            "%s: %s=%s lies at the edge of the grid (%s). %s.", name, grid.key, best, shown, advice
        )
