"""Plugins: losses, sources, trackers and recipes of other installed packages, found by their entry points."""

from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from declip.errors import UserError
from declip.io.text import one_line

Kind = Literal["losses", "sources", "trackers", "recipes"]


def plugins(kind: Kind) -> dict[str, EntryPoint]:
    """The entry points of the group ``declip.KIND`` by name, which must differ; no package is imported."""
    points: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=f"declip.{kind}"), key=lambda point: point.name):
        other = points.setdefault(point.name, point)
        if other.value != point.value:
            both = f"{_package(other)} and {_package(point)}"
            raise UserError(f"Two installed packages have {kind} with the name '{point.name}': {both}. Uninstall one.")
    return points


def load_plugin(kind: Kind, name: str) -> Any:
    """Import what an entry point names."""
    point = plugins(kind)[name]
    try:
        return point.load()
    except Exception as error:  # code of others
        problem = f"'{name}' of the package {_package(point)} cannot be imported: {one_line(error, 200)}"
        raise UserError(f"{problem}. Update it.") from error


def plugin_recipe(name: str) -> Path | None:
    """The file NAME.yaml in the package that the entry point of a recipe names; None if there is no such recipe."""
    point = plugins("recipes").get(name)
    spec = find_spec(point.module) if point else None
    folders = (spec.submodule_search_locations if spec else None) or ()
    return next((path for folder in folders if (path := Path(folder) / f"{name}.yaml").is_file()), None)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value
