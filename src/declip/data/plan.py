"""The views of a training pair: a recipe and the needs of its losses become view and text specifications, once."""

from collections.abc import Iterable
from dataclasses import dataclass

from declip.errors import UserError
from declip.recipe.schema import ImageView, Recipe, TextView

# Fraction of the tokens that are masked or replaced, as in BERT.
MASK_PROBABILITY = 0.15


@dataclass(frozen=True)
class Needs:
    """The parts of a batch that a loss reads."""

    views: frozenset[str] = frozenset({"first"})  # image views that it cannot do without
    optional_views: frozenset[str] = frozenset()  # those that it also uses where the recipe has them
    texts: int = 1  # number of text views
    masked: bool = False  # whether it predicts masked tokens
    tokens: bool = False  # whether it reads token states of both towers
    pre_logits: bool = False  # whether it reads the pooled image feature before the projection
    whole_context: bool = False  # whether padding counts, so that captions are padded to the longest possible one


@dataclass(frozen=True)
class ViewSpec:
    """One image view: its name, its size in pixels and its augmentation."""

    name: str
    size: int
    augmentation: ImageView


@dataclass(frozen=True)
class TextSpec:
    """The text views: how many, how they are augmented, how the caption is masked (None: not at all)."""

    count: int
    augmentation: TextView
    mask_probability: float | None
    whole_context: bool = False  # whether texts are padded to the longest possible caption, since padding counts


@dataclass(frozen=True)
class Plan:
    """All views of a pair, in the order in which their random numbers are sampled, and the image statistics."""

    views: tuple[ViewSpec, ...]
    texts: TextSpec
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def plan_views(recipe: Recipe, needs: Iterable[Needs]) -> Plan:
    """Derive the views that the losses of a recipe need."""
    needs = list(needs)
    wanted: set[str] = set().union(*(need.views | need.optional_views for need in needs))
    size, views = recipe.image.size, recipe.views
    if not views.image_second:
        if any("second" in need.views for need in needs):
            raise UserError(
                "A loss of this recipe compares two image views, and views.image_second=false leaves one. Leave it "
                "out, or set the loss's weight to 0."
            )
        wanted.discard("second")
    specs = [ViewSpec(name, size, views.image) for name in ("first", "second") if name == "first" or name in wanted]
    if views.contrastive_view is not None:
        # Losses that compare augmented views keep theirs; without one of them only this view is made.
        specs = [ViewSpec("contrastive", size, views.contrastive_view), *(specs if "second" in wanted else [])]
    predicts, padded = any(need.masked for need in needs), any(need.whole_context for need in needs)
    masks = predicts or bool(views.text.mask)
    texts = TextSpec(
        max(need.texts for need in needs),
        views.text,
        MASK_PROBABILITY if masks else None,
        whole_context=padded,
    )
    return Plan(tuple(specs), texts, recipe.image.mean, recipe.image.std)
