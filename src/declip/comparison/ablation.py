"""A recipe taken apart: which arms belong to its ladder, and how far each is from the whole."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from declip.comparison.arms import RUNGS
from declip.comparison.outcome import Outcome, scores
from declip.comparison.study import Study
from declip.errors import UserError

RUNG, LEFT_OUT, BASELINE = "ladder ", "without ", "clip, "
"""How the names of such arms start, see `arms.py`."""

PUBLISHED = (20.6, 24.8, 25.4, 27.2)
"""ImageNet zero-shot top-1 in % after each of `RUNGS`: ResNet-50 on CC3M (Li et al. 2022, arXiv 2110.05208).

Second-hand: as others quote the paper, not read in the paper itself.
"""


@dataclass(frozen=True)
class Part:
    """An arm and what it is called among its like."""

    label: str
    arm: str


@dataclass(frozen=True)
class Ladder:
    """A recipe taken apart.

    Attributes:
        whole: The arm that the others are parts of.
        rungs: Terms added one after the other, the whole last.
        left_out: The whole without one term.
        baselines: Plain CLIP on the same towers.
        published: % of each rung in the paper; empty when the rungs are not the paper's.
    """

    whole: str
    rungs: tuple[Part, ...] = ()
    left_out: tuple[Part, ...] = ()
    baselines: tuple[Part, ...] = ()
    published: tuple[float, ...] = ()

    @property
    def groups(self) -> list[tuple[str, tuple[Part, ...]]]:
        """The parts under what they have in common, without empty groups and with the whole in each."""
        whole = (Part(self.whole, self.whole),)
        found = [
            ("terms added", self.rungs),
            ("term left out", (*self.left_out, *whole) if self.left_out else ()),
            ("plain clip", (*self.baselines, *whole) if self.baselines else ()),
        ]
        return [(name, parts) for name, parts in found if parts]

    @property
    def arms(self) -> list[str]:
        """All arms, each once."""
        return list(dict.fromkeys(part.arm for _, parts in self.groups for part in parts))


@dataclass(frozen=True)
class Difference:
    """The mean of what an arm has more than another, with its interval by Student's t over paired seeds.

    Attributes:
        mean: Mean difference over the seeds that both have.
        low, high: 95 % interval; None with one seed.
        n: Seeds.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


def main_arms(study: Study) -> list[str]:
    """The arms that were named, without ladders and baselines."""
    return [arm.name for arm in study.arms if not arm.name.startswith((RUNG, LEFT_OUT, BASELINE))]


def baseline_of(study: Study) -> str:
    """What the others are compared with: the arm named "clip", or the first."""
    names = [arm.name for arm in study.arms]
    return "clip" if "clip" in names else names[0]


def read_ladder(study: Study) -> Ladder | None:
    """The ladder of a study, None when no recipe was taken apart."""
    parts = [arm for arm in study.arms if arm.name not in main_arms(study)]
    if not parts:
        return None
    named = [study.arm(name) for name in main_arms(study)]
    whole = next((arm.name for arm in named if arm.recipe == parts[0].recipe), study.reference)

    def starting(start: str) -> tuple[Part, ...]:
        return tuple(Part(arm.name.removeprefix(start), arm.name) for arm in parts if arm.name.startswith(start))

    rungs = starting(RUNG)
    baselines = starting(BASELINE)
    left_out = _in_order(study, whole, rungs, starting(LEFT_OUT))
    if rungs:
        added = [f"+{term}" for term in _weights(study, whole) if term not in _weights(study, rungs[-1].arm)]
        rungs = (*rungs, Part(f"{' '.join(added)} = {whole}".strip(" ="), whole))
    return Ladder(whole, rungs, left_out, baselines, _published(study, rungs))


def _in_order(study: Study, whole: str, rungs: tuple[Part, ...], left_out: tuple[Part, ...]) -> tuple[Part, ...]:
    """The arms without one term, with the rung that is one of them too: `arms.py` trains it once."""
    weights = _weights(study, whole)
    for rung in rungs:
        missing = set(weights) - set(_weights(study, rung.arm))
        if left_out and len(missing) == 1:
            left_out = (*left_out, Part(missing.pop(), rung.arm))
    places = list(weights)
    return tuple(sorted(left_out, key=lambda part: places.index(part.label) if part.label in places else len(places)))


def _weights(study: Study, arm: str) -> dict[str, float]:
    """The active terms of an arm; empty when its recipe can no longer be read."""
    try:
        return study.arm(arm).resolve().active_losses
    except UserError:
        return {}


def _published(study: Study, rungs: tuple[Part, ...]) -> tuple[float, ...]:
    terms = [set(_weights(study, rung.arm)) for rung in rungs]
    paper: list[set[str]] = []
    for added in RUNGS:
        paper.append((paper[-1] if paper else set()) | set(added))
    return PUBLISHED if terms == paper else ()


def seed_values(outcome: Outcome, arm: str, budget: str, pairs: int, measure: str) -> dict[int, float]:
    """A measure of an arm by seed, as far as measured."""
    found = {}
    for seed in outcome.study.seeds:
        row = outcome.rows.get(outcome.study.cell(arm, budget, pairs, seed).id)
        value = None if row is None else scores(row["results"]).get(measure)
        if value is not None:
            found[seed] = value
    return found


def difference(outcome: Outcome, arm: str, other: str, budget: str, pairs: int, measure: str) -> Difference | None:
    """How much more an arm reaches than another; None when they share no seed."""
    first, second = (seed_values(outcome, name, budget, pairs, measure) for name in (arm, other))
    more = [value - second[seed] for seed, value in first.items() if seed in second]
    if not more:
        return None
    n, mean = len(more), float(np.mean(more))
    if n == 1:
        return Difference(mean, None, None, 1)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(more, ddof=1) / n**0.5)
    return Difference(mean, mean - half, mean + half, n)


def measured_sizes(outcome: Outcome, ladder: Ladder, measure: str) -> list[int]:
    """Numbers of pairs at which every arm was measured under every budget, the largest first.

    Where there is none, those at which the whole and another arm were measured.
    """

    def done(arm: str, pairs: int) -> bool:
        return all(seed_values(outcome, arm, budget, pairs, measure) for budget in outcome.study.budgets)

    sizes = sorted(outcome.study.pairs, reverse=True)
    every = [pairs for pairs in sizes if all(done(arm, pairs) for arm in ladder.arms)]
    others = [arm for arm in ladder.arms if arm != ladder.whole]
    return every or [pairs for pairs in sizes if done(ladder.whole, pairs) and any(done(arm, pairs) for arm in others)]
