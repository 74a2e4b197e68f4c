"""declip: contrastive language-image models when pairs are few.

The public names: `finetune`, `fit`, `train`, `load`, `evaluate`, `compare`, `choose`, `classify`, `Classifier`,
`embed`, `Embedder`, `Index`, `export`, `Columns`, `PairBatch`, `Recipe`, `load_recipe`, `Sink`, `Term`, and the
package `interchange`. They are imported when they are first used, so that ``import declip`` is quick and asks for
nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.9.0"

if TYPE_CHECKING:
    from declip import interchange as interchange
    from declip.api import compare as compare
    from declip.api import evaluate as evaluate
    from declip.api import train as train
    from declip.data.batch import PairBatch as PairBatch
    from declip.data.columns import Columns as Columns
    from declip.errors import UserError as UserError
    from declip.finetuning.run import finetune as finetune
    from declip.fitting.fit import fit as fit
    from declip.interchange.export import export as export
    from declip.interchange.read import load as load
    from declip.recipe.load import load_recipe as load_recipe
    from declip.recipe.schema import Recipe as Recipe
    from declip.search.choose import choose as choose
    from declip.search.classify import Classifier as Classifier
    from declip.search.classify import classify as classify
    from declip.search.embed import embed as embed
    from declip.search.embedder import Embedder as Embedder
    from declip.search.index import Index as Index
    from declip.supervision.term import Term as Term
    from declip.training.sinks import Sink as Sink

_MODULES = {
    "api": "compare evaluate train",
    "data.batch": "PairBatch",
    "data.columns": "Columns",
    "errors": "UserError",
    "finetuning.run": "finetune",
    "fitting.fit": "fit",
    "interchange.export": "export",
    "interchange.read": "load",
    "recipe.load": "load_recipe",
    "recipe.schema": "Recipe",
    "search.choose": "choose",
    "search.classify": "Classifier classify",
    "search.embed": "embed",
    "search.index": "Index",
    "search.embedder": "Embedder",
    "supervision.term": "Term",
    "training.sinks": "Sink",
}
_WHERE = {name: f"declip.{module}" for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted([*_WHERE, "interchange"])


def __getattr__(name: str) -> Any:
    if name == "interchange":
        return import_module("declip.interchange")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'declip' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
