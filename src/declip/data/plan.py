"""The views of a pair that the losses of a recipe need."""

from collections.abc import Sequence
from dataclasses import dataclass

from declip.data.batch import Needs
from declip.data.images.views import ViewTransform
from declip.errors import UserError
from declip.recipe.schema import Recipe, TextView, Train

MASK_PROBABILITY = 0.15  # fraction of the tokens that are masked or replaced, as in BERT


@dataclass(frozen=True)
class Plan:
    """All views of a pair, in the order in which their random numbers are sampled, and the image statistics."""

    views: tuple[ViewTransform, ...]
    texts: int  # number of text views
    text: TextView
    mask_probability: float | None  # None: the caption is not masked
    # Whether texts are padded to the longest possible caption, since padding counts
    whole_context: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    length_step: int = 8  # the length of a batch of texts is a multiple of it
    duplicates: bool = False  # whether a batch has `duplicate_ids`


def length_step(train: Train) -> int:
    """The multiple that texts are padded to: twice as large where each length is compiled."""
    return 16 if train.compile else 8


def plan_views(recipe: Recipe, needs: Sequence[Needs]) -> Plan:
    """Derive the views that the losses of a recipe need."""
    wanted = set[str]()
    for need in needs:
        wanted |= need.views | need.optional_views
    size = recipe.image.size
    views = recipe.views
    interpolation = recipe.image.interpolation
    if not views.image_second:
        if any("second" in need.views for need in needs):
            raise UserError(
                "With views.image_second=false no loss can compare two views. Set their weights to 0."
            )
        wanted.discard("second")
    names = ["first"]
    if "second" in wanted:
        names.append("second")
    specs = [ViewTransform(name, size, views.image, interpolation) for name in names]
    if views.contrastive_view is not None:
        # Losses that compare augmented views keep theirs; without one of them only this view is made.
        mild = ViewTransform("contrastive", size, views.contrastive_view, interpolation)
        if "second" not in wanted:
            specs = []
        specs = [mild, *specs]
    masked = any(need.masked for need in needs) or bool(views.text.mask)
    return Plan(
        views=tuple(specs),
        texts=max(need.texts for need in needs),
        text=views.text,
        mask_probability=MASK_PROBABILITY if masked else None,
        whole_context=any(need.whole_context for need in needs),
        length_step=length_step(recipe.train),
        duplicates=recipe.contrastive.duplicates == "mask",
        mean=recipe.image.mean,
        std=recipe.image.std,
    )
