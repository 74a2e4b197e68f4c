"""Checks of the arguments of commands and of Python functions."""

import re
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from declip.errors import UserError
from declip.io.plugins import check_builtin
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.recipe.starts import STARTS, check_model


def load_for_training(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    data: str | Path | None = None,
    val: Sequence[str | Path] = (),
    resume: bool = False,
    known: Collection[str] = (),
) -> Recipe:
    """Load a recipe with its training pairs and held-out sets; weights and sources that are paths must exist.

    Sources that are `known` are open already.
    """
    if isinstance(recipe, Recipe):
        if overrides or data is not None or val:
            raise UserError(
                "overrides, data and val go with a recipe's name or file; this Recipe is resolved."
            )
        return recipe
    given = dict(overrides or {})
    if data is not None:
        given["data.source"] = str(data)
    if val:
        given["evaluation.val"] = list(dict.fromkeys(map(str, val)))
        given |= {"evaluation.zero_shot": (), "evaluation.retrieval": ()}
    loaded = load_recipe(recipe, given)
    if loaded.finetune.pretrained is not None and not resume:  # a checkpoint needs no weights
        check_model(str(loaded.finetune.pretrained))
    source = loaded.data.source
    for name in (source,) if isinstance(source, str) else source:
        if name not in known:
            check_source(name, "--data or data.source")
    for key, names in loaded.evaluation:
        for name in (name for name in names if name not in known):
            check_source(name, f"--val or evaluation.{key}")
    return loaded


def check_source(source: str, option: str) -> None:
    """Refuse a source whose path or plugin is missing; names, URLs and patterns pass."""
    if source in STARTS:
        raise UserError(
            f"'{source}' is a model, not a source ({option}). Write the model before the source."
        )
    check_builtin(source)
    if re.match(r"[\w-]{2,}:", source) or any(sign in source for sign in "*?[{"):
        return
    if not source or not Path(source).expanduser().exists():
        raise UserError(
            f"'{source}' does not exist ({option}). Give a table, a folder of images, tar shards, or builtin:emoji."
        )


def check_tasks(tasks: Collection[str], shots: object = None, templates: object = None) -> None:
    """Refuse numbers of shots and templates that the tasks of an evaluation do not use."""
    for option, given, users in (
        ("shots", shots, ("few-shot",)),
        ("templates", templates, ("zero-shot", "few-shot")),
    ):
        if given and not {*users} & {*tasks}:
            task = f"--task {' or '.join(users)}, but --task is {' '.join(tasks)}"
            raise UserError(f"--{option} requires {task}. Remove it.")


def as_list(given: Any) -> list[Any]:
    """A list of what was given, also where that is one string, path or number, or None."""
    if given is None:
        return []
    return [given] if isinstance(given, str | Path | Integral) else list(given)


def read_counts(text: str) -> tuple[int, ...]:
    """Parse "1k,2.5k,10000" into ascending distinct numbers of pairs; raises `UserError` for anything else."""
    units = {"": 1, "k": 1_000, "m": 1_000_000}
    counts = set()
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", word, re.IGNORECASE)
        if match is None or float(match[1]) == 0:
            raise UserError(
                f"'{word}' is not a number of pairs. Write numbers with commas, such as 500,1k,2.5k,1m."
            )
        counts.add(round(float(match[1]) * units[match[2].lower()]))
    return tuple(sorted(counts))
