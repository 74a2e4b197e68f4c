"""The commands ``declip train`` and ``declip finetune``."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from declip.cli import options as opt
from declip.cli.options import check_source, console, file, known, say
from declip.recipe.starts import check_model


def train(
    recipe: Annotated[str, typer.Argument(help="name of a shipped recipe, or a YAML file")],
    overrides: opt.Overrides = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help="training pairs; sets the key data.source")] = None,
    val: Annotated[list[str] | None, opt.source("evaluation set, with classes or captions; repeatable")] = None,
    out: Annotated[Path | None, file("run folder; default: runs/RECIPE", metavar="DIR")] = None,
    resume: opt.Resume = False,
    quiet: opt.Quiet = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only estimate memory and time")] = False,
) -> None:
    """Train a model as a recipe describes, evaluate it, and write a report."""
    given = _checked(recipe, overrides or [], data, resume)
    name = Path(recipe).stem
    from declip import api
    from declip.training.assemble import resolve_recipe

    resolved = resolve_recipe(recipe, given, data=data, val=val or ())
    if dry_run:
        from declip.training.estimate import estimate

        say(estimate(resolved)[1])
        return
    run = api.train(resolved, out=out or Path("runs") / name, resume=resume, quiet=quiet)
    leave_unless_finished(run)
    _print_results(run)
    say(f"Report: {run.report}")


def leave_unless_finished(run: Any) -> None:
    """End the command on other ranks than the first, and after a signal with the command that continues."""
    if not run.is_rank_zero:
        raise typer.Exit(0 if run.finished else run.status)
    if not run.finished:
        say(f"Stopped after step {run.step:,} of {run.recipe.train.steps:,}; a checkpoint was saved. Continue with:")
        words = [word for word in sys.argv[1:] if word != "--resume"]
        say(f"  {shlex.join(['declip', *words, '--resume'])}")
        raise typer.Exit(run.status)


def _checked(recipe: str, overrides: list[str], data: str | None, resume: bool) -> dict[str, Any]:
    """Read the overrides, and refuse what can be refused before torch is imported."""
    from declip.recipe.load import load_recipe, parse_overrides

    given = parse_overrides(overrides)
    resolved = load_recipe(recipe, given)
    if resolved.finetune.pretrained is not None and not resume:  # a checkpoint needs no weights
        check_model(str(resolved.finetune.pretrained))
    named = resolved.data.source if data is None else data
    for source in (named,) if isinstance(named, str) else named:
        check_source(source, "--data or data.source")
    for key, paths in resolved.evaluation if data is None else ():
        for path in paths:
            check_source(path, f"evaluation.{key}")
    return dict(given)


def _print_measures(run: Any) -> None:
    from declip.reports.page import rich_table
    from declip.reports.run import measures_table

    if run.evaluated:
        console.print(rich_table(measures_table(run)))


def _print_results(run: Any) -> None:
    from declip.io.text import plural

    _print_measures(run)
    seen, speed = run.step * run.recipe.train.batch_size, run.samples_per_second
    pace = f"{speed:,.0f} samples/s (median)" if speed else "speed not measured"
    counted = f"{plural(seen, 'sample')} seen in {plural(run.step, 'step')}"
    say(f"{run.recipe.name}, seed {run.recipe.seed}: {counted}, {pace}")
    if not run.evaluated:
        say("Nothing was evaluated: name a held-out set with --val heldout.csv.")


def finetune(
    pairs: opt.Source,
    overrides: opt.Overrides = None,
    weights: Annotated[
        str | None,
        typer.Option("--from", metavar="WEIGHTS", callback=known, help="default without a GPU: builtin:lite2-minilm"),
    ] = None,
    val: Annotated[
        list[str] | None, opt.source("validation set; default: a tenth of the pairs if towers are trained")
    ] = None,
    keep: Annotated[list[str] | None, opt.source("set on which the accuracy should not fall; repeatable")] = None,
    out: Annotated[Path | None, file("run folder; default: runs/finetune", metavar="DIR")] = None,
    freeze: Annotated[
        str | None,
        typer.Option(metavar="TOWERS", help="both, image, text or none; default: both for built-in weights on a CPU"),
    ] = None,
    resume: opt.Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only print the recipe, and estimate memory and time")
    ] = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fine-tune pretrained weights on your pairs, write a report, and export the model."""
    from declip.recipe.finetuning import read_overrides
    from declip.recipe.load import parse_overrides

    given = parse_overrides(overrides or [])
    read_overrides(given, freeze)
    from declip import api, finetuning

    options: dict[str, Any] = {"val": val or (), "keep": keep or (), "out": out, "freeze": freeze, "quiet": quiet}
    options |= given
    if dry_run:
        say("\n".join(finetuning.estimate_finetune(pairs, weights, **options)))
        return
    run = api.finetune(pairs, weights, resume=resume, **options)
    leave_unless_finished(run)
    _print_finetuned(run)


def _print_finetuned(run: Any) -> None:
    from declip.reports.run import fitted_lines

    _print_measures(run)
    for line in fitted_lines(run):
        say(line)
    if not run.cross_validation:
        best = f"Best: step {run.best_step:,} of {run.step:,}."
        say(best if run.evaluated else "No validation set: nothing was measured.")
    say(f"Report: {run.report}. Exported: {run.folder / 'exported'}")
    say(f"Search with it: declip embed {run.folder} IMAGES --out index, then: declip search index 'a text'")
