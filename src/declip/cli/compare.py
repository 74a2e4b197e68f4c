"""The command ``declip compare``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from declip.cli.options import Quiet, Shots, check_shots, check_source, console, file, say

Datasets = Annotated[
    list[str] | None, typer.Option("--dataset", help="evaluation set; default: those of the recipe; repeatable")
]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", help="zero-shot (default), retrieval, linear or few-shot; repeatable")
]
Budget = Annotated[
    str,
    typer.Option(help="samples: every recipe runs its train.steps; compute: every recipe runs as long as the first"),
]


def compare(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="recipes, and keys that override all of them"),
    ],
    pairs: Annotated[str, typer.Option(help="numbers of training pairs, such as 1k,2k,4k")],
    seeds: Annotated[int, typer.Option(min=1, help="runs per recipe and number of pairs, with seeds 0, 1 …")] = 3,
    out: Annotated[Path, file("folder of the comparison", metavar="DIR")] = Path("runs/compare"),
    datasets: Datasets = None,
    tasks: Tasks = None,
    shots: Shots = None,
    budget: Budget = "samples",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="number of parallel runs; default: one per core, or 1 on a GPU")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Compare recipes at several numbers of pairs. Run the command again to continue an interrupted comparison."""
    from declip.recipe.load import load_recipe, parse_overrides

    check_shots(shots, tasks or ("zero-shot",))
    recipes = [word for word in words if "=" not in word]
    overrides = parse_overrides([word for word in words if "=" in word])
    for recipe in recipes:
        load_recipe(recipe, overrides)
    for name in datasets or ():
        check_source(name, "--dataset")
    from declip.api import compare as run_comparison
    from declip.comparison.study import read_counts
    from declip.reports.comparison import summary

    options: dict[str, Any] = {"datasets": datasets or (), "tasks": tasks or ("zero-shot",), "budget": budget}
    options |= {"shots": shots or (4,), "overrides": overrides, "jobs": jobs, "quiet": quiet}
    outcome = run_comparison(recipes, read_counts(pairs), seeds, out=out, **options)
    console.print(summary(outcome))
    if not outcome.complete:
        raise typer.Exit(2 if outcome.failures else 130)
    say(f"Report: {out / 'report.html'}")
