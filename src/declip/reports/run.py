"""The report of a run: one HTML file with its numbers, curves, examples and recipe."""

from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from declip.evaluation.held_out import HeldOutSets
from declip.evaluation.results import Result, RetrievalResult, ZeroShotResult, short_names
from declip.io.atomic import write_text
from declip.models.encoder import Encoder
from declip.reports.charts import score_chart, value_chart
from declip.reports.page import NONE, Table, render
from declip.reports.retrieval import retrieval_section
from declip.reports.tables import (
    CHANGE,
    COLUMNS,
    change_cells,
    measure_cells,
    mixture_lines,
    skipped_table,
)
from declip.runs.folder import Run, read_run

NAME = "report.html"
PROGRESS = {
    "lr": ("learning rate", False),
    "logit_scale": ("logit scale", False),
    "grad_norm": ("gradient norm", True),
}
"""Logged quantities besides the losses: their titles, and whether they are noisy."""


def write_report(
    folder: Path, model: Encoder, limit: int = 4_000, held_out: HeldOutSets | None = None
) -> Path:
    """Write ``report.html`` into a run folder, from its files; the model encodes up to `limit` held-out pairs.

    A section whose input cannot be read is left out with a warning.
    """
    run = read_run(folder)
    # --- headline and examples: the user's own set before a built-in one, final ones before those during training
    evaluation = run.recipe.evaluation
    names = [
        *evaluation.final_zero_shot,
        *evaluation.zero_shot,
        *evaluation.final_retrieval,
        *evaluation.retrieval,
    ]
    dataset = min(names, key=lambda name: name.startswith("builtin:"), default=None)
    results = [row.result for row in run.last() if row.result.dataset == dataset]
    # --- tables and examples
    open_source = None
    if dataset and model.token_scorer is None:  # else embeddings are not trained
        sets = held_out or HeldOutSets(run.recipe.data)
        open_source = partial(sets.test, dataset)
    progress = []
    for key, (title, noisy) in PROGRESS.items():
        progress.append(_curve(run, title, key, noisy=noisy))
    source = run.examples.get("source")
    content = render(
        "run.html",
        run=run,
        dataset=dataset,
        source=source,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        set_names=short_names(row.result.dataset for row in run.evaluated),
        zero_shot=next((result for result in results if isinstance(result, ZeroShotResult)), None),
        retrieval=next((result for result in results if isinstance(result, RetrievalResult)), None),
        results_table=measures_table(run),
        mixture=mixture_lines(run.mixture),
        losses=loss_charts(run) if run.metrics else [],
        progress=progress,
        accuracy=accuracy_charts(run),
        skipped_table=skipped_table(run.skipped),
        **retrieval_section(open_source, model, source and source["credit"], limit),
    )
    return write_text(folder / NAME, content)


def measures_table(run: Run) -> Table:
    """List the last evaluation of each set, one measure a row; for a fine-tuned run also the values at its start."""
    names = short_names(row.result.dataset for row in run.evaluated)
    # A fine-tuned run was also evaluated at its start, as step 0.
    started = dict[tuple[str, str], Result]()
    for row in run.evaluated:
        if row.step == 0:
            started[row.result.dataset, row.result.task] = row.result
    rows = []
    for row in run.last():
        result = row.result
        step = f"{row.weights:,}"
        name = names[result.dataset]
        first = started.get((result.dataset, result.task))
        before = dict[str, float]()
        if first is not None:
            before = {measure.name: measure.value for measure in first.measures()}
        for measure in result.measures():
            change = change_cells(measure.value, before.get(measure.name))
            rows.append((name, *measure_cells(measure), step, *change))
        if isinstance(result, RetrievalResult) and result.loss is not None:
            loss = (name, "validation loss", _loss(result), NONE, NONE, f"{result.images:,}")
            rows.append((*loss, step, _loss(first), NONE))
    columns = (*COLUMNS, "step", *CHANGE)
    shown = len(columns)
    if not started:
        shown -= len(CHANGE)
    cells = tuple(row[:shown] for row in rows)
    return Table("All last evaluations", columns[:shown], cells, texts=2)


def _loss(result: Result | None) -> str:
    """Format the loss on a validation set."""
    if isinstance(result, RetrievalResult) and result.loss is not None:
        return f"{result.loss:.3f}"
    return NONE


def loss_charts(run: Run) -> list[dict[str, Any]]:
    """Draw the total and each loss."""
    charts = [_curve(run, "total", "loss", "The weighted sum, which training minimizes.")]
    facts = run.examples.get("losses", {})
    weights = run.recipe.loss_weights
    logged = [row.get("losses", {}) for row in run.metrics]
    for name in dict.fromkeys(chain(*logged)):
        known = facts.get(name, {"title": name, "explanation": "", "chance": None})
        notes = list[str]()
        if known["explanation"]:
            notes.append(known["explanation"])
        if name in weights:
            notes.append(f"Weight {weights[name]:g}.")
        if known["chance"] is not None:
            notes.append(f"Chance level {known['chance']:.2f}.")
        charts.append(_curve(run, known["title"], f"losses.{name}", " ".join(notes)))
    return charts


def accuracy_charts(run: Run) -> list[dict[str, Any]]:
    """Draw held-out accuracy over the steps, for everything that was evaluated more than once."""
    charts = []
    names = short_names(row.result.dataset for row in run.evaluated)
    for number, measured in enumerate(run.series()):
        rows = [row for row in measured if row.weights == row.step] or measured
        last = rows[-1].result
        if len(rows) < 2 or not isinstance(last, ZeroShotResult | RetrievalResult):
            continue
        shown = ("text → image R@1", "image → text R@1")
        if isinstance(last, ZeroShotResult):
            shown = ("top-1", "top-5")
        lines = dict[str, list[float]]()
        for row in rows:
            measures = {measure.name: measure for measure in row.result.measures()}
            for name in shown:
                line = lines.setdefault(name.removesuffix(" R@1"), [])
                line.append(measures[name].value)
        first = measures[shown[0]]
        steps = [row.step for row in rows]
        chart = score_chart(lines, steps, first.chance)
        svg = chart.svg(f"accuracy-{number}")
        explanation = f"{names[last.dataset]}, n = {first.n:,}"
        charts.append({"title": last.task, "svg": svg, "explanation": explanation})
    return charts


def _curve(
    run: Run, title: str, column: str, explanation: str = "", noisy: bool = True
) -> dict[str, Any]:
    chart = value_chart(title, run.steps, run.column(column), noisy)
    return {
        "title": title,
        "svg": chart and chart.svg(f"chart-{column}"),
        "explanation": explanation,
    }
