"""The plan of a comparison: which trials it needs, kept in its folder so that it can be continued."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from declip.comparison.variants import Variant
from declip.errors import UserError
from declip.io.atomic import write_text

STUDY = "study.json"
BUDGETS = ("samples", "compute")
"""Equal samples: the same number of steps for all. Equal compute: the same time for all, see `Study.steps_of`."""

FIXED = ("steps", "batch_size", "compute_budget_of", "datasets", "tasks", "sweep")
"""Fields that a continued comparison must not change; variants, pairs, seeds and budgets may be added."""


@dataclass(frozen=True)
class Trial:
    """One training run and the measurement after it, on the study's sets or others.

    The seed chooses the distinct training pairs; the overrides are values that the sweep tries or chose.
    """

    variant: str
    pairs: int
    seed: int
    steps: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    datasets: tuple[str, ...] | None = None

    @property
    def id(self) -> str:
        """Name of its folder: unique, and the same in every process."""
        values = "".join(f"_{key.rsplit('.', 1)[-1]}={value}" for key, value in sorted(self.overrides.items()))
        kind = "sweep_" if self.datasets is not None else ""
        return re.sub(r"[^\w.+=,-]+", "-", f"{kind}{self.variant}_n{self.pairs}_s{self.seed}_t{self.steps}{values}")


@dataclass(frozen=True)
class Sweep:
    """Values by dotted key; every variant tries every combination on validation sets first, and keeps its best."""

    grid: Mapping[str, tuple[Any, ...]]
    datasets: tuple[str, ...]
    pairs: int
    steps: int
    seed: int = 1000  # another choice of pairs than that of any trial

    def combinations(self) -> list[dict[str, Any]]:
        """All combinations, the last key varying fastest."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


@dataclass(frozen=True)
class Study:
    """A comparison of variants."""

    variants: tuple[Variant, ...]
    pairs: tuple[int, ...]  # numbers of distinct pairs
    seeds: tuple[int, ...]
    steps: int  # optimizer steps at equal samples, for all variants
    batch_size: int
    datasets: tuple[str, ...]  # measured sets; the first gives the headline
    tasks: tuple[str, ...]
    budgets: tuple[str, ...]
    compute_budget_of: str  # the variant whose time is the compute budget
    seconds: Mapping[str, float] = field(default_factory=dict)  # a step of each variant, measured on `machine`
    sweep: Sweep | None = None
    chosen: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # values that the sweep chose, by variant
    machine: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[tuple[str, ...], ...] = ()  # words of every command that made or extended this study

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    @property
    def named(self) -> list[str]:
        """Names of the variants that the user gave, without ablation and baselines."""
        return [variant.name for variant in self.variants if not variant.group]

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with: a recipe called clip or demo-clip, else the first."""
        names = [variant.name for variant in self.variants]
        return next((name for name in ("clip", "demo-clip") if name in names), names[0])

    def steps_of(self, variant: str, budget: str) -> int:
        """Steps under a budget: the study's, or as many as fit into the time of `compute_budget_of`."""
        if budget == "samples" or variant == self.compute_budget_of:
            return self.steps
        return max(1, round(self.steps * self.seconds[self.compute_budget_of] / self.seconds[variant]))

    def trial(self, variant: str, budget: str, pairs: int, seed: int) -> Trial:
        """The trial of a variant under a budget; two budgets may share one."""
        return Trial(variant, pairs, seed, self.steps_of(variant, budget), dict(self.chosen.get(variant, {})))

    def trials(self) -> list[Trial]:
        """All trials, each once; seed by seed, so that an unfinished study is a smaller one."""
        wanted = (
            self.trial(variant.name, budget, pairs, seed)
            for seed in self.seeds
            for budget in self.budgets
            for pairs in self.pairs
            for variant in self.variants
        )
        return list({trial.id: trial for trial in wanted}.values())

    def sweep_trials(self) -> list[Trial]:
        """The tries of every variant."""
        if (sweep := self.sweep) is None:
            return []
        return [
            Trial(variant.name, sweep.pairs, sweep.seed, sweep.steps, values, datasets=sweep.datasets)
            for variant in self.variants
            for values in sweep.combinations()
        ]


def read_study(folder: Path) -> Study | None:
    """Read the study of a folder, None where there is none; refuse one that is damaged or of another version."""
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
    """Replace the study of a folder."""
    write_text(folder / STUDY, json.dumps(asdict(study), indent=1))


def extended(study: Study, earlier: Study, folder: Path) -> Study:
    """Add the variants, pairs, seeds and budgets of a new call to the study that a folder holds.

    Anything else must be the same, or earlier trials would mean something else.
    """
    changed = [
        f"{name} was {getattr(earlier, name)}, now {getattr(study, name)}"
        for name in FIXED
        if getattr(study, name) != getattr(earlier, name)
    ]
    variants = {variant.name: variant for variant in earlier.variants}
    for variant in study.variants:
        if keys := variants.get(variant.name, variant).changes(variant):
            changed.append(f"{variant.name}: {'; '.join(keys)}")
        variants[variant.name] = variant  # its file may have moved
    if changed:
        raise UserError(
            f"'{folder}' holds another comparison: {'; '.join(changed[:4])}. Give the same options to continue it, "
            "another folder with --out, or save a changed recipe under another name, which makes it another variant."
        )
    return replace(
        earlier,
        variants=tuple(variants.values()),
        pairs=tuple(sorted({*earlier.pairs, *study.pairs})),
        seeds=tuple(sorted({*earlier.seeds, *study.seeds})),
        budgets=tuple(budget for budget in BUDGETS if budget in {*earlier.budgets, *study.budgets}),
        commands=tuple(dict.fromkeys((*earlier.commands, *study.commands))),
    )


def read_counts(text: str) -> tuple[int, ...]:
    """Read "1k,2.5k,10000" as rising numbers of pairs, each once; raises `UserError` for anything else."""
    counts = set()
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", word, re.IGNORECASE)
        if match is None or float(match[1]) == 0:
            raise UserError(f"'{word}' is not a number of pairs. Write numbers with commas, such as 500,1k,2.5k,1m.")
        counts.add(round(float(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2].lower()]))
    return tuple(sorted(counts))
