"""The report of a run: one HTML file with its numbers, curves, examples and recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from markupsafe import Markup

from declip.data.loader import PairLoader
from declip.data.pair import PairSource
from declip.data.plan import Plan
from declip.data.text.caption_tokenizer import CaptionTokenizer
from declip.errors import UserError
from declip.evaluation.datasets import Dataset, open_dataset, with_classes
from declip.evaluation.encode import Encoder, SourceFeatures, encode_source
from declip.evaluation.results import Measure, RecallAtK, RetrievalResult, ZeroShotResult, short_names
from declip.evaluation.zero_shot import class_features, read_templates
from declip.recipe.schema import Recipe
from declip.reports.charts import Scores, score_chart, value_chart
from declip.reports.gallery import Confusions, confusions, image_to_text, text_to_image
from declip.reports.page import render, unbalanced, write
from declip.reports.thumbnails import ThumbnailCache
from declip.reports.training_views import Neighbors, ShownPair, TextLookup, neighbors, shown_pairs
from declip.runs.folder import Evaluated, Run, read_run
from declip.supervision.objective import TERMS, Objective

NAME = "report.html"
LIMIT = 4000
"""Held-out pairs that the galleries are made from."""

COMPARED = ("top-1", "text → image R@1", "image → text R@1")
"""Measures that are compared before and after fine-tuning."""

PROGRESS = {"lr": ("learning rate", False), "logit_scale": ("logit scale", False), "grad_norm": ("gradient norm", True)}
"""Logged quantities besides the losses: their titles, and whether they are noisy."""

T = TypeVar("T")


class ReportModel(Encoder, Protocol):
    """An `Encoder` whose tokenizer can decode."""

    tokenizer: CaptionTokenizer


@dataclass(frozen=True)
class Absent:
    """The reason why a section has nothing to show."""

    why: str


@dataclass(frozen=True)
class TitledChart:
    """A chart, None when nothing finite was logged, with its title and, for a loss, its weight and chance level."""

    title: str
    svg: Markup | None
    explanation: str = ""
    weight: float | None = None
    chance: float | None = None


@dataclass(frozen=True)
class _HeldOut:
    """A held-out set, its test split and the features of that split."""

    dataset: Dataset
    source: PairSource
    features: SourceFeatures
    thumbnails: ThumbnailCache
    seed: int

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


def write_report(
    run_folder: str | Path,
    model: ReportModel,
    *,
    recipe: Recipe | None = None,
    heldout: str | PairSource | Dataset | None = None,
    train_source: PairSource | None = None,
    plan: Plan | None = None,
    loader: PairLoader | None = None,
    objective: Objective | None = None,
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
        plan: The views of the training pairs.
        loader: The training loader; its next batch is shown.
        objective: Its queue is shown if it has one.
        limit: Held-out pairs that galleries and confusions are made from, evenly spaced.
        seed: Chooses the examples.
    """
    run = read_run(run_folder)
    recipe = recipe or _recipe_of(run)
    rng = np.random.default_rng(seed)
    held_out = _or_absent(lambda: _encode(model, _chosen(heldout, recipe, run), limit, seed))
    shown = None if isinstance(held_out, Absent) else held_out
    dataset = _headline_set(run, shown.dataset.name if shown else None)
    content = render(
        "run.html",
        **numbers(run, recipe, dataset, objective),
        recipe_text=run.recipe_text or (recipe.to_yaml() if recipe else ""),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_source=train_source,
        held_out=shown,
        to_images=_and_then(held_out, lambda set: text_to_image(set.features, set.thumbnails, set.generator())),
        to_texts=_and_then(held_out, lambda set: image_to_text(set.features, set.thumbnails, set.generator())),
        confused=_and_then(held_out, lambda set: _confused(model, set)),
        neighbors=_or_absent(lambda: _neighbors(model, recipe, objective, train_source, loader, rng)),
        views=_or_absent(lambda: _views(model, train_source, plan, loader, rng)),
        credits=_credits(train_source, shown.source if shown else None),
    )
    return write(Path(run_folder) / NAME, content)


def numbers(run: Run, recipe: Recipe | None, dataset: str | None, objective: Objective | None = None) -> dict[str, Any]:
    """The numbers and curves of a run, for the template; `dataset` is the headline's."""
    last = run.last()
    zero_shot = [row for row in last if isinstance(row.result, ZeroShotResult)]
    retrieval = [row for row in last if isinstance(row.result, RetrievalResult)]
    return {
        "run": run,
        "recipe": recipe,
        "dataset": dataset,
        "set_names": short_names(row.result.dataset for row in run.evaluated),
        "zero_shot": next((row.result for row in zero_shot if row.result.dataset == dataset), None),
        "retrieval": next((row.result for row in retrieval if row.result.dataset == dataset), None),
        "zero_shot_rows": [(row, unbalanced(row.result)) for row in zero_shot],  # type: ignore[arg-type]
        "retrieval_rows": [(row, *direction) for row in retrieval for direction in directions(row)],
        "changes": changes(run),
        "losses": loss_charts(run, recipe, objective) if run.metrics else [],
        "progress": progress_charts(run) if run.metrics else [],
        "accuracy": accuracy_charts(run),
        "skipped": sorted((run.skipped or {}).items(), key=lambda item: -item[1]["count"]),
    }


def directions(row: Evaluated) -> list[tuple[str, RecallAtK]]:
    """Both directions of a retrieval result."""
    assert isinstance(row.result, RetrievalResult)
    return [("text → image", row.result.text_to_image), ("image → text", row.result.image_to_text)]


def changes(run: Run) -> list[tuple[str, Measure, Measure]]:
    """Measures before the first step and at the last evaluation, of every set that has both."""
    before = {(row.result.dataset, row.result.task): row.result for row in run.evaluated if row.step == 0}
    return [
        (row.result.dataset, old, new)
        for row in run.last()
        if row.step > 0 and (start := before.get((row.result.dataset, row.result.task))) is not None
        for old, new in zip(start.measures(), row.result.measures(), strict=True)
        if old.name in COMPARED
    ]


def loss_charts(run: Run, recipe: Recipe | None, objective: Objective | None) -> list[TitledChart]:
    """The total and each loss."""
    charts = [TitledChart("total", _svg("total", run, "loss"), "The weighted sum, which training minimizes.")]
    for name in run.terms:
        term = TERMS.get(name)
        title = term.title if term else name
        weight = recipe.loss_weights.get(name) if recipe else None
        own: Any = dict(objective.terms.items()).get(name) if objective else None
        chance = own.chance(recipe.train.batch_size) if own and recipe else None
        svg = _svg(title, run, f"losses.{name}")
        charts.append(TitledChart(title, svg, term.explanation if term else "", weight, chance))
    return charts


def progress_charts(run: Run) -> list[TitledChart]:
    """Learning rate, logit scale and gradient norm."""
    return [TitledChart(title, _svg(title, run, name, noisy)) for name, (title, noisy) in PROGRESS.items()]


def _svg(title: str, run: Run, column: str, noisy: bool = True) -> Markup | None:
    chart = value_chart(title, run.steps, run.column(column), noisy)
    return None if chart is None else chart.svg(f"chart-{column}")


def accuracy_charts(run: Run) -> list[TitledChart]:
    """Held-out accuracy over the steps, of everything that was measured more than once."""
    charts = []
    names = short_names(row.result.dataset for row in run.evaluated)
    measured = dict.fromkeys((row.result.dataset, row.result.task) for row in run.evaluated)
    for number, (dataset, task) in enumerate(measured):
        rows = run.measured(task, dataset)
        steps, last = [row.step for row in rows], rows[-1].result
        if len(rows) < 2 or not isinstance(last, ZeroShotResult | RetrievalResult):
            continue
        every = [{measure.name: measure for measure in row.result.measures()} for row in rows]
        shown = ("top-1", "top-5") if isinstance(last, ZeroShotResult) else COMPARED[1:]
        lines = [Scores(name.removesuffix(" R@1"), steps, [each[name].value for each in every]) for name in shown]
        chart = score_chart(lines, every[-1][shown[0]].chance)
        title = "zero-shot classification" if isinstance(last, ZeroShotResult) else "retrieval, R@1"
        charts.append(
            TitledChart(title, chart.svg(f"accuracy-{number}"), f"{names[dataset]}, n = {last.measures()[0].n:,}")
        )
    return charts


def _headline_set(run: Run, preferred: str | None) -> str | None:
    """The preferred set if it was measured, else the last one measured, a user's own before a built-in one."""
    names = sorted((row.result.dataset for row in run.evaluated), key=lambda name: not name.startswith("builtin:"))
    return preferred if preferred in names else names[-1] if names else None


def _recipe_of(run: Run) -> Recipe | None:
    """The recipe in the folder; None when there is none or it is of another version."""
    try:
        return run.recipe
    except UserError:
        return None


def _chosen(heldout: str | PairSource | Dataset | None, recipe: Recipe | None, run: Run) -> Dataset:
    """The set of the galleries; see `write_report`."""
    if heldout is not None:
        return open_dataset(heldout)
    names = _candidates(recipe) if recipe is not None else []
    if not names:
        raise UserError("The recipe names no source under `evaluation`, so there are no held-out pairs to show.")
    measured = {row.result.dataset for row in run.evaluated}
    return open_dataset(next((name for name in names if name in measured), names[0]))


def _candidates(recipe: Recipe) -> list[str]:
    """Sets of the recipe's evaluation: a user's own first, and of those the ones measured in both ways."""
    wanted = recipe.evaluation
    last = [name for name in wanted.final_zero_shot if name in wanted.final_retrieval]
    during = [name for name in wanted.zero_shot if name in wanted.retrieval]
    others = (*wanted.final_zero_shot, *wanted.zero_shot, *wanted.final_retrieval, *wanted.retrieval)
    names = dict.fromkeys((*last, *during, *others))
    return sorted(names, key=lambda name: name.startswith("builtin:"))


def _encode(model: Encoder, dataset: Dataset, limit: int, seed: int) -> _HeldOut:
    source = dataset.split("test")
    places = np.arange(len(source))
    if len(places) > limit:
        places = np.linspace(0, len(source) - 1, limit).round().astype(np.int64)
    features = encode_source(model, source, indices=places.tolist())
    return _HeldOut(dataset, source, features, ThumbnailCache(source), seed)


def _confused(model: Encoder, held_out: _HeldOut) -> Confusions:
    source = with_classes(held_out.source)
    _, templates = read_templates(held_out.dataset.templates)
    classes = class_features(model, source.class_names, templates)
    labels = np.asarray(source.labels)[held_out.features.indices]
    return confusions(held_out.features, labels, source.class_names, classes, held_out.thumbnails)


def _neighbors(
    model: Encoder,
    recipe: Recipe | None,
    objective: Objective | None,
    source: PairSource | None,
    loader: TextLookup | None,
    rng: np.random.Generator,
) -> Neighbors:
    if objective is None:
        raise UserError("The objective was not at hand when this report was written, so there is no queue to show.")
    queue = objective.queue
    if queue is None:
        name = f"The recipe '{recipe.name}'" if recipe is not None else "This run"
        raise UserError(f"{name} keeps no queue: its nearest_neighbor term has no weight.")
    if source is None or loader is None:
        raise UserError("The training pairs were not at hand when this report was written.")
    if len(queue) == 0:
        raise UserError("The queue is still empty.")
    nearest = neighbors(model, queue, source, loader, rng)
    if nearest is None:
        raise UserError("The queue's entries do not say which pairs they are, so their captions cannot be shown.")
    return nearest


def _views(
    model: ReportModel,
    source: PairSource | None,
    plan: Plan | None,
    loader: PairLoader | None,
    rng: np.random.Generator,
) -> list[ShownPair]:
    if source is None or plan is None or loader is None:
        raise UserError("The training pairs were not at hand when this report was written.")
    batch = next(loader)
    if len(batch) == 0:
        raise UserError("The next batch holds no pair that can be read.")
    return shown_pairs(batch, source, plan, model.tokenizer, rng)


def _or_absent(make: Callable[[], T]) -> T | Absent:
    try:
        return make()
    except UserError as error:
        return Absent(str(error))


def _and_then(held_out: _HeldOut | Absent, make: Callable[[_HeldOut], T]) -> T | Absent:
    return held_out if isinstance(held_out, Absent) else _or_absent(lambda: make(held_out))


def _credits(*sources: PairSource | None) -> list[str]:
    """Who made the images that are shown, where the sources say so."""
    given = (source.credit for source in sources if source is not None)
    return list(dict.fromkeys(credit for credit in given if credit))
