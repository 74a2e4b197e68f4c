"""Plugins: losses, sources, downloads, trackers and recipes of other installed packages, by entry points."""

import runpy
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from declip.errors import UserError, unknown
from declip.io.text import one_line

Kind = Literal["losses", "sources", "downloads", "trackers", "recipes"]
BUILTIN = "builtin"  # of the sources builtin:NAME, which the package declip-sets provides


def plugins(kind: Kind) -> dict[str, EntryPoint]:
    """The entry points of the group ``declip.KIND`` by name, which must differ; no package is imported."""
    points: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=f"declip.{kind}"), key=lambda point: point.name):
        other = points.setdefault(point.name, point)
        if other.value != point.value:
            both = f"{_package(other)} and {_package(point)}"
            raise UserError(
                f"Two installed packages have {kind} with the name '{point.name}': {both}. Uninstall one."
            )
    return points


def load_plugin(kind: Kind, name: str) -> Any:
    """Import what an entry point names."""
    point = plugins(kind)[name]
    try:
        return point.load()
    except Exception as error:  # code of others
        problem = (
            f"'{name}' of the package {_package(point)} cannot be imported: {one_line(error, 200)}"
        )
        raise UserError(f"{problem}. Update it.") from error


def read_terms(path: Path) -> dict[str, Any]:
    """Run a Python file of losses, and return its TERMS, the classes by name."""
    found = run_file(path, "TERMS (--terms)").get("TERMS")
    if not isinstance(found, Mapping) or not found:
        raise UserError(
            f"'{path}' has no losses. End it with TERMS = {{'NAME': YourTerm}} (--terms)."
        )
    return dict(found)


def run_file(path: Path, content: str) -> dict[str, Any]:
    """Run a Python file that the user named, and return what it defines; `content` is what it should have."""
    if not path.is_file():
        raise UserError(f"'{path}' does not exist. Give a Python file with {content}.")
    return run_own(f"'{path}' cannot be run", lambda: runpy.run_path(str(path), run_name=path.stem))


def names_plugin(text: str) -> bool:
    """Whether a name has the form KIND:REST, and KIND is a plugin's or "builtin"."""
    kind, colon, _ = text.partition(":")
    return bool(colon) and (kind == BUILTIN or kind in plugins("sources"))


def run_own(problem: str, run: Callable[[], Any]) -> Any:
    """Run code of the user's own; what it raises becomes a `UserError` that begins with the problem."""
    try:
        return run()
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {one_line(error, 200)}"
        raise UserError(f"{problem}: {cause}. Fix the file.") from error


def check_builtin(source: str) -> None:
    """Raise `UserError` for a built-in set that is unknown, or whose package is not installed."""
    kind, _, name = source.partition(":")
    if kind != BUILTIN:
        return
    if BUILTIN not in plugins("sources"):
        raise UserError(
            f"'{source}' is a built-in set of the package declip-sets, which is not installed. "
            "Run `pip install ./packages/declip-sets` in a clone of declip's repository."
        )
    from declip_sets import NAMES

    if name not in NAMES:
        raise unknown("built-in set", name, NAMES)


def plugin_recipe(name: str) -> Path | None:
    """The file NAME.yaml in the package that the entry point of a recipe names; None if there is no such recipe."""
    point = plugins("recipes").get(name)
    spec = find_spec(point.module) if point else None
    folders = (spec.submodule_search_locations if spec else None) or ()
    for folder in folders:
        path = Path(folder) / f"{name}.yaml"
        if path.is_file():
            return path
    return None


def _package(point: EntryPoint) -> str:
    if not point.dist:
        return point.value
    return point.dist.name
