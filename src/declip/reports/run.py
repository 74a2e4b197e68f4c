"""The report of a run: one HTML file to look at, with nothing to load from elsewhere."""

import datetime
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError

from declip.data.batch import PairBatch
from declip.data.pair import PairSource
from declip.data.plan import Plan
from declip.data.text.caption_tokenizer import CaptionTokenizer
from declip.errors import UserError
from declip.evaluation.datasets import Dataset, open_dataset, with_classes
from declip.evaluation.encode import Encoder, SourceFeatures, encode_source
from declip.evaluation.results import short_names
from declip.evaluation.zero_shot import class_features, read_templates
from declip.io.atomic import atomic_write
from declip.recipe.load import read_yaml
from declip.recipe.schema import Recipe
from declip.reports.gallery import Confusions, Gallery, confusions, image_to_text, text_to_image
from declip.reports.headline import changes, figures, lead, naming_rows, primary, retrieval_rows, share
from declip.reports.run_curves import accuracy_curves, progress_curves, term_curves
from declip.reports.thumbnails import Pictures, short
from declip.reports.training_views import Neighbors, Seen, Wording, neighbors, views
from declip.runs.records import Run, read_run
from declip.supervision.nearest_neighbor import Queue

NAME = "report.html"
LIMIT = 4000  # held-out pairs that the galleries are made from

T = TypeVar("T")


class ReportModel(Encoder, Protocol):
    """An `Encoder` whose tokenizer can decode."""

    tokenizer: CaptionTokenizer


class Loader(Wording, Iterator[PairBatch], Protocol):
    """What a report needs of a `PairLoader`: a batch, and which words a pair showed when."""


class HasQueue(Protocol):
    """An objective: its queue is None when the nearest-neighbor term has no weight."""

    @property
    def queue(self) -> Queue | None: ...


@dataclass(frozen=True)
class Absent:
    """Why a section has nothing to show."""

    why: str


@dataclass(frozen=True)
class _HeldOut:
    """A held-out set, its test split and that split encoded."""

    dataset: Dataset
    source: PairSource
    features: SourceFeatures
    pictures: Pictures
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
    loader: Loader | None = None,
    objective: HasQueue | None = None,
    limit: int = LIMIT,
    seed: int = 0,
) -> Path:
    """Write ``report.html`` into a run folder, of what there is: a run that is not finished gets a shorter one.

    Numbers and curves are read from the folder's files. A section whose input was not given says so.

    Args:
        run_folder: Holds recipe.yaml, metrics.jsonl, evaluations.jsonl, skipped.json, as far as written.
        model: Encodes the held-out pairs and the captions that look into the queue.
        recipe: The run's recipe; by default the folder's recipe.yaml is read.
        heldout: What the headline and the galleries are about; of a set, its test split. By default a source of the
            recipe's evaluation that was measured already: the final ones first, and of those one with both protocols.
        train_source: The training pairs.
        plan: The views of the training pairs.
        loader: The training loader; its next batch is shown.
        objective: The run's objective; its queue is looked into if it has one.
        limit: Held-out pairs that galleries and confusions are made from, evenly spaced; all if there are fewer.
        seed: Chooses what is shown.

    Returns:
        The path of the report.

    Raises:
        UserError: there is no such folder, or it cannot be written to.
    """
    run = read_run(run_folder)
    recipe = recipe or _recipe_of(run)
    rng = np.random.default_rng(seed)
    held_out = _or_absent(lambda: _encode(model, _chosen(heldout, recipe, run), limit, seed))
    on = primary(run, None if isinstance(held_out, Absent) else held_out.dataset.name)
    content = _render(
        run=run,
        on=on,
        set_names=short_names(row.result.on for row in run.evaluations),
        recipe=recipe,
        recipe_text=run.recipe or (recipe.to_yaml() if recipe else ""),
        facts=_facts(run, recipe, model, train_source),
        lead=lead(run, on),
        figures=figures(run, on),
        naming=naming_rows(run.last()),
        retrieval=retrieval_rows(run.last()),
        changes=changes(run),
        terms=term_curves(run, recipe),
        progress=progress_curves(run) if run.metrics else [],
        accuracy=accuracy_curves(run),
        held_out=held_out,
        shown=_extent(held_out),
        to_images=_and_then(held_out, _to_images),
        to_texts=_and_then(held_out, _to_texts),
        confused=_and_then(held_out, lambda each: _confused(model, each)),
        neighbors=_or_absent(lambda: _neighbors(model, recipe, objective, train_source, loader, rng)),
        views=_or_absent(lambda: _views(model, train_source, plan, loader, rng)),
        unread=_unread(run),
        credits=_credits(train_source, None if isinstance(held_out, Absent) else held_out.source),
    )
    path = Path(run_folder) / NAME
    with atomic_write(path) as beside:
        beside.write_text(content, encoding="utf-8")
    return path


def _render(**content: Any) -> str:
    folder = resources.files("declip.reports") / "templates"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["percent"] = share
    environment.filters["short"] = short
    return environment.from_string((folder / "report.html").read_text(encoding="utf-8")).render(
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        version=metadata.version("declip"),
        date=datetime.datetime.now().strftime("%d %B %Y, %H:%M"),
        **content,
    )


def _recipe_of(run: Run) -> Recipe | None:
    """The recipe in the folder; None when there is none or it is of another version."""
    try:
        tree = read_yaml(run.recipe)
        return Recipe.model_validate(tree) if tree else None
    except (ValidationError, yaml.YAMLError):
        return None


def _chosen(heldout: str | PairSource | Dataset | None, recipe: Recipe | None, run: Run) -> Dataset:
    """The held-out set that the report is about; see `write_report`."""
    if heldout is not None:
        return open_dataset(heldout)
    names = _candidates(recipe) if recipe is not None else []
    if not names:
        raise UserError("The recipe names no source under `evaluation`, so there are no held-out pairs to show.")
    measured = {row.result.on for row in run.evaluations}
    return open_dataset(next((name for name in names if name in measured), names[0]))


def _candidates(recipe: Recipe) -> list[str]:
    """Sources of the recipe's evaluation, those first that a report can say most about."""
    wanted = recipe.evaluation
    last = [name for name in wanted.final_zero_shot if name in wanted.final_retrieval]
    during = [name for name in wanted.zero_shot if name in wanted.retrieval]
    others = (*wanted.final_zero_shot, *wanted.zero_shot, *wanted.final_retrieval, *wanted.retrieval)
    return list(dict.fromkeys((*last, *during, *others)))


def _encode(model: Encoder, dataset: Dataset, limit: int, seed: int) -> _HeldOut:
    source = dataset.split("test")
    places = np.arange(len(source))
    if len(places) > limit:
        places = np.linspace(0, len(source) - 1, limit).round().astype(np.int64)
    features = encode_source(model, source, indices=places.tolist())
    return _HeldOut(dataset, source, features, Pictures(source), seed)


def _to_images(held_out: _HeldOut) -> Gallery:
    return text_to_image(held_out.features, held_out.pictures, held_out.generator())


def _to_texts(held_out: _HeldOut) -> Gallery:
    return image_to_text(held_out.features, held_out.pictures, held_out.generator())


def _confused(model: Encoder, held_out: _HeldOut) -> Confusions:
    source = with_classes(held_out.source)
    _, templates = read_templates(held_out.dataset.templates)
    classes = class_features(model, source.class_names, templates)
    labels = np.asarray(source.labels)[held_out.features.indices]
    return confusions(held_out.features, labels, source.class_names, classes, held_out.pictures)


def _neighbors(
    model: Encoder,
    recipe: Recipe | None,
    objective: HasQueue | None,
    source: PairSource | None,
    loader: Wording | None,
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
    found = neighbors(model, queue, source, loader, rng)
    if found is None:
        raise UserError("The queue's entries do not say which pairs they are, so their captions cannot be shown.")
    return found


def _views(
    model: ReportModel,
    source: PairSource | None,
    plan: Plan | None,
    loader: Loader | None,
    rng: np.random.Generator,
) -> list[Seen]:
    if source is None or plan is None or loader is None:
        raise UserError("The training pairs were not at hand when this report was written.")
    batch = next(loader)
    if len(batch) == 0:
        raise UserError("The next batch holds no pair that can be read.")
    return views(batch, source, plan, model.tokenizer, rng)


def _or_absent(make: Callable[[], T]) -> T | Absent:
    try:
        return make()
    except UserError as error:
        return Absent(str(error))


def _and_then(held_out: _HeldOut | Absent, make: Callable[[_HeldOut], T]) -> T | Absent:
    return held_out if isinstance(held_out, Absent) else _or_absent(lambda: make(held_out))


def _extent(held_out: _HeldOut | Absent) -> str:
    if isinstance(held_out, Absent):
        return ""
    used, whole = len(held_out.features), len(held_out.source)
    part = "" if used == whole else f" of its {whole:,}"
    return f"{used:,}{part} held-out pairs of {held_out.source.name}"


def _facts(run: Run, recipe: Recipe | None, model: Encoder, source: PairSource | None) -> list[str]:
    """What the run was, in a few words each."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    facts = [f"recipe {recipe.name}"] if recipe is not None else []
    if source is not None:
        facts.append(f"{len(source):,} pairs of {source.name}")
    facts.append(f"{weights / 1e6:.1f} million weights")
    if recipe is not None:
        facts += [f"{recipe.image.model} at {recipe.image.size} px", f"seed {recipe.seed}"]
        if run.step < recipe.train.steps:
            facts.append(f"step {run.step:,} of {recipe.train.steps:,}: not finished")
    return facts


def _credits(*sources: PairSource | None) -> list[str]:
    """Who made the images that are shown, where the sources say so."""
    given = (getattr(source, "credit", "") for source in sources if source is not None)
    return list(dict.fromkeys(credit for credit in given if credit))


def _unread(run: Run) -> list[tuple[str, int, str]]:
    """What was left out: reason, count, a few examples."""
    reasons = run.skipped or {}
    ordered: Iterable[Any] = sorted(reasons.items(), key=lambda item: -item[1]["count"])
    return [(reason, entry["count"], ", ".join(map(str, entry["examples"]))) for reason, entry in ordered]
