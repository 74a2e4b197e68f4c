"""Reading a recipe: YAML with ancestors and overrides.

``extends: NAME`` starts from another recipe, ``key.sub=value`` overrides a single entry, and a key that does not exist
is an error that names the nearest one.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from declip.errors import UserError, unknown
from declip.recipe.schema import Data, Recipe

MOST_YAML, DEEPEST_YAML = 1 << 17, 20
"""Characters and levels of a recipe; ours have some 3,000 and 4."""


def read_yaml(text: str) -> Any:
    """Read YAML that may be a stranger's: no tag makes an object, and nothing stands for more than is written.

    Raises:
        YAMLError: it is no YAML, or it has aliases, of which a few lines can stand for gigabytes.
    """
    if len(text) > MOST_YAML:
        raise yaml.YAMLError(f"it has more than {MOST_YAML:,} characters")
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST_YAML:
                raise yaml.YAMLError(f"it has aliases, or more than {DEEPEST_YAML} levels; write it out")
        return yaml.safe_load(text)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:  # of a date, a number …
        raise yaml.YAMLError(str(error)) from error


def recipe_names() -> list[str]:
    """The names of the recipes that the package ships."""
    folder = resources.files("declip.recipe.library")
    names = (entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return sorted(name.removesuffix(".yaml") for name in names if not name.startswith("_"))


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, its ancestors and the overrides.

    A recipe's evaluation sets hold for its own ``data.source``: an override or a child recipe that names another source
    starts with none.

    Args:
        name: A shipped recipe's name, or the path of a YAML file.
        overrides: Dotted keys and values, such as ``{"train.steps": 500}``; a value of type str is read as YAML.

    Returns:
        The checked recipe.

    Raises:
        UserError: unknown recipe, unknown key (with the nearest name), or a value that is not allowed.
    """
    given: set[str] = set()
    base, over = _read_tree(name, (), given), dict[str, Any]()
    tree = dict(base)
    for key, value in (overrides or {}).items():
        value = read_value(key, value) if isinstance(value, str) else value
        _set(tree, key, value)
        _set(over, key, value)
        given.update(_leaves({key: value}))
    recipe = _checked(_with_own_sets(tree, base, over), str(name))
    recipe._given = frozenset(given)
    return recipe


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """Split ``key=value`` words of the command line.

    Raises:
        UserError: a word has no ``=``.
    """
    pairs = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise UserError(f"Cannot read the override '{word}'. Write key=value, for example train.steps=500.")
        pairs[key.strip()] = value
    return pairs


def read_value(key: str, value: str) -> Any:
    """Read the value of an override, which is YAML.

    Raises:
        UserError: it is none; names the key.
    """
    try:
        return read_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"Cannot read the override '{key}={value}': its value is not valid YAML. Close its brackets, or put it in "
            f"quotes twice, once for the shell: '{key}=\"…\"'."
        ) from error


def _read_tree(name: str | Path, seen: tuple[str, ...], given: set[str]) -> dict[str, Any]:
    """Read a recipe over its ancestors, and add to `given` what files of the user's say."""
    text, label = _read_text(name, Path(seen[-1]).parent if seen else None)
    if label in seen:
        raise UserError(f"The recipe '{label}' extends itself: {' → '.join((*seen, label))}.")
    try:
        tree = read_yaml(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"The recipe '{label}' is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"The recipe '{label}' must be a mapping of keys to values, not {type(tree).__name__}.")
    parent = tree.pop("extends", None)
    if not isinstance(parent, str | None):
        raise UserError(f"The recipe '{label}' has extends: {parent!r}; give one recipe's name or a YAML file.")
    if Path(label).suffix:  # shipped recipes go by their names alone
        given.update(_leaves(tree))
    tree.setdefault("name", Path(label).stem)
    if parent is None:
        return tree
    base = _read_tree(parent, (*seen, label), given)
    return _with_own_sets(_merge(base, tree), base, tree)


def _read_text(name: str | Path, beside: Path | None) -> tuple[str, str]:
    """Find a recipe by path (also beside the file that extends it) or among those shipped."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        for candidate in filter(None, (path, beside and beside / path)):
            if candidate.is_file():
                return _utf8(candidate), str(candidate)
        raise UserError(f"There is no recipe file '{path}'. Shipped recipes: {', '.join(recipe_names())}.")
    shipped = resources.files("declip.recipe.library") / f"{name}.yaml"
    if str(name) not in recipe_names() and not (beside is not None and shipped.is_file()):
        if name and path.exists():
            what = "a folder" if path.is_dir() else "a file whose name does not end in .yaml"
            raise UserError(
                f"'{name}' is {what}, not a recipe. Give a YAML file, or one of {', '.join(recipe_names())}."
            )
        raise unknown("recipe", str(name), recipe_names())
    return shipped.read_text(encoding="utf-8"), str(name)


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"The recipe '{path}' is not UTF-8 text: {error}. Save it as UTF-8.") from error


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        replace = key in {"loss_weights", "model_kwargs"}  # a recipe names its terms and its tower whole
        merged[key] = _merge(merged[key], value) if both and not replace else value
    return merged


def _with_own_sets(tree: dict[str, Any], base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `base` and `over`, without the evaluation sets of `base` where `over` brings another source."""
    return tree if _source(tree) == _source(base) else {**tree, "evaluation": over.get("evaluation", {})}


def _source(tree: Mapping[str, Any]) -> Any:
    data, default = tree.get("data"), Data.model_fields["source"].default
    return data.get("source", default) if isinstance(data, Mapping) else default


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a tree's values."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = tree.get(parent)
        tree[parent] = dict(child) if isinstance(child, Mapping) else {}
        tree = tree[parent]
    tree[last] = value


def _checked(tree: Mapping[str, Any], label: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(dict(problem)) for problem in error.errors()]
        raise UserError(f"The recipe '{label}' is not valid. " + " ".join(problems)) from error


def _explain(problem: Mapping[str, Any]) -> str:
    place = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        sections = Recipe.model_fields if len(place) == 1 else ()
        return str(unknown("recipe key", ".".join(place), {*_keys(Recipe), *sections}))
    message = problem["msg"].removeprefix("Value error, ")
    where = f"{'.'.join(place)}={problem['input']!r}: " if place and problem["type"] != "value_error" else ""
    return f"{where}{message[0].lower()}{message[1:]}."


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name
