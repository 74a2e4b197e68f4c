"""Fine-tuning with frozen towers, as the command does it: a fit, its measures, and its folder."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from declip.closed_form.choice import FEWEST
from declip.closed_form.heads import Heads
from declip.closed_form.pairs import ClassPairs
from declip.closed_form.solve import START
from declip.data.images.thumbnails import thumbnails_of
from declip.data.pair import PairSource
from declip.data.sources.checks import caption_warnings, describe_source, refuse_broken
from declip.errors import UserError
from declip.evaluation.held_out import HeldOutSets
from declip.evaluation.results import Result
from declip.fitting.adapted import Adapted
from declip.fitting.base import Base, EncoderBase, check_linear
from declip.fitting.fit import Fitted, fit
from declip.fitting.shown import compared_queries, worst_captions
from declip.interchange.export import export_complete
from declip.interchange.fitted import StoredHeads, base_model, write_heads
from declip.interchange.format import ModelRecord
from declip.interchange.read import loaded
from declip.interchange.timm_weights import class_start
from declip.interchange.weights import Weights
from declip.io.atomic import atomic_write, write_text
from declip.io.outputs import check_folder
from declip.models.device import computes_bf16, pick_device
from declip.models.fingerprint import fingerprint
from declip.recipe.schema import Recipe
from declip.reports.fitted import write_fitted_report
from declip.runs.fitted import (
    EXPORTS,
    FACTS,
    HEADS,
    KNOWN,
    MEASURES,
    RANKS,
    RESULTS,
    FittedRun,
    fit_folder,
    write_table,
)

ALPHAS = (1.0, 0.75, 0.5, 0.25)  # fractions of fitted weights, the rest of their start
LEFT_OUT = "left-out pairs"  # the set of cross-validation in the scores of a mixture

log = logging.getLogger("declip")


@dataclass(frozen=True)
class FitTask:
    """What to fit, opened and checked."""

    recipe: Recipe  # resolved: the settings, with the architecture of the weights
    weights: Weights | None  # of the base; None for an encoder of the user's own, see `is_own`
    source: PairSource
    held_out: HeldOutSets  # those of `recipe.evaluation`
    progress: bool


def run_fit(task: FitTask, folder: Path) -> FittedRun:
    """Fit heads, measure them, and write the folder, which appears when it is complete."""
    recipe = task.recipe
    weights = task.weights
    source = task.source
    tasks = task.held_out.tasks(recipe.evaluation, final=True)
    for name in tasks:
        refuse_broken(task.held_out.test(name), recipe.data.max_broken_fraction)
    base = open_own(recipe) if weights is None else open_base(recipe, weights)
    log.info("Fitting: %s", describe_source(source))
    tokenizer = base.model.tokenizer
    if tokenizer is not None:
        for warning in caption_warnings(source, tokenizer):
            log.warning(warning)
    # --- heads
    named = None if weights is None else named_weights(recipe, weights)
    classes = None
    if named is not None and not base.projected and recipe.finetune.class_pairs:
        classes = class_pairs(named, base, task.progress)
    start: Heads | None = None
    if named is not None and classes is not None:
        start = class_start(named, classes.texts)
    fitted = fit(
        source,
        base,
        classes,
        start,
        seed=recipe.seed,
        max_broken=recipe.data.max_broken_fraction,
        progress=task.progress,
    )
    # --- the sets to keep, and the mixture of the heads with the start
    known = fitted.measures()
    curve = fitted.curve()
    before = list[Result]()
    mixture = dict[str, Any]()
    if recipe.evaluation.keep and fitted.start is not None:
        before = _evaluate(fitted.start, tasks, task)
        mixtures = fitted.mixtures(ALPHAS)
        if len(mixtures) > 1:
            scores = {alpha: _scores(mixed, task) for alpha, mixed in mixtures.items()}
            mixture = best_mixture(scores)
            fitted = mixtures[mixture["alpha"]]
            known = fitted.measures()
        elif fitted.choice.form != START:
            log.warning(
                f"There are fewer than {FEWEST} different pairs to measure on, so --keep changes nothing."
            )
    if "gain" in known:
        known["growth"] = curve
    after = _evaluate(fitted.model, tasks, task)
    # --- files
    with new_folder(folder) as partial:
        if weights is None:
            write_heads(partial / HEADS, own_heads(folder, fitted, recipe))
        else:
            _write_model(partial, folder, fitted, weights, known, after)
        _write_json(partial / MEASURES, known)
        _write_ranks(partial / RANKS, fitted)
        _write_known(partial / KNOWN, fitted, named)
        _write_json(partial / RESULTS, {"start": _plain(before), "fitted": _plain(after)})
        _write_json(partial / FACTS, _facts(fitted, mixture))
        run = FittedRun(partial)
        first = next(iter(tasks), None)
        shown = None if first is None else task.held_out.dataset(first)
        write_fitted_report(
            run, folder.resolve().name, _describe(fitted, recipe), shown, fitted.model
        )
    return FittedRun(folder)


def open_own(recipe: Recipe) -> EncoderBase:
    """Open the encoder of the user's own that a recipe of this command names."""
    name = str(recipe.finetune.pretrained)
    if fit_folder(name) != Path(name).expanduser():
        raise UserError(f"'{name}' is fitted already. Fit to {name.partition('+')[0]} again.")
    encoder = loaded(name, recipe.train.device, recipe.train.precision)
    fingerprint(encoder)  # refuses one that its heads could not be known to belong to
    return EncoderBase(encoder, name)


def open_base(recipe: Recipe, weights: Weights) -> Base:
    """Build the towers of weights on the device and in the precision of a recipe."""
    if not weights.has_text:
        raise UserError(
            f"'{weights.origin}' has no text tower to freeze. Leave --freeze out, or give a text "
            "encoder too: --from timm:NAME/FILE+ENCODER."
        )
    device = pick_device(recipe.train.device)
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bf16" if computes_bf16(device) else "fp32"
    model = base_model(weights, recipe)
    check_linear(model, weights.origin)
    return Base(model.to(device), weights.projected, weights.origin, precision)


def named_weights(recipe: Recipe, weights: Weights) -> Weights:
    """The weights, with the names of their classifier's classes from a file if one is given."""
    names = recipe.finetune.class_names
    if names is None:
        return weights
    # Projections of other names are not those of the published weights.
    return replace(weights, classes=weights.named_classes(names), published="")


def class_pairs(named: Weights, base: EncoderBase, progress: bool) -> ClassPairs | None:
    """The classes of the base's classifier as pairs, if it has one with names."""
    classes = named.named_classes()
    if classes is None:
        return None
    texts, owners = classes.texts()
    features = classes.features
    if features is None:
        features = base.pool_captions(texts, progress)
    return ClassPairs(classes.rows, features, owners, classes.mean)


def _evaluate(model: Adapted, tasks: Mapping[str, list[str]], task: FitTask) -> list[Result]:
    return list(task.held_out.measure(model, dict(tasks), task.progress))


def best_mixture(scores: Mapping[float, Mapping[str, float]]) -> dict[str, Any]:
    """The "alpha" with the highest mean of its scores, a number for each set, and all "scores".

    Of equal ones the first.
    """
    best = max(scores, key=lambda alpha: fmean(scores[alpha].values()))
    log.info("Mixture with the start (WiSE-FT): %g of the fitted weights is best.", best)
    return {"alpha": best, "scores": scores}


def _scores(fitted: Fitted, task: FitTask) -> dict[str, float]:
    """R@1 of left-out pairs, and R@1 or top-1 of each validation set and set to keep."""
    scores = {}
    if fitted.choice.outcome is not None:
        scores[LEFT_OUT] = fitted.choice.outcome.recall(1, fitted.features.groups).value
    tasks = task.held_out.tasks(task.recipe.evaluation, final=False)
    tasks |= task.held_out.tasks_to_keep(task.recipe.evaluation)
    for name, protocols in tasks.items():
        results = task.held_out.measure(fitted.model, {name: protocols}, task.progress)
        scores[name] = fmean(result.headline.value for result in results)
    return scores


# --- the folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that is renamed to `folder`, which must not exist or be empty, at the end."""
    check_folder(folder)
    with atomic_write(folder, "choose another folder with --out") as partial:
        partial.mkdir()
        yield partial
        check_folder(folder)  # another process may have finished meanwhile


def own_heads(folder: Path, fitted: Fitted, recipe: Recipe) -> StoredHeads:
    """The heads of a fit to an encoder of the user's own; only the scale if its embeddings stay."""
    model = fitted.model
    tensors = {"logit_scale": model.logit_scale}
    if model.heads is not None:
        tensors = model.projections()
    prints = fingerprint(model.base.model), fingerprint(model)
    return StoredHeads(folder, model.base.name, *prints, recipe, tensors)


def _write_model(
    partial: Path,
    folder: Path,
    fitted: Fitted,
    base: Weights,
    known: Mapping[str, Any],
    results: Sequence[Result],
) -> None:
    """Write the heads, and exports that stand alone."""
    weights = fitted.model.weights()
    model = weights.build().eval()
    heads = StoredHeads.of(folder, base, weights, fingerprint(model))
    write_heads(partial / HEADS, heads)
    pairs = len(fitted.source)
    record = ModelRecord(model, step=1, pairs=pairs, fitted=dict(known), results=results)
    export_complete(record, partial / EXPORTS)


def _write_ranks(path: Path, fitted: Fitted) -> None:
    """Write the out-of-fold rank of each caption, the worst first."""
    rows = []
    for index, caption, rank in fitted.ranks():
        rows.append([fitted.source[index].key, caption, f"{rank:.4f}"])
    write_table(path, ("key", "caption", "rank"), rows)


def _write_known(path: Path, fitted: Fitted, weights: Weights | None) -> None:
    """Write what the anchors of `Neighbors` are, in order: pairs, then classes without keys."""
    rows = [list(pair) for pair in fitted.known()]
    classes = None if weights is None else weights.named_classes()
    if rows and fitted.classes and classes is not None:
        rows += [["", name] for name in classes.names]
    write_table(path, ("key", "caption"), rows)


def _facts(fitted: Fitted, mixture: Mapping[str, Any]) -> dict[str, Any]:
    """Facts for the report, see `FittedRun.facts`."""
    source = fitted.source
    image_of = thumbnails_of(source)
    pairs = {
        "name": source.name,
        "pairs": len(source),
        "captions": source.captions_from,
        "credit": source.credit,
    }
    return {
        "source": pairs,
        "skipped": {**fitted.features.skipped.to_dict(), "seen": len(source)},
        "queries": compared_queries(fitted, image_of),
        "worst": worst_captions(fitted, image_of),
        "mixture": mixture,
    }


def _describe(fitted: Fitted, recipe: Recipe) -> dict[str, str]:
    """Sentences below the title of the report."""
    base = fitted.model.base
    image = base.model.class_name
    if isinstance(base, Base):
        image = f"{recipe.image.model} at {recipe.image.size} px"
    millions = sum(parameter.numel() for parameter in fitted.model.parameters()) / 1e6
    return {
        "base": f"fitted to {base.name}",
        "size": f"{millions:.1f} million parameters",
        "image": image,
        "seed": f"seed {recipe.seed}",
    }


def _plain(results: list[Result]) -> list[dict[str, Any]]:
    return [result.to_dict() for result in results]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, default=float))
