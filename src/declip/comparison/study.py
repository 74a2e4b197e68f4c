"""The plan of a comparison: which runs it needs, kept in its folder so that it can go on."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from declip.comparison.arms import Arm
from declip.errors import UserError
from declip.io.atomic import atomic_write

STUDY = "study.json"
BUDGETS = ("samples", "compute")
"""Equal samples: every arm takes the same number of steps. Equal compute: every arm takes as long as the reference."""

FIXED = ("steps", "batch", "reference", "on", "protocols")
"""What must stay when a comparison goes on; arms, pairs, seeds and budgets may be added."""


@dataclass(frozen=True)
class Cell:
    """One training run, and the measurement after it.

    Attributes:
        arm: Name of the arm.
        pairs: Distinct pairs that teach, chosen by the seed.
        seed: Of the choice of pairs, the start, the order and the views.
        steps: How many; it follows from the budget.
        overrides: Of the recipe, besides the arm's: what tuning tries or chose.
        on: Sets measured; None: the study's.
    """

    arm: str
    pairs: int
    seed: int
    steps: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    on: tuple[str, ...] | None = None

    @property
    def id(self) -> str:
        """The name of its folder: unique, and the same at every start."""
        tried = "".join(f"_{key.rsplit('.', 1)[-1]}={value}" for key, value in sorted(self.overrides.items()))
        kind = "tuning_" if self.on is not None else ""
        return re.sub(r"[^\w.+=,-]+", "-", f"{kind}{self.arm}_n{self.pairs}_s{self.seed}_t{self.steps}{tried}")


@dataclass(frozen=True)
class Tuning:
    """How every arm was tuned: the same values of the same keys, on the same pairs, for the same steps.

    Attributes:
        grid: Values by dotted key; every combination is tried.
        on: The validation set, never one of those that the study measures on.
        pairs, steps, seed: Of each try.
    """

    grid: Mapping[str, tuple[Any, ...]]
    on: str
    pairs: int
    steps: int
    seed: int

    def combinations(self) -> list[dict[str, Any]]:
        """All of them, in the order given."""
        found: list[dict[str, Any]] = [{}]
        for key, values in self.grid.items():
            found = [{**one, key: value} for one in found for value in values]
        return found


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        arms: What is compared.
        pairs: Numbers of distinct pairs.
        seeds: Of each number.
        steps: Of a run at equal samples; the reference takes as many at equal compute.
        batch: Pairs a step, the same for all arms.
        on: What is measured on, the first foremost.
        protocols: How.
        budgets: Some of `BUDGETS`.
        reference: The arm whose time sets the compute budget.
        seconds: Seconds a step of each arm, measured in turns before the study (see `cost.py`).
        tuning: How the arms were tuned; None when they were not.
        chosen: What tuning chose for each arm.
        machine: Where `seconds` were measured.
    """

    arms: tuple[Arm, ...]
    pairs: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    batch: int
    on: tuple[str, ...]
    protocols: tuple[str, ...]
    budgets: tuple[str, ...]
    reference: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    tuning: Tuning | None = None
    chosen: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def steps_of(self, arm: str, budget: str) -> int:
        """Steps of an arm under a budget: as many as the reference, or as many as fit into the reference's time."""
        if budget == "samples" or arm == self.reference:
            return self.steps
        return max(1, round(self.steps * self.seconds[self.reference] / self.seconds[arm]))

    def cell(self, arm: str, budget: str, pairs: int, seed: int) -> Cell:
        """The run of an arm under a budget; under two budgets it may be the same run."""
        return Cell(arm, pairs, seed, self.steps_of(arm, budget), dict(self.chosen.get(arm, {})))

    def cells(self) -> list[Cell]:
        """All runs, each once; seed by seed, so that an unfinished study is a smaller one."""
        wanted = (
            self.cell(arm.name, budget, pairs, seed)
            for seed in self.seeds
            for budget in self.budgets
            for pairs in self.pairs
            for arm in self.arms
        )
        return list({cell.id: cell for cell in wanted}.values())

    def tuning_cells(self) -> list[Cell]:
        """The tries of every arm."""
        if self.tuning is None:
            return []
        plan = self.tuning
        return [
            Cell(arm.name, plan.pairs, plan.seed, plan.steps, combination, on=(plan.on,))
            for arm in self.arms
            for combination in plan.combinations()
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `read_study` reads it back."""
        return asdict(self)


def read_study(folder: Path) -> Study | None:
    """The study of a folder, None where there is none.

    Raises:
        UserError: the file is damaged or of another version.
    """
    path = folder / STUDY
    if not path.is_file():
        return None
    try:
        return TypeAdapter(Study).validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"'{path}' holds no comparison of this version of declip. Choose another folder with --out. {error}"
        ) from error


def write_study(study: Study, folder: Path) -> None:
    """Write the plan beside and rename it."""
    with atomic_write(folder / STUDY) as path:
        path.write_text(json.dumps(study.to_dict(), indent=1), encoding="utf-8")


def extended(study: Study, earlier: Study, folder: Path) -> Study:
    """The study as it goes on: what was measured and chosen stays; arms, pairs, seeds and budgets may be added.

    Raises:
        UserError: it would mean something else than before.
    """
    changed = [
        f"{name} was {_shown(getattr(earlier, name))}, now {_shown(getattr(study, name))}"
        for name in FIXED
        if getattr(study, name) != getattr(earlier, name)
    ]
    known = {arm.name: arm for arm in earlier.arms}
    both = [(known[arm.name], arm) for arm in study.arms if arm.name in known]
    changed += [f"arm {was.name}: {'; '.join(keys)}" for was, now in both if (keys := was.changes(now))]
    if study.tuning != earlier.tuning:
        changed.append("tuning differs")
    if changed:
        raise UserError(
            f"'{folder}' holds another comparison: {'; '.join(changed[:4])}. Give the same options to go on, another "
            "folder with --out, or a changed recipe's file a name of its own, which makes it another arm."
        )
    return replace(
        study,
        arms=tuple({arm.name: arm for arm in (*earlier.arms, *study.arms)}.values()),
        pairs=tuple(sorted({*earlier.pairs, *study.pairs})),
        seeds=tuple(sorted({*earlier.seeds, *study.seeds})),
        budgets=tuple(budget for budget in BUDGETS if budget in {*earlier.budgets, *study.budgets}),
        seconds=earlier.seconds,
        chosen=earlier.chosen,
        machine=earlier.machine,
    )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read_counts(text: str) -> tuple[int, ...]:
    """Read "1k,2.5k,10000" as numbers of pairs, rising, each once.

    Raises:
        UserError: something else.
    """
    return tuple(sorted({_count(word) for word in text.split(",")}))


def _count(word: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", word, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UserError(f"'{word}' is not a number of pairs. Write numbers with commas, such as 500,1k,2.5k,1m.")
    return round(float(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2].lower()])
