"""The report of a run: one HTML file with its numbers, curves, examples and recipe."""

from functools import partial
from pathlib import Path
from typing import Any

from declip.evaluation.held_out import HeldOutSets
from declip.evaluation.results import RetrievalResult, ZeroShotResult, short_names
from declip.io.atomic import write_text
from declip.io.text import percent
from declip.models.encoder import Encoder
from declip.reports.charts import score_chart, value_chart
from declip.reports.page import NONE, Table, points, render
from declip.reports.retrieval import encode_set, retrieval
from declip.reports.tables import measure_cells, mixture_lines, skipped_table
from declip.runs.folder import Run, read_run

NAME = "report.html"
PROGRESS = {
    "lr": ("learning rate", False),
    "logit_scale": ("logit scale", False),
    "grad_norm": ("gradient norm", True),
}
"""Logged quantities besides the losses: their titles, and whether they are noisy."""

SHOWN = 5  # candidates of a query
# Of the percentile; if the interval ends below it, more pairs show no useful gain
LEAST_GAIN = 0.01
MOST_TIMES = 10  # times as many pairs, up to which their number is stated


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
    embeds = model.token_scorer is None  # else embeddings are not trained
    encoded = None
    if dataset and embeds:
        sets = held_out or HeldOutSets(run.recipe)
        encoded = encode_set(partial(sets.test, dataset), model, limit)
    source = run.examples.get("source")
    credits = (source and source["credit"], encoded and encoded["source"].credit)
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
        progress=[_curve(run, title, key, noisy=noisy) for key, (title, noisy) in PROGRESS.items()],
        accuracy=accuracy_charts(run),
        skipped_table=skipped_table(run.skipped),
        held_out=encoded,
        retrieved=encoded and retrieval(**encoded),
        credits=list(dict.fromkeys(filter(None, credits))),
    )
    return write_text(folder / NAME, content)


def measures_table(run: Run) -> Table:
    """List the last evaluation of each set, one measure a row; for a fine-tuned run also the values at its start."""
    names, rows = short_names(row.result.dataset for row in run.evaluated), []
    # A fine-tuned run was also evaluated at its start, as step 0.
    started = {
        (row.result.dataset, row.result.task): row.result for row in run.evaluated if row.step == 0
    }
    for row in run.last():
        result, first = row.result, started.get((row.result.dataset, row.result.task))
        before = {measure.name: measure.value for measure in first.measures()} if first else {}
        for measure in result.measures():
            start = before.get(measure.name)
            change = (
                (NONE, NONE) if start is None else (percent(start), points(measure.value - start))
            )
            rows.append(
                (names[result.dataset], *measure_cells(measure), f"{row.weights:,}", *change)
            )
        if isinstance(result, RetrievalResult) and result.loss is not None:
            old = (
                f"{first.loss:.3f}"
                if isinstance(first, RetrievalResult) and first.loss is not None
                else NONE
            )
            numbers = (
                f"{result.loss:.3f}",
                NONE,
                NONE,
                f"{result.images:,}",
                f"{row.weights:,}",
                old,
                NONE,
            )
            rows.append((names[result.dataset], "validation loss", *numbers))
    columns = (
        "set",
        "measure",
        "value",
        "chance",
        "× chance",
        "n",
        "step",
        "before",
        "change, points",
    )
    shown = len(columns) if started else -2
    return Table(
        "All last evaluations", columns[:shown], tuple(row[:shown] for row in rows), texts=2
    )


def loss_charts(run: Run) -> list[dict[str, Any]]:
    """Draw the total and each loss."""
    charts = [_curve(run, "total", "loss", "The weighted sum, which training minimizes.")]
    facts, weights = run.examples.get("losses", {}), run.recipe.loss_weights
    for name in dict.fromkeys(name for row in run.metrics for name in row.get("losses", {})):
        known = facts.get(name, {"title": name, "explanation": "", "chance": None})
        notes = [known["explanation"]] if known["explanation"] else []
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
        shown = (
            ("top-1", "top-5")
            if isinstance(last, ZeroShotResult)
            else ("text → image R@1", "image → text R@1")
        )
        every = [{measure.name: measure for measure in row.result.measures()} for row in rows]
        lines = {
            name.removesuffix(" R@1"): [measures[name].value for measures in every]
            for name in shown
        }
        first = every[-1][shown[0]]
        svg = score_chart(lines, [row.step for row in rows], first.chance).svg(f"accuracy-{number}")
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
