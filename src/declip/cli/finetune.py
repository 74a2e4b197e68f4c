"""The command ``declip finetune``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from declip.cli.options import Quiet, check_model, check_source, console, file, say
from declip.cli.train import leave_unless_finished


def finetune(
    pairs: Annotated[str, typer.Argument(help="a table, a folder, tar shards, or builtin:NAME")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    weights: Annotated[
        str | None,
        typer.Option("--from", metavar="WEIGHTS", help="weights to start from; default: builtin:lite0-minilm on a CPU"),
    ] = None,
    val: Annotated[
        list[str] | None, typer.Option(metavar="SET", help="validation set; default: a tenth of the pairs; repeatable")
    ] = None,
    out: Annotated[Path | None, file("run folder; default: runs/finetune", metavar="DIR")] = None,
    freeze: Annotated[
        str | None, typer.Option(metavar="TOWERS", help="both, image, text or none; default: by the number of pairs")
    ] = None,
    select: Annotated[bool, typer.Option("--select", help="frozen towers: try several heads, train the best")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in that folder")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only show the recipe, memory and time expected")] = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune pretrained weights on your pairs, and keep the best weights."""
    from declip.recipe.load import parse_overrides

    given = parse_overrides(overrides or [])
    for source, option in ((pairs, "PAIRS"), *((name, "--val") for name in val or ())):
        check_source(source, option)
    if weights is not None:
        check_model(weights)
    from declip import api

    options: dict[str, Any] = {"val": val or (), "out": out, "freeze": freeze, "quiet": quiet, **given}
    if dry_run:
        recipe, cost = api.estimate_finetune(pairs, weights, **options)
        say(f"{recipe}\n{cost}")
        return
    run = api.finetune(pairs, weights, select=select, resume=resume, **options)
    leave_unless_finished(run)
    from declip.reports.page import rich_table
    from declip.reports.run import measures_table

    console.print(rich_table(measures_table(run)))
    say(f"Best: step {run.best_step:,} of {run.step:,}. Report: {run.report}. Exported: {run.folder / 'exported'}")
    say(f"Search with it: declip embed {run.folder} IMAGES --out index, then: declip search index 'a text'")
