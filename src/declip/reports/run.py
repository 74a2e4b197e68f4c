"""The report of a run: one HTML file with its numbers, curves, examples and recipe."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from declip.closed_form.heads import FEWEST
from declip.data.images.thumbnails import thumbnails_of
from declip.data.pair import PairSource
from declip.errors import UserError
from declip.evaluation.encode import Encoder, SourceFeatures, encode_source
from declip.evaluation.results import Measure, Result, RetrievalResult, ZeroShotResult, short_names
from declip.evaluation.retrieval import carriers_of, ranks
from declip.io.atomic import write_text
from declip.io.text import about, percent
from declip.reports.charts import growth_chart, score_chart, value_chart
from declip.reports.page import NONE, Table, points, render
from declip.runs.folder import Run, log, read_run
from declip.training.evaluations import HeldOutSets

NAME = "report.html"
PROGRESS = {"lr": ("learning rate", False), "logit_scale": ("logit scale", False), "grad_norm": ("gradient norm", True)}
"""Logged quantities besides the losses: their titles, and whether they are noisy."""

SHOWN = 5  # candidates of a query
LEAST_GAIN = 0.01  # of the percentile; if the interval ends below it, more pairs show no useful gain
MOST_TIMES = 10  # times as many pairs, up to which their number is stated


def write_report(folder: Path, model: Encoder, limit: int = 4_000, held_out: HeldOutSets | None = None) -> Path:
    """Write ``report.html`` into a run folder, from its files; the model encodes up to `limit` held-out pairs.

    A section whose input cannot be read is left out with a warning.
    """
    run = read_run(folder)
    # --- headline and examples: the user's own set before a built-in one, final ones before those during training
    sets = run.recipe.evaluation
    names = [*sets.final_zero_shot, *sets.zero_shot, *sets.final_retrieval, *sets.retrieval]
    dataset = min(names, key=lambda name: name.startswith("builtin:"), default=None)
    results = [row.result for row in run.last() if row.result.dataset == dataset]
    # --- tables and examples
    embeds = getattr(model, "token_scorer", None) is None  # else embeddings are not trained
    encoded = _encode(model, held_out or HeldOutSets(run.recipe), dataset, limit) if dataset and embeds else None
    source, grown = run.examples.get("source"), run.cross_validation.get("growth", {})
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
        fitted=fitted_lines(run),
        growth=growth_chart(grown).svg("growth") if grown.get("measured") else None,
        losses=loss_charts(run) if run.metrics else [],
        progress=[_curve(run, title, key, noisy=noisy) for key, (title, noisy) in PROGRESS.items()],
        accuracy=accuracy_charts(run),
        skipped_table=skipped_table(run),
        held_out=encoded,
        retrieved=encoded and retrieval(**encoded, rng=np.random.default_rng(0)),
        credits=list(dict.fromkeys(filter(None, credits))),
    )
    return write_text(folder / NAME, content)


def skipped_table(run: Run) -> Table:
    """List why pairs were skipped, the most frequent reason first."""
    skipped = sorted((run.skipped or {"reasons": {}})["reasons"].items(), key=lambda item: -item[1]["count"])
    reasons = tuple((reason, ", ".join(row["examples"]), f"{row['count']:,}") for reason, row in skipped)
    return Table("Skipped pairs", ("reason", "for example", "times"), reasons, texts=2)


def fitted_lines(run: Run) -> list[str]:
    """Describe heads in closed form and what cross-validation says about them, or the mixture with the start."""
    fitted = run.cross_validation
    mixture = run.mixture
    names = short_names({name for scores in mixture.get("scores", {}).values() for name in scores})
    verdict = verdict_of(fitted["gain"], fitted["pairs"]) if "gain" in fitted else None
    context = {"mixture": mixture, "names": names, "fewest": FEWEST, "verdict": verdict}
    text = render("fitted.txt", it=fitted, **context)
    return text.strip().splitlines()


class Verdict(NamedTuple):
    """Whether left-out pairs are ranked better than before."""

    kind: Literal["better", "no better", "unclear"]
    more: int = 0  # pairs that would decide, if it is unclear; 0 for more than `MOST_TIMES` as many


def verdict_of(gain: Mapping[str, float], pairs: int) -> Verdict:
    """Judge a gain by its 95 % interval, whose width falls with the root of the number of pairs."""
    value, low, high = gain["value"], gain["low"], gain["high"]
    if low > 0:
        return Verdict("better")
    if value <= 0 or high < LEAST_GAIN:
        return Verdict("no better")
    times = ((value - low) / value) ** 2
    return Verdict("unclear", ceil(pairs * (times - 1)) if times <= MOST_TIMES else 0)


def measures_table(run: Run) -> Table:
    """List the last evaluation of each set, one measure a row; for a fine-tuned run also the values at its start."""
    names, rows = short_names(row.result.dataset for row in run.evaluated), []
    # A fine-tuned run was also evaluated at its start, as step 0.
    started = {(row.result.dataset, row.result.task): row.result for row in run.evaluated if row.step == 0}
    for row in run.last():
        result, first = row.result, started.get((row.result.dataset, row.result.task))
        before = {measure.name: measure.value for measure in first.measures()} if first else {}
        for measure in result.measures():
            start = before.get(measure.name)
            change = (NONE, NONE) if start is None else (percent(start), points(measure.value - start))
            rows.append((names[result.dataset], *_numbers(measure), f"{row.weights:,}", *change))
        if isinstance(result, RetrievalResult) and result.loss is not None:
            old = f"{first.loss:.3f}" if isinstance(first, RetrievalResult) and first.loss is not None else NONE
            numbers = (f"{result.loss:.3f}", NONE, NONE, f"{result.images:,}", f"{row.weights:,}", old, NONE)
            rows.append((names[result.dataset], "validation loss", *numbers))
    columns = ("set", "measure", "value", "chance", "× chance", "n", "step", "before", "change, points")
    shown = len(columns) if started else -2
    return Table("All last evaluations", columns[:shown], tuple(row[:shown] for row in rows), texts=2)


def results_table(results: Sequence[Result]) -> Table:
    """List every score of some results, and the numbers of skipped pairs and truncated captions."""
    names, rows = short_names(result.dataset for result in results), []
    for result in results:
        rows += [(names[result.dataset], *_numbers(measure)) for measure in result.measures()]
        notes = dict(result.skipped)
        if isinstance(result, RetrievalResult):
            notes["captions longer than the model's context"] = result.truncated_captions
        if isinstance(result, ZeroShotResult) and result.by_tokens:
            notes["images whose patches were compared with words"] = result.n
        rows += [
            (names[result.dataset], note, NONE, NONE, NONE, f"{count:,}") for note, count in notes.items() if count
        ]
    return Table("Results", ("set", "measure", "value", "chance", "× chance", "n"), tuple(rows), texts=2)


def _numbers(measure: Measure) -> tuple[str, ...]:
    """Name, value, chance level with that of the largest class, multiple of chance, and n."""
    largest = "" if measure.majority is None else f" (largest class {percent(measure.majority)})"
    chance = percent(measure.chance) + largest, about(measure.times_chance)
    return measure.name, percent(measure.value), *chance, f"{measure.n:,}"


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
        shown = ("top-1", "top-5") if isinstance(last, ZeroShotResult) else ("text → image R@1", "image → text R@1")
        every = [{measure.name: measure for measure in row.result.measures()} for row in rows]
        lines = {name.removesuffix(" R@1"): [measures[name].value for measures in every] for name in shown}
        first = every[-1][shown[0]]
        svg = score_chart(lines, [row.step for row in rows], first.chance).svg(f"accuracy-{number}")
        explanation = f"{names[last.dataset]}, n = {first.n:,}"
        charts.append({"title": last.task, "svg": svg, "explanation": explanation})
    return charts


def _curve(run: Run, title: str, column: str, explanation: str = "", noisy: bool = True) -> dict[str, Any]:
    chart = value_chart(title, run.steps, run.column(column), noisy)
    return {"title": title, "svg": chart and chart.svg(f"chart-{column}"), "explanation": explanation}


def _encode(model: Encoder, held_out: HeldOutSets, name: str, limit: int) -> dict[str, Any] | None:
    try:
        source = held_out.test(name)
        rows = np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(np.int64)
        features = encode_source(model, source, indices=rows.tolist())
    except UserError as error:
        log.warning("The report shows no retrieved images: %s", error)
        return None
    return {"source": source, "features": features}


def retrieval(
    source: PairSource, features: SourceFeatures, rng: np.random.Generator, each: int = 4
) -> tuple[list[dict[str, Any]], float]:
    """Pick random captions, `each` of those that rank their image first and of the others, with the nearest images.

    Returns:
        The captions, each with its nearest images and the rank of the first correct one, and the fraction of all
        captions that rank their image first. An image is correct if it has the caption.
    """
    assert features.texts is not None
    thumbnails, indices = thumbnails_of(source), features.indices
    captions, carriers = features.flat_captions, carriers_of(features)
    correct = [carriers[caption] for caption in captions]
    rank = ranks(features.texts, features.images, correct)
    # --- random captions of distinct images, first those that rank their image first
    chosen: dict[int, int] = {}  # image → one of its captions
    for group in (np.flatnonzero(rank == 1), np.flatnonzero(rank > 1)):
        by_image = {int(features.image_rows[row]): row for row in rng.permutation(group).tolist()}
        chosen |= dict([(image, row) for image, row in by_image.items() if image not in chosen][:each])
    # --- the nearest images of each
    queries = []
    for row in chosen.values():
        nearest = (features.images @ features.texts[row]).topk(min(SHOWN, len(features))).indices  # (SHOWN,)
        hits = [
            {"caption": features.captions[i][0], "image": thumbnails(int(indices[i])), "correct": i in correct[row]}
            for i in nearest.tolist()
        ]
        queries.append({"caption": captions[row], "hits": hits, "rank": int(rank[row])})
    return queries, float(np.mean(rank == 1))
