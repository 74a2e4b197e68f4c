"""The variants of a comparison: recipes with overrides, and the ablation and the baselines made from one recipe."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from declip.errors import UserError
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.runs.folder import flat

STEPS: tuple[tuple[str, ...], ...] = (
    ("contrastive",),
    ("multi_view",),
    ("simsiam", "masked_language"),
    ("nearest_neighbor",),
)
"""Losses that each step of the paper's ablation on CC3M adds (Li et al. 2022, arXiv 2110.05208)."""

STEP, LEFT_OUT, BASELINE = "step", "left out", "baseline"
"""Groups of variants that were made from a recipe; a recipe that the user named is in group ""."""

CONTRASTIVE_ONLY = {"loss_weights": {"contrastive": 1.0}}

BASELINES: Mapping[str, Mapping[str, Any]] = {
    # CLIP's own augmentation is a random crop alone (Radford et al. 2021, section 2.5).
    "weak views": {
        **CONTRASTIVE_ONLY,
        "views.image.scale": [0.9, 1.0],
        "views.image.color_jitter_prob": 0.0,
        "views.image.grayscale_prob": 0.0,
        "views.image.blur_prob": 0.0,
        "views.image.hflip_prob": 0.0,
    },
    "same views": CONTRASTIVE_ONLY,
    # MoCo v2's (arXiv 2003.04297), which DeCLIP uses.
    "strong views": {
        **CONTRASTIVE_ONLY,
        "views.image.scale": [0.2, 1.0],
        "views.image.color_jitter": [0.4, 0.4, 0.4, 0.1],
        "views.image.color_jitter_prob": 0.8,
        "views.image.grayscale_prob": 0.2,
        "views.image.blur_prob": 0.5,
        "views.image.hflip_prob": 0.5,
    },
    "two views": {"loss_weights": {"contrastive": 0.25, "multi_view": 0.75}, "views.text.second_view": "same"},
}
"""Overrides that make plain CLIP of a recipe with the same towers."""


@dataclass(frozen=True)
class Variant:
    """One recipe of a comparison, by a unique name that is also a part of folder names.

    Attributes:
        recipe: A shipped recipe's name or a YAML file.
        resolved: The whole recipe when the variant joined the comparison; its file may be edited later.
        group: "", or how it was made: `STEP`, `LEFT_OUT` or `BASELINE`.
        label: Name within its group.
    """

    name: str
    recipe: str
    overrides: Mapping[str, Any]
    resolved: Mapping[str, Any] = field(repr=False)
    group: str = ""
    label: str = ""

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


def variants_of(
    recipes: Iterable[str], overrides: Mapping[str, Any], *, ablation: bool = False, baselines: bool = False
) -> list[Variant]:
    """Make the variants of a comparison, no two with the same name, with `ablation_of` and `baselines_of` the last."""
    variants = [Variant.of(re.sub(r".*[/\\]|\.ya?ml$", "", recipe), recipe, overrides) for recipe in recipes]
    if not variants:
        raise UserError("No recipe was given to compare. Example: declip compare clip declip --pairs 1k,4k.")
    last = variants[-1]
    variants += ablation_of(last) if ablation else []
    variants += baselines_of(last) if baselines else []
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
    made: dict[frozenset[str], Variant] = {}

    def add(name: str, kept: Iterable[str], group: str, label: str) -> None:
        losses = {loss: weights[loss] for loss in weights if loss in set(kept)}
        overrides = {**whole.overrides, "loss_weights": losses}
        if frozenset(losses) not in made:
            made[frozenset(losses)] = Variant.of(name, whole.recipe, overrides, group, label)

    kept: list[str] = []
    for step in steps[:-1]:
        kept += step
        label = "clip" if step == ("contrastive",) else f"+{' +'.join(step)}"
        add(f"step {label}", kept, STEP, label)
    for left_out in weights:
        if left_out != "contrastive":
            add(f"without {left_out}", [loss for loss in weights if loss != left_out], LEFT_OUT, left_out)
    return list(made.values())


def baselines_of(whole: Variant) -> list[Variant]:
    """Make plain CLIP on the towers of a recipe with weaker, equal and stronger views, and with two views."""
    return [
        Variant.of(f"clip, {label}", whole.recipe, {**whole.overrides, **changes}, BASELINE, label)
        for label, changes in BASELINES.items()
    ]
