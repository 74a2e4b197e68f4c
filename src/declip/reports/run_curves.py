"""Which curves a report shows, what they are called and what they mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log

from markupsafe import Markup

from declip.evaluation.results import RetrievalResult, ZeroShotResult, short_names
from declip.recipe.schema import Recipe
from declip.reports.charts import Line, accuracy_chart, term_chart
from declip.runs.records import Run

TERMS: Mapping[str, tuple[str, str]] = {
    "loss": ("Total", "The weighted sum that is minimised."),
    "contrastive": (
        "Image and caption",
        "In each batch every image looks for its caption, and every caption for its image.",
    ),
    "multi_view": ("Other views", "The same for the other pairings of two views and two wordings."),
    "simsiam": ("Image with itself", "One view of an image predicts the other; −1 is perfect."),
    "masked_language": ("Hidden words", "Words of the caption are hidden and have to be guessed."),
    "nearest_neighbor": ("Nearest neighbor", "Every image looks for a caption like its own, from the queue."),
    "simclr": ("Image among images", "One view of an image looks for the other among all views of the batch."),
    "late_interaction": ("Patches and words", "Image and caption are compared patch by patch, word by word."),
}

AGAINST_BATCH = {"contrastive", "multi_view", "nearest_neighbor", "late_interaction"}
"""Terms that pick one of the batch, so that guessing gives ln(batch)."""

EXACT = {"lr", "logit_scale"}
"""Quantities without noise, which smoothing would only distort."""

PROGRESS: Mapping[str, tuple[str, str]] = {
    "lr": ("Learning rate", "Size of the steps: a warm-up, then a cosine."),
    "logit_scale": ("Logit scale", "How sharply the model decides: the inverse temperature, learned."),
    "grad_norm": ("Gradient norm", "Before clipping; a jump that stays is a warning."),
}


@dataclass(frozen=True)
class Curve:
    """A small chart with its name and a line of explanation."""

    title: str
    note: str
    chart: Markup


def term_curves(run: Run, recipe: Recipe | None) -> list[Curve]:
    """The total and each term."""
    curves = []
    for name in ("loss", *run.terms):
        title, note = TERMS.get(name, (name, ""))
        if recipe is not None and name in recipe.active_losses:
            note += f" Weight {recipe.loss_weights[name]:g}."
            if name in AGAINST_BATCH:
                note += f" Guessing gives\N{NO-BREAK SPACE}{log(recipe.train.batch_size):.2f}."
        column = "loss" if name == "loss" else f"losses.{name}"
        curves.append(Curve(title, note.strip(), term_chart(title, run.steps, run.column(column))))
    return curves


def progress_curves(run: Run) -> list[Curve]:
    """What went on beside the terms."""
    return [
        Curve(title, note, term_chart(title, run.steps, run.column(name), noisy=name not in EXACT))
        for name, (title, note) in PROGRESS.items()
    ]


def accuracy_curves(run: Run) -> list[Curve]:
    """Held-out accuracy over the steps, of everything that was measured more than once."""
    curves = []
    names = short_names(row.result.on for row in run.evaluations)
    for on, protocol in dict.fromkeys((row.result.on, row.result.protocol) for row in run.evaluations):
        rows = run.measured(protocol, on)
        steps = [row.step for row in rows]
        results = [row.result for row in rows]
        if len(rows) < 2:
            continue
        last = results[-1]
        if isinstance(last, ZeroShotResult):
            lines = [
                Line(name, steps, [getattr(result, field) for result in results])
                for name, field in (("top-1", "top1"), ("top-5", "top5"))
            ]
            note = f"Zero-shot on {names[on]}: {last.n:,} images, {last.classes:,} names."
            curves.append(Curve("Naming held-out images", note, accuracy_chart(lines, last.chance)))
        elif isinstance(last, RetrievalResult):
            lines = [
                Line(name, steps, [getattr(result, direction).r1 for result in results])
                for name, direction in (("text→image", "text_to_image"), ("image→text", "image_to_text"))
            ]
            note = f"R@1 on {names[on]}: {last.images:,} images, {last.texts:,} captions."
            chart = accuracy_chart(lines, last.text_to_image.chance1)
            curves.append(Curve("Finding the right one first", note, chart))
    return curves
