"""A comparison as a value: recipes, numbers of pairs, seeds, the budget, and the trials that follow from them."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from declip.errors import UserError
from declip.io.outputs import STUDY_FILE
from declip.io.plugins import read_terms
from declip.recipe.checks import as_list
from declip.recipe.load import flat, load_recipe
from declip.recipe.schema import Recipe

BUDGETS = ("samples", "compute")
"""Equal samples: every recipe takes its train.steps. Equal compute: the steps that fit into the first recipe's time."""
BASELINES = ("clip", "few-clip", "demo-clip", "demo-few-clip")


@dataclass(frozen=True)
class Variant:
    """One recipe of a comparison, with a unique name that is also part of folder names."""

    name: str
    recipe: str  # a shipped recipe's name or a YAML file
    overrides: Mapping[str, Any]
    # As it was when it joined; the recipe's file may change later
    resolved: Mapping[str, Any] = field(repr=False)
    steps: int  # of one run: train.steps or, at equal compute, those that fit into the budget
    seconds: float | None = None  # per step, measured at equal compute

    @classmethod
    def of(cls, recipe: str, overrides: Mapping[str, Any]) -> Self:
        """Resolve a recipe into a variant named after its file."""
        name = re.sub(r".*[/\\]|\.ya?ml$", "", recipe)
        resolved = load_recipe(recipe, overrides)
        return cls(name, recipe, overrides, resolved.model_dump(mode="json"), resolved.train.steps)

    @property
    def samples(self) -> int:
        """Number of pairs that one run sees, repetitions included."""
        return self.steps * self.resolved["train"]["batch_size"]

    def resolve(self, more: Mapping[str, Any] | None = None) -> Recipe:
        """Load the recipe with the overrides and further ones; refuse one that changed since the variant joined."""
        changed = self.changes(Variant.of(self.recipe, self.overrides))
        if changed:
            raise UserError(
                f"The recipe '{self.recipe}' has changed since the comparison began: {changed}."
            )
        return load_recipe(self.recipe, {**self.overrides, **(more or {})})

    def changes(self, now: "Variant") -> str:
        """List up to three keys whose values differ in `now`, with both values."""
        before = flat(self.resolved)
        after = flat(now.resolved)
        keys = [key for key in before | after if before.get(key) != after.get(key)]
        return "; ".join(f"{key} was {before.get(key)}, now {after.get(key)}" for key in keys[:3])


@dataclass(frozen=True)
class Trial:
    """One training run and the evaluation after it; the seed selects the distinct training pairs."""

    variant: str
    pairs: int
    seed: int

    @property
    def id(self) -> str:
        """Name of its folder: unique, and the same in every process."""
        return re.sub(r"[^\w.+=,-]+", "-", f"{self.variant}_n{self.pairs}_s{self.seed}")


@dataclass(frozen=True)
class Study:
    """A comparison of variants. `Study.of` builds one from recipes; `runner.run` checks and runs it."""

    variants: tuple[Variant, ...]
    pairs: tuple[int, ...]  # numbers of distinct pairs, ascending
    seeds: tuple[int, ...]
    datasets: tuple[str, ...]  # evaluation sets; the first one is the headline
    tasks: tuple[str, ...]
    budget: str = "samples"
    terms_file: str = ""  # name and hash of the file that has them
    terms: Mapping[str, Any] = field(default_factory=dict, compare=False)  # of the caller, by name

    # A setting of another version that this one would ignore makes other results.
    __pydantic_config__ = ConfigDict(extra="forbid")

    @classmethod
    def of(
        cls,
        recipes: str | Path | Sequence[str | Path],
        pairs: int | Sequence[int],
        seeds: int | Sequence[int] = 3,
        *,
        overrides: Mapping[str, Any] | None = None,
        datasets: str | Path | Sequence[str | Path] = (),
        tasks: str | Sequence[str] = ("zero-shot",),
        budget: str = "samples",
    ) -> Self:
        """Build a study; arguments as `declip.compare`."""
        if isinstance(seeds, int):
            seeds = range(seeds)
        numbers = tuple(map(int, seeds))
        variants = tuple(
            Variant.of(str(recipe), dict(overrides or {})) for recipe in as_list(recipes)
        )
        counts = tuple(sorted({*map(int, as_list(pairs))}))
        names = tuple(as_list(tasks))
        if not (variants and counts and numbers and names):
            raise UserError(
                "A comparison needs at least one recipe, one number of pairs, one seed and one task. Example: "
                "declip compare few-clip few-declip --pairs 1k,4k."
            )
        first = variants[0].resolve().evaluation
        return cls(
            variants=variants,
            pairs=counts,
            seeds=numbers,
            datasets=tuple(map(str, as_list(datasets))) or first.final_zero_shot or first.zero_shot,
            tasks=names,
            budget=budget,
        )

    def with_terms(self, terms: Mapping[str, Any] | str | Path | None) -> Self:
        """Add losses by name, or those of a Python file."""
        if terms is None or isinstance(terms, Mapping):
            return replace(self, terms=terms or {})
        path = Path(terms).expanduser()
        found = read_terms(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        return replace(self, terms=found, terms_file=f"{path.name} ({digest})")

    def to_dict(self) -> dict[str, Any]:
        """The study for JSON, without the losses, which are code."""
        tree = asdict(replace(self, terms={}))
        del tree["terms"]
        return tree

    @property
    def names(self) -> list[str]:
        """Names of the variants."""
        return [variant.name for variant in self.variants]

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with: one of `BASELINES` if present, else the first."""
        return next((name for name in BASELINES if name in self.names), self.names[0])

    def variant(self, name: str) -> Variant:
        """The variant with this name."""
        return next(variant for variant in self.variants if variant.name == name)

    def trials(self) -> list[Trial]:
        """All trials, seed by seed, so that an unfinished study is a smaller complete one."""
        return [
            Trial(name, pairs, seed)
            for seed, pairs, name in product(self.seeds, self.pairs, self.names)
        ]

    def check_names(self) -> None:
        """Refuse variants with the same name, or with names that become the same folder."""
        ids = [Trial(name, 0, 0).id for name in self.names]
        twice = [name for name, id in zip(self.names, ids, strict=True) if ids.count(id) > 1]
        if twice:
            raise UserError(
                f"Recipes need different names, also as folders: {', '.join(twice)}. Rename one file."
            )


def read_study(folder: Path) -> Study | None:
    """Read the study of a folder, None if there is none; refuse one that is damaged or of another version."""
    path = folder / STUDY_FILE
    if not path.is_file():
        return None
    try:
        return TypeAdapter(Study).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise UserError(
            f"'{path}' is not a comparison of this version of declip: {problem}. "
            "Choose another folder with --out."
        ) from error


def extend_study(study: Study, folder: Path) -> Study:
    """Add the variants, pairs and seeds of a new call to the study in a folder, if there is one."""
    earlier = read_study(folder)
    if earlier is None:
        return study
    # Anything else would change the meaning of earlier trials.
    changed = []
    for name in ("datasets", "tasks", "budget"):
        before = getattr(earlier, name)
        now = getattr(study, name)
        if now != before:
            changed.append(f"{name} was {before}, now {now}")
    if earlier.terms_file and study.terms_file not in ("", earlier.terms_file):
        changed.append(f"the losses were {earlier.terms_file}, now {study.terms_file}")
    variants = {variant.name: variant for variant in earlier.variants}
    for variant in study.variants:
        known = variants.get(variant.name, variant)
        keys = known.changes(variant)
        if keys:
            changed.append(f"{variant.name}: {keys}")
        # Its file may have moved; what was measured stays.
        variants[variant.name] = replace(variant, steps=known.steps, seconds=known.seconds)
    if changed:
        raise UserError(
            f"'{folder}' has another comparison: {'; '.join(changed[:4])}. Use the same options, or another --out."
        )
    return replace(
        earlier,
        variants=tuple(variants.values()),
        pairs=tuple(sorted({*earlier.pairs, *study.pairs})),
        seeds=tuple(sorted({*earlier.seeds, *study.seeds})),
        terms_file=study.terms_file or earlier.terms_file,
        terms=study.terms,
    )
