"""The commands ``declip evaluate`` and ``declip compare``."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from declip.cli import options as opt
from declip.cli.options import check_shots, console, file, say
from declip.errors import UserError
from declip.io.atomic import check_writable, write_text

Task = Literal["zero-shot", "retrieval", "linear", "few-shot", "pointing"]


def evaluate(
    model: opt.Model,
    datasets: Annotated[
        list[str], opt.source("builtin:NAME, NAME:/path, a table, a folder, or paper11:/path; repeatable", "--dataset")
    ],
    task: Annotated[Task, typer.Option(help="what to measure; linear: a linear probe")] = "zero-shot",
    shots: opt.Shots = None,
    templates: Annotated[str | None, typer.Option(help="name of a template set, or a template with {}")] = None,
    label_column: Annotated[str | None, typer.Option(help="table column of classes")] = None,
    batch_size: opt.BatchSize = 256,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    precision: opt.Precision = "fp32",
    engine: opt.Engine = "torch",
    json_out: opt.JsonOut = None,
) -> None:
    """Evaluate a model on held-out images."""
    check_shots(shots, (task,))
    if templates is not None and task not in ("zero-shot", "few-shot"):
        raise UserError(f"--templates requires --task zero-shot or few-shot, but --task is {task}. Remove it.")
    check_writable((json_out,))
    from declip.evaluation.protocols import PREFIX, Options
    from declip.interchange.read import load

    suite = next((name for name in datasets if name.startswith(PREFIX)), None)
    if suite is not None and (len(datasets) > 1 or label_column is not None):
        raise UserError(f"The suite '{suite}' is evaluated alone. Give one --dataset, and no --label-column.")
    options = Options(templates=templates, shots=shots or [4], batch_size=batch_size, workers=workers)
    found = _evaluate(load(model, device, precision, engine), datasets, label_column, task, options, suite)
    if json_out is not None:
        write_text(json_out, json.dumps(found, indent=1), "choose another path with --json")


def _evaluate(
    model: Any, datasets: list[str], label_column: str | None, task: str, options: Any, suite: str | None
) -> Any:
    """Evaluate on all datasets, or on those of a suite, and print a table; return one row or several."""
    from declip.evaluation.datasets import open_dataset
    from declip.evaluation.protocols import SETS, evaluate_all, evaluate_suite
    from declip.io.text import percent
    from declip.reports.page import rich_table
    from declip.reports.run import results_table

    if suite is None:
        opened = [open_dataset(name, label_column=label_column) for name in datasets]
        results = evaluate_all(model, opened, (task,), options)
        rows = [each.to_dict() for each in results]
        console.print(rich_table(results_table(results)))
        return rows if len(rows) > 1 else rows[0]
    results, found = evaluate_suite(model, suite, task, options)
    console.print(rich_table(results_table(results)))
    say(f"Average of {len(found['values'])} of {len(SETS)} sets by their usual metrics: {percent(found['average'])}")
    for name, reason in found["missing"].items():
        say(f"Not measured: {name}: {reason}")
    return found


def compare(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="recipes, and keys that override all of them"),
    ],
    pairs: Annotated[str, typer.Option(help="numbers of training pairs, such as 1k,2k,4k")],
    seeds: Annotated[int, typer.Option(min=1, help="runs per recipe and number of pairs, with seeds 0, 1 …")] = 3,
    out: Annotated[Path, file("folder of the comparison", metavar="DIR")] = Path("runs/compare"),
    datasets: Annotated[
        list[str] | None, opt.source("default: the sets of the recipe; repeatable", "--dataset")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="default: zero-shot; repeatable")] = None,
    shots: opt.Shots = None,
    budget: Annotated[
        Literal["samples", "compute"],
        typer.Option(help="samples: every recipe runs its steps; compute: every recipe runs as long as the first"),
    ] = "samples",
    jobs: Annotated[int | None, typer.Option(min=1, help="parallel runs; default: one per core, or 1 on a GPU")] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Compare recipes at several numbers of pairs. Run the command again to continue an interrupted comparison."""
    from declip.recipe.load import load_recipe, parse_overrides

    check_shots(shots, tasks or ("zero-shot",))
    recipes = [word for word in words if "=" not in word]
    overrides = parse_overrides([word for word in words if "=" in word])
    for recipe in recipes:
        load_recipe(recipe, overrides)
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
