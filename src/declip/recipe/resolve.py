"""Resolve a recipe: one table of the keys whose values follow from facts, applied once before a run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from declip.errors import UserError
from declip.recipe.load import flat
from declip.recipe.schema import ImageTowerConfig, LogitScale, Recipe, TextTowerConfig

DROP_RATES = ("drop_rate", "drop_path_rate")  # ends of the names of timm's arguments
USER_IMAGE = ("size", "mean", "std", "interpolation", "crop_pct")
"""Keys of preprocessing that a user may set although weights have them."""


LoadedWeights = Any
"""`declip.interchange.weights.Weights`, of which rules read `recipe`, `tensors`, `has_text` and `origin`."""


class Facts(NamedTuple):
    """What is known of a run before it begins; rules of a fact that is None leave their keys as they are."""

    weights: LoadedWeights | None = None  # pretrained
    precision: str | None = None  # that "auto" means
    pairs: int | None = None  # number of training pairs
    sets: Mapping[str, tuple[str, ...]] | None = None  # evaluation.val by the key of their task


def resolve(recipe: Recipe, facts: Facts) -> Recipe:
    """Apply the rules of all facts that are known; keys of the user that weights decide otherwise are refused."""
    values = {}
    for key, (name, rule) in RULES.items():
        fact = getattr(facts, name)
        if fact is not None:
            values[key] = rule(recipe, fact)
    resolved = recipe.with_keys(values)
    if facts.weights is not None:
        _refuse_overruled(recipe, resolved, facts.weights.origin)
    return resolved


def _refuse_overruled(recipe: Recipe, resolved: Recipe, origin: str) -> None:
    decided = {key for key, (name, _) in RULES.items() if name == "weights"}
    asked, becomes = flat(recipe.model_dump()), flat(resolved.model_dump())
    # The recipe of a run contains the default scale
    usual = ("logit_scale.init", LogitScale().init)
    overruled = []
    for key in sorted(recipe.given & asked.keys()):
        differs = asked[key] != becomes.get(key) and (key, asked[key]) != usual
        if differs and key.partition(".")[0] in decided:
            overruled.append(f"{key}={asked[key]} (becomes {becomes.get(key)})")
    if overruled:
        raise UserError(
            f"The weights of '{origin}' determine keys; leave them out: {', '.join(overruled)}."
        )


# --- by pretrained weights: architecture, preprocessing, tokenizer and scales are theirs


def _image(recipe: Recipe, weights: LoadedWeights) -> ImageTowerConfig:
    theirs, asked = weights.recipe.image, recipe.image
    keep: dict[str, Any] = {"freeze_patch_embed": asked.freeze_patch_embed}
    for name in USER_IMAGE:
        if f"image.{name}" in recipe.given:
            keep[name] = getattr(asked, name)
    # Rates of dropout, such as patch_drop_rate, change no weights.
    rates = {name: rate for name, rate in asked.model_kwargs.items() if name.endswith(DROP_RATES)}
    keep["model_kwargs"] = theirs.model_kwargs | rates
    return theirs.model_copy(update=keep)


def _of_text(recipe: Recipe, weights: LoadedWeights) -> Recipe:
    """The recipe that decides the text tower: that of the weights, if they have one."""
    own: Recipe = weights.recipe if weights.has_text else recipe
    return own


def _text(recipe: Recipe, weights: LoadedWeights) -> TextTowerConfig:
    text = _of_text(recipe, weights).text
    if "text.context_length" in recipe.given:
        return text.model_copy(update={"context_length": recipe.text.context_length})
    return text


def _logit_scale(recipe: Recipe, weights: LoadedWeights) -> LogitScale:
    limits = recipe.logit_scale
    if not weights.has_text:
        return limits
    init = float(weights.tensors["logit_scale"])
    return limits.model_copy(update={"init": init, "max": max(limits.max, init)})


def _logit_bias(recipe: Recipe, weights: LoadedWeights) -> float | None:
    bias = weights.tensors.get("logit_bias")
    return recipe.logit_bias if bias is None else float(bias)


def _loss_weights(recipe: Recipe, weights: LoadedWeights) -> dict[str, float]:
    """The sigmoid loss for weights that were trained with a bias of the logits, unless the user chose the losses."""
    asked = any(key.startswith("loss_weights") for key in recipe.given)
    if asked or "logit_bias" not in weights.tensors:
        return recipe.loss_weights
    names = {"contrastive": "sigmoid"}
    return {names.get(name, name): weight for name, weight in recipe.loss_weights.items()}


# --- by the device, the number of pairs, and the held-out sets


def _precision(recipe: Recipe, auto: str) -> str:
    given = recipe.train.precision
    return auto if given == "auto" else given


def steps_of(epochs: float, per_epoch: int) -> int:
    """Number of steps of epochs of complete batches."""
    return max(1, round(epochs * max(1, per_epoch)))


def _steps(recipe: Recipe, pairs: int) -> int:
    train = recipe.train
    if train.epochs is None:
        return train.steps
    return steps_of(train.epochs, pairs // train.batch_size)


def _both(listed: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(listed + more))


RULES: Mapping[str, tuple[str, Callable[[Recipe, Any], Any]]] = {
    "image": ("weights", _image),
    "text": ("weights", _text),
    "embed_dim": ("weights", lambda recipe, weights: _of_text(recipe, weights).embed_dim),
    "logit_scale": ("weights", _logit_scale),
    "logit_bias": ("weights", _logit_bias),
    "loss_weights": ("weights", _loss_weights),
    "train.precision": ("precision", _precision),
    "train.steps": ("pairs", _steps),
    "train.epochs": ("pairs", lambda recipe, pairs: None),
    "evaluation.zero_shot": (
        "sets",
        lambda recipe, sets: _both(recipe.evaluation.zero_shot, sets["zero_shot"]),
    ),
    "evaluation.retrieval": (
        "sets",
        lambda recipe, sets: _both(recipe.evaluation.retrieval, sets["retrieval"]),
    ),
    "evaluation.val": ("sets", lambda recipe, sets: ()),
}
"""Key → the name of the fact that decides it, and the rule of the recipe and this fact."""
