"""Arguments of `declip.train` turned into a recipe."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any

from declip.data.pair import BrokenPair, PairSource
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe


def resolve_recipe(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    data: str | Path | None = None,
    val: str | Path | Sequence[str | Path] = (),
) -> Recipe:
    """Load a recipe with its overrides, training pairs and held-out sets, see `train`."""
    if isinstance(recipe, Recipe):
        if overrides or data is not None or val:
            raise UserError("overrides, data and val go with a recipe's name or file; this Recipe is resolved.")
        return recipe
    given = dict(overrides or {})
    if data is not None:
        given["data.source"] = json.dumps(str(data))  # quoted, because values are read as YAML
    val = several(val)
    if val:
        sets = {str(name): open_dataset(name).split("test") for name in val}
        classes = [name for name, source in sets.items() if source.labels is not None]
        captions = [name for name, source in sets.items() if has_captions(source)]
        if neither := [name for name in sets if name not in {*classes, *captions}]:
            raise UserError(f"'{neither[0]}' has neither classes nor captions, so it can't be a held-out set.")
        given |= {"evaluation.zero_shot": classes, "evaluation.retrieval": captions}
    return load_recipe(recipe, given)


def has_captions(source: PairSource, sample: int = 64) -> bool:
    """Whether any of the first pairs has a caption other than the name of its class, for retrieval."""
    for index in range(min(sample, len(source))):
        with suppress(BrokenPair):
            captions = source.captions(index)
            if source.labels is None or source.class_names is None:
                return True
            if captions != (source.class_names[source.labels[index]],):
                return True
    return False


def several(given: Any) -> list[Any]:
    """A list of what was given, also where that is one string, path or number, or None."""
    return [given] if isinstance(given, str | Path | Integral) else [] if given is None else list(given)


def held_out_sets(given: Any) -> list[Any]:
    """A list of held-out sets; a list of dicts or (image, caption) is one set."""
    one = isinstance(given, list | tuple) and any(isinstance(item, Mapping | tuple) for item in given)
    return list(given) if isinstance(given, list | tuple) and not one else [] if given is None else [given]
