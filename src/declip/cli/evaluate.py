"""The command ``declip evaluate``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from declip.cli.options import (
    BatchSize,
    Device,
    JsonOut,
    Precision,
    Shots,
    Workers,
    check_shots,
    check_source,
    console,
    file,
)
from declip.errors import UserError, unknown
from declip.io.atomic import check_writable, write_text
from declip.recipe.starts import check_model

TASKS = ("zero-shot", "retrieval", "linear", "few-shot")


def evaluate(
    model: Annotated[
        str, typer.Argument(help="a run folder, a checkpoint, a weights file, open_clip:MODEL/TAG or hf-hub:OWNER/NAME")
    ],
    datasets: Annotated[
        list[str],
        typer.Option("--dataset", help="builtin:NAME, NAME:/path, a table, a folder, or paper11:/path; repeatable"),
    ],
    task: Annotated[str, typer.Option(help="zero-shot, retrieval, linear (probe) or few-shot")] = "zero-shot",
    shots: Shots = None,
    templates: Annotated[str | None, typer.Option(help="name of a template set, or a template with {}")] = None,
    label_column: Annotated[str | None, typer.Option(help="table column of classes")] = None,
    batch_size: BatchSize = 256,
    workers: Workers = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    json_out: JsonOut = None,
    markdown_out: Annotated[Path | None, file("with paper11: also write the table as Markdown", "--markdown")] = None,
) -> None:
    """Evaluate a model on held-out images."""
    _check_task(task, templates, shots)
    check_model(model)
    for name in datasets:
        check_source(name, "--dataset")
    from declip.evaluation.protocols import Options
    from declip.interchange.read import load

    check_writable((json_out, markdown_out))
    suite = _suite_of(datasets, label_column, markdown_out)
    options = Options(templates=templates, shots=shots or [4], batch_size=batch_size, workers=workers)
    loaded = load(model, device, precision)
    if suite is None:
        table, found = _evaluate(loaded, datasets, label_column, task, options)
    else:
        table, found = _evaluate_suite(loaded, suite, model, task, options, markdown_out)
    console.print(table)
    if json_out is not None:
        write_text(json_out, json.dumps(found, indent=1), "choose another path with --json")


def _check_task(task: str, templates: str | None, shots: list[int] | None) -> None:
    """Refuse an unknown task, and options of another one."""
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    if templates is not None and task not in ("zero-shot", "few-shot"):
        raise UserError(f"--templates requires --task zero-shot or few-shot, but --task is {task}. Remove it.")
    check_shots(shots, (task,))


def _evaluate_suite(
    model: Any, suite: str, name: str, task: str, options: Any, markdown_out: Path | None
) -> tuple[Any, Any]:
    """Evaluate on the sets of a published table; return the table with the model's row, and the results."""
    from rich.markdown import Markdown

    from declip.evaluation.protocols import evaluate_suite

    result = evaluate_suite(model, suite, task, options)
    markdown = result.markdown(name)
    if markdown_out is not None:
        write_text(markdown_out, markdown, "choose another path with --markdown")
    return Markdown(markdown), result.to_dict()


def _evaluate(model: Any, datasets: list[str], label_column: str | None, task: str, options: Any) -> tuple[Any, Any]:
    """Evaluate on all datasets; return a table, and one row or several."""
    from declip.evaluation.datasets import open_dataset
    from declip.evaluation.protocols import evaluate_all
    from declip.reports.page import rich_table
    from declip.reports.run import results_table

    opened = [open_dataset(name, label_column=label_column) for name in datasets]
    results = evaluate_all(model, opened, (task,), options)
    rows = [each.to_dict() for each in results]
    return rich_table(results_table(results)), rows if len(rows) > 1 else rows[0]


def _suite_of(datasets: list[str], label_column: str | None, markdown_out: Path | None) -> str | None:
    """Return the suite among the datasets, if any; refuse options that it does not allow, or that require one."""
    from declip.evaluation.protocols import PREFIX

    suite = next((name for name in datasets if name.startswith(PREFIX)), None)
    if suite is None:
        if markdown_out is not None:
            raise UserError(f"--markdown requires --dataset paper11:DIR, but --dataset is '{datasets[0]}'. Use --json.")
        return None
    if len(datasets) > 1:
        raise UserError(f"'{suite}' is a suite and cannot be combined with other datasets. Use one --dataset.")
    if label_column is not None:
        raise UserError(f"--label-column requires a table, but --dataset is '{suite}'. Remove it.")
    return suite
