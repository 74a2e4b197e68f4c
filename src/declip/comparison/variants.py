"""The variants of a comparison: recipes with overrides, and the ablation made from one recipe."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from declip.errors import UserError
from declip.recipe.load import flat, load_recipe
from declip.recipe.schema import Recipe

STEPS: tuple[tuple[str, ...], ...] = (
    ("contrastive",),
    ("multi_view",),
    ("simsiam", "masked_language"),
    ("nearest_neighbor",),
)
"""Losses that each step of the paper's ablation on CC3M adds (Li et al. 2022, arXiv 2110.05208)."""

STEP, LEFT_OUT = "step", "left out"
"""Groups of variants that were made from a recipe; a recipe that the user named is in group ""."""


@dataclass(frozen=True)
class Variant:
    """One recipe of a comparison, by a unique name that is also a part of folder names."""

    name: str
    recipe: str  # a shipped recipe's name or a YAML file
    overrides: Mapping[str, Any]
    resolved: Mapping[str, Any] = field(repr=False)  # the whole when it joined the comparison; its file may be edited
    group: str = ""  # or how it was made: `STEP` or `LEFT_OUT`
    label: str = ""  # name within its group

    @classmethod
    def of(cls, name: str, recipe: str, overrides: Mapping[str, Any], group: str = "", label: str = "") -> Self:
        """Resolve a recipe into a variant."""
        resolved = load_recipe(recipe, overrides).model_dump(mode="json")
        return cls(name, recipe, overrides, resolved, group, label or name)

    @property
    def losses(self) -> dict[str, float]:
        """Weights of the active losses."""
        return {name: weight for name, weight in self.resolved["loss_weights"].items() if weight > 0}

    def resolve(self, more: Mapping[str, Any] | None = None) -> Recipe:
        """Load the recipe with the overrides and further ones; refuse one that changed since the variant joined."""
        now = Variant.of(self.name, self.recipe, self.overrides)
        if changed := self.changes(now):
            raise UserError(f"The recipe '{self.recipe}' has changed since the comparison began: {'; '.join(changed)}.")
        return load_recipe(self.recipe, {**self.overrides, **(more or {})})

    def changes(self, now: "Variant") -> list[str]:
        """Name at most three keys whose values differ in `now`, with both values."""
        before, after = flat(self.resolved), flat(now.resolved)
        keys = [key for key in before | after if before.get(key) != after.get(key)]
        return [f"{key} was {before.get(key)}, now {after.get(key)}" for key in keys[:3]]


def variants_of(recipes: Iterable[str], overrides: Mapping[str, Any], ablation: bool = False) -> list[Variant]:
    """Make the variants of a comparison, no two with the same name; `ablation` takes the last recipe apart too."""
    variants = [Variant.of(re.sub(r".*[/\\]|\.ya?ml$", "", recipe), recipe, overrides) for recipe in recipes]
    if not variants:
        raise UserError("No recipe was given to compare. Example: declip compare clip declip --pairs 1k,4k.")
    variants += ablation_of(variants[-1]) if ablation else []
    if twice := [name for name, count in Counter(variant.name for variant in variants).items() if count > 1]:
        raise UserError(f"Compared twice: {', '.join(twice)}. Give each recipe once, under a name of its own.")
    return variants


def ablation_of(whole: Variant) -> list[Variant]:
    """Make the paper's ablation of a recipe: losses added step by step, and the recipe without each of them.

    Weights keep the recipe's ratios. Two variants with the same losses are one, so that none is trained twice.
    """
    weights = whole.losses
    steps = [step for group in STEPS if (step := tuple(loss for loss in group if loss in weights))]
    if len(steps) < 2 or "contrastive" not in weights:
        raise UserError(
            f"'{whole.name}' has only the losses {', '.join(weights)}, so --ablation has no steps to show. Give a "
            "recipe such as declip last."
        )
    parts, kept = list[tuple[str, str, str, set[str]]](), set[str]()
    for step in steps[:-1]:
        kept = kept | {*step}
        label = "clip" if step == ("contrastive",) else f"+{' +'.join(step)}"
        parts.append((f"step {label}", STEP, label, kept))
    parts += [(f"without {loss}", LEFT_OUT, loss, {*weights} - {loss}) for loss in weights if loss != "contrastive"]
    made: dict[frozenset[str], Variant] = {}
    for name, group, label, kept in parts:
        losses = {loss: weight for loss, weight in weights.items() if loss in kept}
        overrides = {**whole.overrides, "loss_weights": losses}
        made.setdefault(frozenset(losses), Variant.of(name, whole.recipe, overrides, group, label))
    return list(made.values())
