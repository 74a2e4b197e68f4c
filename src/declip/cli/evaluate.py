"""The command ``declip evaluate``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from declip.cli.options import BatchSize, Device, JsonOut, check_model, check_source, console, file
from declip.errors import UserError, unknown
from declip.io.atomic import write_text

TASKS = ("zero-shot", "retrieval", "linear", "knn")


def evaluate(
    model: Annotated[str, typer.Argument(help="run, checkpoint, weights, open_clip:… or hf-hub:OWNER/NAME")],
    datasets: Annotated[
        list[str],
        typer.Option("--dataset", help="builtin:NAME, NAME:/path, a table, a folder, or paper11:/path; repeatable"),
    ],
    task: Annotated[str, typer.Option(help=", ".join(TASKS))] = "zero-shot",
    templates: Annotated[str | None, typer.Option(help="a template set, or one template with {}")] = None,
    features: Annotated[str, typer.Option(help="probes: backbone, or embedding after the projection")] = "backbone",
    label_column: Annotated[str | None, typer.Option(help="column of a table with classes")] = None,
    batch_size: BatchSize = 256,
    workers: Annotated[int, typer.Option(min=0, help="processes that read images")] = 0,
    device: Device = "auto",
    json_out: JsonOut = None,
    markdown_out: Annotated[Path | None, file("paper11: also write the table", "--markdown")] = None,
) -> None:
    """Evaluate a model on held-out images."""
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    for option, given, tasks in (
        ("--templates", templates is not None, ("zero-shot",)),
        ("--features", features != "backbone", ("linear", "knn")),
    ):
        if given and task not in tasks:
            raise UserError(f"{option} goes with --task {' or '.join(tasks)}, not with {task}. Leave it out.")
    check_model(model)
    for name in datasets:
        check_source(name, "--dataset")
    from rich.markdown import Markdown

    from declip.evaluation.datasets import open_dataset
    from declip.evaluation.protocols import Options, evaluate_all
    from declip.evaluation.results import results_table
    from declip.evaluation.suites import evaluate_suite, is_suite
    from declip.interchange.read import load
    from declip.reports.page import check_writable

    check_writable((json_out, markdown_out))
    suites = [name for name in datasets if is_suite(name)]
    if suites and len(datasets) > 1:
        raise UserError(f"'{suites[0]}' is a table of its own. Evaluate it alone, with one --dataset.")
    if suites and label_column is not None:
        raise UserError(f"--label-column names a column of a table, and '{suites[0]}' is none. Leave it out.")
    if markdown_out is not None and not suites:
        raise UserError(f"--markdown writes the table of paper11:/data, but --dataset is '{datasets[0]}'. Use --json.")
    kind: Any = features
    options = Options(templates=templates, batch_size=batch_size, workers=workers, features=kind)
    loaded = load(model, device)
    if suites:
        suite = evaluate_suite(loaded, datasets[0], task, options)
        table: Any = Markdown(suite.markdown(model))
        content = json.dumps(suite.to_dict(), indent=1)
        if markdown_out is not None:
            write_text(markdown_out, suite.markdown(model), "choose another place with --markdown")
    else:
        opened = [open_dataset(name, label_column=label_column) for name in datasets]
        results = evaluate_all(loaded, opened, (task,), options)
        rows = [result.to_dict() for result in results]
        table, content = results_table(results), json.dumps(rows if len(rows) > 1 else rows[0], indent=1)
    console.print(table)
    if json_out is not None:
        write_text(json_out, content, "choose another place with --json")
