"""declip: contrastive language-image models when pairs are few.

The public names: `train`, `load`, `evaluate`, `compare`, `embed`, `Index`, `export`, `PairBatch`, `Recipe`,
`load_recipe`, and the package `interchange`. They are imported when they are first used, so that
``import declip`` is quick and asks for nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from declip import interchange
    from declip.api import compare, train
    from declip.data.batch import PairBatch
    from declip.errors import UserError
    from declip.evaluation.protocols import evaluate
    from declip.interchange.export import export
    from declip.interchange.read import load
    from declip.recipe.load import load_recipe
    from declip.recipe.schema import Recipe
    from declip.search.embed import embed
    from declip.search.index import Index

_WHERE = {
    "Index": "declip.search.index",
    "PairBatch": "declip.data.batch",
    "Recipe": "declip.recipe.schema",
    "UserError": "declip.errors",
    "compare": "declip.api",
    "embed": "declip.search.embed",
    "evaluate": "declip.evaluation.protocols",
    "export": "declip.interchange.export",
    "load": "declip.interchange.read",
    "load_recipe": "declip.recipe.load",
    "train": "declip.api",
}

__all__ = [
    "Index",
    "PairBatch",
    "Recipe",
    "UserError",
    "compare",
    "embed",
    "evaluate",
    "export",
    "interchange",
    "load",
    "load_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "interchange":
        return import_module("declip.interchange")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'declip' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
