"""Load a recipe: YAML that may extend another recipe, with single keys overridden by their dotted names."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from declip.errors import UserError, unknown
from declip.io.plugins import plugin_recipe, plugins
from declip.io.yaml_dialect import read_yaml
from declip.recipe.schema import Data, Recipe

LIBRARY = Path(__file__).parent / "library"
WHOLE = ("loss_weights", "model_kwargs")  # sections that a recipe replaces


def recipe_names() -> list[str]:
    """Names of the shipped recipes, and of those of plugins."""
    shipped = {path.stem for path in LIBRARY.glob("[!_]*.yaml")}
    return sorted(shipped.union(plugins("recipes")))


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, the recipes that it extends, and overrides.

    The evaluation sets of a recipe belong to its ``data.source``: an override or a recipe that extends it and sets
    another source starts without evaluation sets.

    Args:
        name: Name of a shipped recipe, or the path of a YAML file.
        overrides: Dotted keys and values; `parse_overrides` reads those of a command line.

    Examples:
        >>> declip.load_recipe("demo-declip", {"train.steps": 500}).train.steps
        500
    """
    given: set[str] = set()
    # --- the file and its ancestors, then the overrides
    base = _read_tree(name, (), given)
    tree, over = dict(base), dict[str, Any]()
    for key, value in (overrides or {}).items():
        value = str(value) if isinstance(value, Path) else value
        _set(tree, key, value)
        _set(over, key, value)
        given.update(flat({key: value}))
    if _one_length(over, "the overrides"):
        _set(tree, "train.epochs", None)
    # --- every range check, and the keys that the user gave
    try:
        return Recipe.model_validate(_with_own_sets(tree, base, over), context={"given": given})
    except ValidationError as error:
        problems = " ".join(_explain(dict(problem)) for problem in error.errors())
        raise UserError(f"The recipe '{name}' is not valid. {problems}") from error


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` words of the command line, whose values are YAML; raises `UserError` if they cannot be."""
    values = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise UserError(
                f"Cannot read the override '{word}'. Write key=value last, such as train.steps=500."
            )
        values[key.strip()] = read_value(key.strip(), value)
    return values


def read_value(key: str, value: str) -> Any:
    """Read the value of a key on the command line; raises `UserError` if it is not valid YAML."""
    if key == "data.columns.caption" and "{" in value and value.lstrip()[0] not in "[\"'":
        return value  # a template, which YAML may read as a mapping or a comment
    try:
        return read_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"'{key}={value}' is not valid YAML: close its brackets or quote the value."
        ) from error


def _read_tree(name: str | Path, seen: tuple[str, ...], given: set[str]) -> dict[str, Any]:
    """Merge a recipe over its ancestors, and add the keys of the user's own files to `given`."""
    path = _find(name, Path(seen[-1]).parent if seen else Path())
    label = path.stem if path.parent == LIBRARY else str(path)
    if label in seen:
        raise UserError(f"The recipe '{label}' extends itself: {' → '.join((*seen, label))}.")
    try:
        tree = deepcopy(_parsed(path.read_text(encoding="utf-8"))) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe '{label}' is not valid YAML in UTF-8: {error}") from error
    parent = tree.pop("extends", None) if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or not isinstance(parent, str | None):
        raise UserError(
            f"The recipe '{label}' must map keys to values, and `extends` to a recipe's name or file."
        )
    steps_alone = _one_length(tree, f"the recipe '{label}'")
    if path.parent != LIBRARY:
        given.update(flat(tree))
    tree.setdefault("name", Path(label).stem)
    if parent is None:
        return tree
    base = _read_tree(parent, (*seen, label), given)
    if steps_alone:
        _set(tree, "train.epochs", None)
    return _with_own_sets(_merge(base, tree), base, tree)


_parsed = lru_cache(maxsize=64)(read_yaml)  # 10 ms a file, which recipes that extend it read again


def _one_length(tree: Mapping[str, Any], where: str) -> bool:
    """Whether a part of a recipe gives train.steps, which replace epochs given before; both at once are refused."""
    train = tree.get("train")
    train = train if isinstance(train, Mapping) else {}
    if "steps" in train and train.get("epochs") is not None:
        raise UserError(
            f"train.steps={train['steps']} and train.epochs={train['epochs']} of {where}: give one."
        )
    return "steps" in train


def _find(name: str | Path, folder: Path) -> Path:
    """A YAML file, also one relative to the file that extends it, or a shipped recipe by its name."""
    path = Path(name).expanduser()
    own = path.suffix in {".yaml", ".yml"}
    for candidate in (path, folder / path) if own else (LIBRARY / f"{name}.yaml",):
        if candidate.is_file():
            return candidate
    if shipped := plugin_recipe(str(name)):
        return shipped
    if path.exists():
        raise UserError(
            f"'{name}' is not a recipe. Train on it with --data {name}, or: declip finetune {name}"
        )
    raise unknown("recipe file" if own else "recipe", str(name), recipe_names())


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both and key not in WHOLE else value
    return merged


def _with_own_sets(
    tree: dict[str, Any], base: Mapping[str, Any], over: Mapping[str, Any]
) -> dict[str, Any]:
    """Merged tree, without the evaluation sets of `base` where `over` names another source."""
    if _source_of(tree) == _source_of(base):
        return tree
    return {**tree, "evaluation": over.get("evaluation", {})}


def _source_of(tree: Mapping[str, Any]) -> Any:
    data = tree.get("data")
    given = data if isinstance(data, Mapping) else {}
    return given.get("source", Data.model_fields["source"].default)


def flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Give the values of a tree, such as a recipe's, by dotted key."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        is_section = isinstance(value, dict) and value
        values |= flat(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return values


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = tree.get(parent)
        tree[parent] = dict(child) if isinstance(child, Mapping) else {}
        tree = tree[parent]
    tree.update(_merge(tree, {last: value}))  # a section given whole is merged, as a file's is


def _explain(problem: Mapping[str, Any]) -> str:
    key = ".".join(map(str, problem["loc"])).removesuffix(".[key]")
    if problem["type"] == "extra_forbidden":
        if key in recipe_keys():
            nested = key.replace(".", ": {") + ": …" + "}" * key.count(".")
            return f"In a file keys are nested: write {nested} instead of {key}."
        return str(unknown_key(key))
    if problem["type"] == "model_type":
        return f"{key}={problem['input']!r}: {key} is a section; set its keys (`declip recipes show NAME`)."
    message = problem["msg"].removeprefix("Value error, ")
    where = f"{key}={problem['input']!r}: " if key and problem["type"] != "value_error" else ""
    return f"{where}{message[0].lower()}{message[1:].removesuffix('.')}."


def unknown_key(given: str) -> UserError:
    """Build the error for an unknown recipe key, with the key meant: by a name of other tools, else by letters."""
    name = given.rpartition(".")[2].lower().replace("-", "_")
    keys = list(recipe_keys())
    # --- keys by the last part of their names, in our words and in those of other tools
    meant: dict[str, set[str]] = {}
    for key in keys:
        meant.setdefault(key.rpartition(".")[2], set()).add(key)
    for key, words in synonyms().items():
        meant |= {word: {key} for word in words.split()}
    # --- by that part, then by letters
    candidates = meant.get(name, set())
    if not candidates:
        nearest = get_close_matches(given, keys, n=1, cutoff=0.85)
        nearest = nearest or get_close_matches(name, meant, n=1, cutoff=0.8)
        for word in nearest:
            candidates = meant.get(word, {word})
    if len(candidates) == 1:
        return UserError(
            f"Unknown recipe key '{given}'. Did you mean '{min(candidates)}'? See `declip recipes show NAME`."
        )
    sections = Recipe.model_fields if "." not in given else ()
    return unknown("recipe key", given, {*keys, *sections})


@cache
def synonyms() -> dict[str, str]:
    """Read the names that other tools have for recipe keys, by key."""
    path = LIBRARY.parent / "synonyms.yaml"
    table: dict[str, str] = yaml.safe_load(path.read_text("utf-8"))
    return table


def recipe_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Dotted names of all recipe keys; `loss_weights` is one."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from recipe_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name
