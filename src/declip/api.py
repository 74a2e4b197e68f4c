"""The public functions that do work and then write its page: training and comparing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from declip.comparison import runner
from declip.comparison.outcome import Outcome
from declip.errors import UserError
from declip.interchange.load import load
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.reports.comparison import write_page
from declip.reports.run import write_report
from declip.runs.folder import Run
from declip.training import distributed
from declip.training.trainer import Trainer


def train(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    report: bool = True,
) -> Run:
    """Train a recipe in a run folder.

    Args:
        recipe: A shipped recipe's name, a YAML file, or a `Recipe`.
        overrides: Dotted keys and values, such as ``{"train.steps": 500}``.
        out: The run folder; by default ``runs/NAME``.
        resume: Continue the run in that folder if there is one; the result is bit-exact, as without the interruption.
        quiet: Show no progress.
        report: Write report.html at the end.

    Returns:
        The run. `finished` is False after Ctrl-C or SIGTERM; a checkpoint was then written.

    Raises:
        UserError: what was given can't be used; see `load_recipe`, `open_folder`, `open_source`.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise UserError("Overrides go with a recipe's name or file; this Recipe is already resolved.")
    folder = Path(out) if out is not None else Path("runs") / recipe.name
    run = Trainer(recipe, folder, resume, quiet).train(_write_report if report else None)
    distributed.leave()
    return run


def _write_report(trainer: Trainer) -> None:
    # With FSDP this rank holds a part of the model; the whole one is in the checkpoint.
    model: Any = load(trainer.folder) if trainer.sharded else trainer.evaluated_model
    write_report(
        trainer.folder,
        model,
        recipe=trainer.recipe,
        loader=trainer.loader,
        objective=trainer.objective,
        train_source=trainer.source,
        plan=trainer.plan,
    )


def compare(
    recipes: Sequence[str], pairs: Sequence[int], seeds: int | Sequence[int] = 3, *, out: str | Path, **options: Any
) -> Outcome:
    """Compare recipes at several numbers of distinct pairs and write results.json, results.md and report.html.

    Arguments, result and errors are those of `declip.comparison.runner.compare`.
    """
    outcome = runner.compare(recipes, pairs, seeds, out=out, **options)
    write_page(outcome, Path(out))
    return outcome
