"""What is compared: recipes, and the ladders that take one recipe apart."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from declip.errors import UserError
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.runs.folder import flat

RUNGS: tuple[tuple[str, ...], ...] = (
    ("contrastive",),
    ("multi_view",),
    ("simsiam", "masked_language"),
    ("nearest_neighbor",),
)
"""What each rung of the paper's ablation adds (Li et al. 2022, arXiv 2110.05208, the ablation on CC3M)."""

WEAK_VIEWS = {"scale": [0.9, 1.0], "color_jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": 0.0, "hflip_prob": 0.0}
"""CLIP's own augmentation: a random crop and nothing else (Radford et al. 2021, section 2.5), of at least 0.9 here."""

STRONG_VIEWS = {
    "scale": [0.2, 1.0],
    "jitter": [0.4, 0.4, 0.4, 0.1],
    "color_jitter_prob": 0.8,
    "grayscale_prob": 0.2,
    "blur_prob": 0.5,
    "hflip_prob": 0.5,
}
"""MoCo v2's (arXiv 2003.04297), which DeCLIP uses."""


@dataclass(frozen=True)
class Arm:
    """A recipe as it takes part.

    Attributes:
        name: Shown in tables; letters, digits and signs that a folder's name may have.
        recipe: A shipped recipe's name or a YAML file.
        overrides: Dotted keys and values.
        resolved: What they were when the arm joined a comparison: a recipe's file may be edited later. None: not kept.
    """

    name: str
    recipe: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] | None = None

    def resolve(self, more: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe with the overrides and some more.

        Raises:
            UserError: as `load_recipe`, or the recipe is no longer what it was when the arm joined.
        """
        if self.resolved is not None and (changed := self.changes(self.pinned())):
            raise UserError(f"The recipe '{self.recipe}' has changed since the comparison began: {'; '.join(changed)}.")
        return load_recipe(self.recipe, {**self.overrides, **(more or {})})

    def pinned(self) -> "Arm":
        """The same arm with its recipe as it resolves now."""
        recipe = load_recipe(self.recipe, self.overrides)
        return replace(self, resolved=recipe.model_dump(mode="json"))

    def changes(self, now: "Arm") -> list[str]:
        """The keys whose values are others in `now`, at most three, with both values."""
        if self.resolved is None:
            return ["its recipe was not kept"]
        before, after = flat(self.resolved), flat(now.resolved or {})
        keys = [key for key in before | after if before.get(key) != after.get(key)]
        return [f"{key} was {before.get(key)}, now {after.get(key)}" for key in keys[:3]]


def arms_of(
    recipes: Iterable[str], overrides: Mapping[str, Any], *, ladder: bool = False, baselines: bool = False
) -> list[Arm]:
    """The arms of a comparison, no two with the same name.

    Args:
        recipes: Shipped recipes' names or YAML files.
        overrides: For all of them.
        ladder: Also take the last recipe apart: its terms added one after the other, and each left out.
        baselines: Also `clip` with weaker and stronger views and with two views, on the last recipe's towers.

    Raises:
        UserError: no recipe, the same one twice, or one that cannot be read.
    """
    named = [Arm(_label(recipe), recipe, overrides) for recipe in recipes]
    if not named:
        raise UserError("No recipe was given to compare. Example: declip compare clip declip --pairs 1k,4k.")
    last = named[-1]
    named += ladder_of(last) if ladder else []
    named += baselines_of(last) if baselines else []
    names = [arm.name for arm in named]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"Compared twice: {', '.join(sorted(twice))}. Give each recipe once, under a name of its own.")
    return [arm.pinned() for arm in named]


def ladder_of(arm: Arm) -> list[Arm]:
    """The paper's ablation of a recipe: terms added rung by rung, and the whole without each.

    Weights keep the recipe's ratios; where `multi_view` is missing, `contrastive` is what is left of the pairings.

    Raises:
        UserError: the recipe has fewer than two of the rungs' terms.
    """
    whole = dict(arm.resolve().active_losses)
    rungs = [tuple(term for term in rung if term in whole) for rung in RUNGS]
    rungs = [rung for rung in rungs if rung]
    if len(rungs) < 2 or "contrastive" not in whole:
        raise UserError(f"'{arm.name}' has only {', '.join(whole)}: there is no ladder to climb. Give a DeCLIP recipe.")
    steps: list[Arm] = []
    kept: list[str] = []
    for rung in rungs[:-1]:
        kept += rung
        name = "ladder clip" if rung == ("contrastive",) else f"ladder +{' +'.join(rung)}"
        steps.append(_with_weights(arm, name, {term: whole[term] for term in kept}))
    for term in whole:
        if term != "contrastive":
            rest = {name: weight for name, weight in whole.items() if name != term}
            steps.append(_with_weights(arm, f"without {term}", rest))
    distinct: dict[tuple[tuple[str, float], ...], Arm] = {}
    for step in steps:
        distinct.setdefault(tuple(sorted(step.overrides["loss_weights"].items())), step)
    return list(distinct.values())


def baselines_of(arm: Arm) -> list[Arm]:
    """Plain CLIP on the towers of a recipe, as strong as it can be made: views weaker, equal, stronger, and doubled."""
    clip = {"loss_weights": {"contrastive": 1.0}}

    def views(image: Mapping[str, Any]) -> dict[str, Any]:
        return {f"views.image.{key}": value for key, value in image.items()}

    two = {"loss_weights": {"contrastive": 0.25, "multi_view": 0.75}, "views.text.second_view": "same"}
    return [
        Arm("clip, weak views", arm.recipe, {**arm.overrides, **clip, **views(WEAK_VIEWS)}),
        Arm("clip, same views", arm.recipe, {**arm.overrides, **clip}),
        Arm("clip, strong views", arm.recipe, {**arm.overrides, **clip, **views(STRONG_VIEWS)}),
        Arm("clip, two views", arm.recipe, {**arm.overrides, **two}),
    ]


def _with_weights(arm: Arm, name: str, weights: Mapping[str, float]) -> Arm:
    return Arm(name, arm.recipe, {**arm.overrides, "loss_weights": dict(weights)})


def _label(recipe: str) -> str:
    return recipe.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")
