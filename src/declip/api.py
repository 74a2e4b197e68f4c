"""Public functions that do the work and then write its page: `train` and `compare`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from declip.comparison import runner
from declip.comparison.outcome import Outcome
from declip.data.pair import BrokenPair, PairSource
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset
from declip.interchange.read import load
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.reports.comparison import write_page
from declip.reports.run import write_report
from declip.runs.folder import Run
from declip.training import distributed
from declip.training.trainer import Trainer


def resolve_recipe(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    data: str | Path | None = None,
    val: Sequence[str] = (),
) -> Recipe:
    """Load a recipe with its overrides, training pairs and held-out sets, see `train`."""
    if isinstance(recipe, Recipe):
        if overrides or data is not None or val:
            raise UserError("overrides, data and val go with a recipe's name or file; this Recipe is resolved.")
        return recipe
    given = dict(overrides or {})
    if data is not None:
        given["data.source"] = json.dumps(str(data))  # quoted, because values are read as YAML
    if val:
        sets = {name: open_dataset(name).split("test") for name in val}
        classes = [name for name, source in sets.items() if source.labels is not None]
        captions = [name for name, source in sets.items() if has_captions(source)]
        if neither := [name for name in sets if name not in {*classes, *captions}]:
            raise UserError(f"'{neither[0]}' has neither classes nor captions, so it can't be a held-out set.")
        given |= {"evaluation.zero_shot": classes, "evaluation.retrieval": captions}
    return load_recipe(recipe, given)


def has_captions(source: PairSource, sample: int = 64) -> bool:
    """Whether any of the first pairs has a caption other than the name of its class, for retrieval."""
    for index in range(min(sample, len(source))):
        try:
            captions = source.captions(index)
        except BrokenPair:
            continue
        if source.labels is None or source.class_names is None:
            return True
        if captions != (source.class_names[source.labels[index]],):
            return True
    return False


def train(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    report: bool = True,
    *,
    data: str | Path | None = None,
    val: Sequence[str] = (),
) -> Run:
    """Train a recipe in a run folder.

    Args:
        recipe: A shipped recipe's name, a YAML file, or a `Recipe`, which allows no overrides, data or val.
        overrides: Dotted keys and values, such as ``{"train.steps": 500}``.
        out: The run folder; by default ``runs/NAME``.
        resume: Continue the run in that folder if there is one; the result is bit-exact, as if never interrupted.
        quiet: Show no progress.
        report: Write report.html at the end.
        data: The training pairs, for the key ``data.source``.
        val: Held-out sets: for zero-shot classification if they have classes, for retrieval if they have captions.

    Returns:
        The run. `finished` is False after Ctrl-C or SIGTERM; a checkpoint was then written.

    Raises:
        UserError: see `resolve_recipe`, `open_folder`, `open_source`.
    """
    resolved = resolve_recipe(recipe, overrides, data, val)
    folder = Path(out).expanduser() if out is not None else Path("runs") / resolved.name
    run = Trainer(resolved, folder, resume, quiet).train(_write_report if report else None)
    distributed.leave()
    return run


def _write_report(trainer: Trainer) -> None:
    # With FSDP this rank holds a part of the model; the whole one is in the checkpoint.
    model: Any = load(trainer.folder) if trainer.sharded else trainer.evaluated_model
    write_report(trainer.folder, model, recipe=trainer.recipe, training=trainer)


def compare(
    recipes: Sequence[str], pairs: Sequence[int], seeds: int | Sequence[int] = 3, *, out: str | Path, **options: Any
) -> Outcome:
    """Compare recipes at several numbers of distinct pairs and write results.json, results.md and report.html.

    The other arguments (`datasets`, `tasks`, `ablation`, `sweep` …) are those of `declip.comparison.runner.compare`.
    """
    outcome = runner.compare(recipes, pairs, seeds, out=out, **options)
    write_page(outcome, Path(out))
    return outcome
