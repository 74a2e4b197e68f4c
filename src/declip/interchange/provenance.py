"""Where a model that is exported came from: its recipe, steps, pairs and measured results."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from declip.errors import UserError
from declip.evaluation.results import Result
from declip.interchange.load import Model, load, model_of, read_checkpoint
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import STATE, list_checkpoints
from declip.runs.records import read_run


@dataclass(frozen=True)
class Provenance:
    """What is known of a model's making.

    Attributes:
        recipe: The resolved recipe; None where the model was built otherwise.
        step: Steps done; None where no checkpoint says it.
        pairs: Distinct pairs of the source.
        results: Evaluations after that step.
        origin: Where the weights came from, in a few words, where it was not one of our runs.
    """

    recipe: Recipe | None = None
    step: int | None = None
    pairs: int | None = None
    results: Sequence[Result] = field(default_factory=tuple)
    origin: str | None = None


def trace(where: str | Path | Model) -> tuple[DualEncoder, Provenance]:
    """Load a model, with what its folder says of it.

    Args:
        where: What `declip.load` takes, or a model; of a model only the recipe is known.

    Returns:
        The model on the CPU (one that was given stays where it is), and where it came from.

    Raises:
        UserError: nothing loadable, or a model of open_clip's, which has no need to be exported.
    """
    if not isinstance(where, str | Path):
        return _ours(where), Provenance(getattr(where, "recipe", None))
    path = Path(where)
    if (path / STATE).is_file() or list_checkpoints(path):
        checkpoint = read_checkpoint(path)
        model = model_of(checkpoint, path).eval()
        run = path.parent.parent if (path / STATE).is_file() else path
        rows = read_run(run).evaluations
        results = tuple(row.result for row in rows if row.step == checkpoint.step)
        pairs = checkpoint.extra.get("pairs")
        return model, Provenance(model.recipe, checkpoint.step, _count(pairs), results)
    model = _ours(load(where, device="cpu"))
    return model, Provenance(model.recipe, origin=f"the file `{path.name}`")


def _count(found: Any) -> int | None:
    return found if isinstance(found, int) else None


def _ours(model: Any) -> DualEncoder:
    if not isinstance(model, DualEncoder):
        raise UserError(
            f"This {type(model).__name__} cannot be exported: a model of open_clip's is already in its own format, and "
            "only models of ours can be written in others. `declip import FILE --from open_clip` makes it one of ours."
        )
    return model
