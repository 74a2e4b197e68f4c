"""The report of a run: one HTML file with its numbers, curves, examples and recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from markupsafe import Markup
from rich.markup import escape
from rich.table import Table

from declip.data.pair import PairSource
from declip.data.text.caption_tokenizer import CaptionTokenizer
from declip.errors import UserError
from declip.evaluation.datasets import Dataset, open_dataset, with_classes
from declip.evaluation.encode import Encoder, SourceFeatures, encode_source
from declip.evaluation.results import RetrievalResult, ZeroShotResult, short_names
from declip.evaluation.zero_shot import class_features, read_templates
from declip.io.text import percent
from declip.recipe.schema import Recipe
from declip.reports.charts import score_chart, value_chart
from declip.reports.gallery import Confusions, confusions, image_to_text, text_to_image
from declip.reports.page import render, unbalanced, write
from declip.reports.thumbnails import Thumbnails, thumbnails_of
from declip.reports.training_views import Neighbors, ShownPair, neighbors, shown_pairs
from declip.runs.folder import Run, read_run
from declip.supervision.objective import TERMS, Objective
from declip.training.trainer import Trainer

NAME = "report.html"
LIMIT = 4000
"""Held-out pairs that the galleries are made from."""

COMPARED = ("top-1", "text → image R@1", "image → text R@1")
"""Measures that are compared before and after fine-tuning."""

PROGRESS = {"lr": ("learning rate", False), "logit_scale": ("logit scale", False), "grad_norm": ("gradient norm", True)}
"""Logged quantities besides the losses: their titles, and whether they are noisy."""

NOT_AT_HAND = "The training pairs were not at hand when this report was written."

T = TypeVar("T")


class ReportModel(Encoder, Protocol):
    """An `Encoder` whose tokenizer can decode."""

    tokenizer: CaptionTokenizer


class Absent(NamedTuple):
    """The reason why a section has nothing to show."""

    why: str


class TitledChart(NamedTuple):
    """A chart, None when nothing finite was logged, with its title and, for a loss, its weight and chance level."""

    title: str
    svg: Markup | None
    explanation: str = ""
    weight: float | None = None
    chance: float | None = None


class HeldOut(NamedTuple):
    """A held-out set, its test split, and that split's features and thumbnails by row."""

    dataset: Dataset
    source: PairSource
    features: SourceFeatures
    thumbnails: Thumbnails


def write_report(
    run_folder: str | Path,
    model: ReportModel,
    *,
    recipe: Recipe | None = None,
    heldout: str | PairSource | Dataset | None = None,
    training: Trainer | None = None,
    limit: int = LIMIT,
    seed: int = 0,
) -> Path:
    """Write ``report.html`` into a run folder; a run that is not finished gets a shorter one.

    Numbers and curves are read from the folder's files. A section whose input was not given says so.

    Args:
        model: Encodes the held-out pairs and the captions that are looked up in the queue.
        recipe: By default the folder's recipe.yaml is read.
        heldout: The set of the headline and the galleries; its test split is shown. By default a set of the recipe's
            evaluation that was measured: a user's own before a built-in one, final ones before those during training.
        training: Its loader's next batch is shown, and its queue if it has one.
        limit: Held-out pairs that galleries and confusions are made from, evenly spaced.
        seed: Chooses the examples.
    """
    run = read_run(run_folder)
    if recipe is None:
        read = _or_absent(lambda: run.recipe)
        recipe = None if isinstance(read, Absent) else read
    held_out = _or_absent(lambda: _encode(model, _chosen(heldout, recipe, run), limit))
    there = None if isinstance(held_out, Absent) else held_out
    measured = sorted([row.result.dataset for row in reversed(run.evaluated)], key=_builtin_last)
    dataset = there.dataset.name if there and there.dataset.name in measured else next(iter(measured), None)

    def gallery(make: Callable[[HeldOut], T]) -> T | Absent:
        return held_out if isinstance(held_out, Absent) else _or_absent(lambda: make(held_out))

    rng = np.random.default_rng
    sources = [training.source if training else None, there.source if there else None]
    content = render(
        "run.html",
        **numbers(run, recipe, dataset, training.objective if training else None),
        recipe_text=run.recipe_text or (recipe.to_yaml() if recipe else ""),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_source=training and training.source,
        held_out=there,
        to_images=gallery(lambda held: text_to_image(held.features, held.thumbnails, rng(seed))),
        to_texts=gallery(lambda held: image_to_text(held.features, held.thumbnails, rng(seed))),
        confused=gallery(lambda held: _confused(model, held)),
        queue=training and training.objective.queue,
        neighbors=_or_absent(lambda: _neighbors(model, training, rng(seed))),
        views=_or_absent(lambda: _views(model, training, rng(seed))),
        credits=dict.fromkeys(source.credit for source in sources if source is not None and source.credit),
    )
    return write(Path(run_folder) / NAME, content)


def numbers(run: Run, recipe: Recipe | None, dataset: str | None, objective: Objective | None = None) -> dict[str, Any]:
    """The numbers and curves of a run, for the template; `dataset` is the headline's."""
    last = run.last()
    zero_shot = [row for row in last if isinstance(row.result, ZeroShotResult)]
    retrieval = [row for row in last if isinstance(row.result, RetrievalResult)]
    before = {(row.result.dataset, row.result.task): row.result for row in run.evaluated if row.step == 0}
    changed = [(row.result, before.get((row.result.dataset, row.result.task))) for row in last if row.step > 0]
    return {
        "run": run,
        "recipe": recipe,
        "dataset": dataset,
        "set_names": short_names(row.result.dataset for row in run.evaluated),
        "zero_shot": next((row.result for row in zero_shot if row.result.dataset == dataset), None),
        "retrieval": next((row.result for row in retrieval if row.result.dataset == dataset), None),
        "zero_shot_rows": [(row, unbalanced(row.result)) for row in zero_shot],  # type: ignore[arg-type]
        "retrieval_rows": retrieval,
        "changes": [
            (new.dataset, old, measure)
            for new, start in changed
            for old, measure in zip(start.measures() if start else (), new.measures(), strict=False)
            if measure.name in COMPARED
        ],
        "losses": loss_charts(run, recipe, objective) if run.metrics else [],
        "progress": [
            TitledChart(title, _svg(title, run, column, noisy)) for column, (title, noisy) in PROGRESS.items()
        ],
        "accuracy": accuracy_charts(run),
        "skipped": sorted((run.skipped or {}).items(), key=lambda item: -item[1]["count"]),
    }


def loss_charts(run: Run, recipe: Recipe | None, objective: Objective | None) -> list[TitledChart]:
    """The total and each loss."""
    charts = [TitledChart("total", _svg("total", run, "loss"), "The weighted sum, which training minimizes.")]
    for name in run.terms:
        term = TERMS.get(name)
        title = getattr(term, "title", name)  # a user's own term may have none
        weight = recipe.loss_weights.get(name) if recipe else None
        own: Any = dict(objective.terms.items()).get(name) if objective else None
        chance = own.chance(recipe.train.batch_size) if own and recipe else None
        svg = _svg(title, run, f"losses.{name}")
        charts.append(TitledChart(title, svg, term.explanation if term else "", weight, chance))
    return charts


def changes_table(run: Run) -> Table:
    """The measures of a fine-tuned run on each set, before and after, for the terminal."""
    table = Table("set", "measure", "start", "best", "change", "n")
    names = short_names(row.result.dataset for row in run.evaluated)
    before = {(row.result.dataset, row.result.task): row.result for row in run.evaluated if row.step == 0}
    for row in run.last():
        new, old = row.result, before.get((row.result.dataset, row.result.task))
        olds = {measure.name: measure.value for measure in old.measures()} if old else {}
        for measure in new.measures():
            if measure.name not in COMPARED:
                continue
            start = olds.get(measure.name)
            shown = f"chance {percent(measure.chance)}" if start is None else percent(start)
            change = "" if start is None else f"{100 * (measure.value - start):+.1f}"
            table.add_row(
                escape(names[new.dataset]), measure.name, shown, percent(measure.value), change, f"{measure.n:,}"
            )
        if isinstance(new, RetrievalResult) and new.loss is not None:
            start = old.loss if isinstance(old, RetrievalResult) else None
            numbers = ("", f"{new.loss:.3f}", "") if start is None else (f"{start:.3f}", f"{new.loss:.3f}", "")
            table.add_row(escape(names[new.dataset]), "validation loss", *numbers, f"{new.images:,}")
    return table


def _svg(title: str, run: Run, column: str, noisy: bool = True) -> Markup | None:
    chart = value_chart(title, run.steps, run.column(column), noisy)
    return None if chart is None else chart.svg(f"chart-{column}")


def accuracy_charts(run: Run) -> list[TitledChart]:
    """Held-out accuracy over the steps, of everything that was measured more than once."""
    charts = []
    names = short_names(row.result.dataset for row in run.evaluated)
    for number, (dataset, task) in enumerate(dict.fromkeys((r.result.dataset, r.result.task) for r in run.evaluated)):
        rows = run.measured(task, dataset)
        zero_shot = isinstance(rows[0].result, ZeroShotResult)
        if len(rows) < 2 or not isinstance(rows[0].result, ZeroShotResult | RetrievalResult):
            continue
        every = [{measure.name: measure for measure in row.result.measures()} for row in rows]
        shown = ("top-1", "top-5") if zero_shot else COMPARED[1:]
        lines = {name.removesuffix(" R@1"): [measures[name].value for measures in every] for name in shown}
        svg = score_chart(lines, [row.step for row in rows], every[-1][shown[0]].chance).svg(f"accuracy-{number}")
        title = "zero-shot classification" if zero_shot else "retrieval, R@1"
        charts.append(TitledChart(title, svg, f"{names[dataset]}, n = {every[-1][shown[0]].n:,}"))
    return charts


def _builtin_last(name: str) -> bool:
    return name.startswith("builtin:")


def _chosen(heldout: str | PairSource | Dataset | None, recipe: Recipe | None, run: Run) -> Dataset:
    """The set of the galleries; see `write_report`."""
    if heldout is not None:
        return open_dataset(heldout)
    sets = recipe and recipe.evaluation
    names = [*sets.final_zero_shot, *sets.zero_shot, *sets.final_retrieval, *sets.retrieval] if sets else []
    if not names:
        raise UserError("The recipe names no source under `evaluation`, so there are no held-out pairs to show.")
    measured = {row.result.dataset for row in run.evaluated}
    return open_dataset(min(names, key=lambda name: (name not in measured, _builtin_last(name))))


def _encode(model: Encoder, dataset: Dataset, limit: int) -> HeldOut:
    source = dataset.split("test")
    places = np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(np.int64)
    features = encode_source(model, source, indices=places.tolist())
    at = thumbnails_of(source)
    return HeldOut(dataset, source, features, lambda row: at(int(features.indices[row])))


def _confused(model: Encoder, held_out: HeldOut) -> Confusions:
    source = with_classes(held_out.source)
    _, templates = read_templates(held_out.dataset.templates)
    classes = class_features(model, source.class_names, templates)
    labels = np.asarray(source.labels)[held_out.features.indices]
    return confusions(held_out.features, labels, source.class_names, classes, held_out.thumbnails)


def _neighbors(model: Encoder, training: Trainer | None, rng: np.random.Generator) -> Neighbors:
    if training is None:
        raise UserError(NOT_AT_HAND)
    queue = training.objective.queue
    if queue is None:
        raise UserError("This run keeps no queue: its nearest_neighbor term has no weight.")
    nearest = neighbors(model, queue, training.source, training.shown_loader, rng)
    if nearest is None:
        raise UserError("The queue holds no entry that names its pair.")
    return nearest


def _views(model: ReportModel, training: Trainer | None, rng: np.random.Generator) -> list[ShownPair]:
    if training is None:
        raise UserError(NOT_AT_HAND)
    batch = next(training.shown_loader)
    if len(batch) == 0:
        raise UserError("The next batch holds no pair that can be read.")
    return shown_pairs(batch, training.source, training.plan, model.tokenizer, rng)


def _or_absent(make: Callable[[], T]) -> T | Absent:
    try:
        return make()
    except UserError as error:
        return Absent(str(error))
