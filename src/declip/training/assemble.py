"""Assembly of a run from a recipe: all checks are made here, before the first step."""

import os
from functools import partial
from pathlib import Path

import torch

from declip.data.loader import Assembler, Augment, PairLoader
from declip.data.pair import PairSource
from declip.data.plan import plan_views
from declip.data.sources.checks import refuse_broken
from declip.data.sources.pair_list import Lists
from declip.errors import UserError
from declip.evaluation.held_out import HeldOutSets
from declip.io.pool import cores
from declip.models.device import computes_bf16
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import TextEncoder
from declip.models.wrapped import WrappedModel
from declip.recipe.resolve import Facts, resolve
from declip.recipe.schema import Recipe, Train
from declip.runs import folder as run_folder
from declip.runs.checkpoint import Checkpoint, folder_of, load_checkpoint
from declip.runs.folder import RECIPE, log, read_recipe
from declip.supervision.objective import Objective
from declip.training import distributed
from declip.training.optimizer import build_optimizer, named_trainable
from declip.training.pairs import open_training_source, sample_hashes
from declip.training.parallel import build_learner
from declip.training.pretrained import apply_pretrained, load_pretrained
from declip.training.state import (
    NO_EXTENSIONS,
    NOTHING_PREPARED,
    Extensions,
    Prepared,
    RunState,
    restore,
)
from declip.training.trackers import check_trackers

MOST_LOADERS = 32  # loader processes of a training process: each holds two batches in shared memory


def set_up(device: torch.device, train: Train) -> None:
    """Set torch's options for a GPU, which hold for the process."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision(train.matmul_precision)
        # Views have one size, so cuDNN may try its convolutions once. Its choice is not always the same.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()


def auto_precision(device: torch.device, folder: Path, resume: bool) -> str:
    """What train.precision=auto means: that of a resumed run, else the fastest of the device."""
    if resume and (folder / RECIPE).is_file():
        return read_recipe(folder).train.precision
    if computes_bf16(device):
        return "bf16"
    return "fp32"


def assemble(
    recipe: Recipe,
    folder: Path,
    resume: bool = False,
    extensions: Extensions = NO_EXTENSIONS,
    prepared: Prepared = NOTHING_PREPARED,
) -> RunState:
    """Build the state of a recipe's run, or of the run in the folder, to continue it; see `declip.train`."""
    device, hosts = distributed.init_distributed(recipe.train.device)
    set_up(device, recipe.train)
    # --- pretrained weights, pairs and held-out sets
    weights = load_pretrained(recipe.finetune, folder, resume, prepared.weights)
    source = open_training_source(recipe.data, recipe.seed, extensions.sources)
    held_out = prepared.held_out or HeldOutSets(recipe.data, extensions.sources)
    # --- the recipe, which does not change from here on

    def resolved() -> Recipe:
        precision = auto_precision(device, folder, resume)
        sets = held_out.by_task(recipe.evaluation.val)
        return resolve(recipe, Facts(weights, precision, len(source), sets))

    recipe = hosts.on_rank_zero(resolved)
    if (
        recipe.train.precision == "bf16"
        and not computes_bf16(device)
        and distributed.is_rank_zero()
    ):
        log.warning(
            "%s does not support bfloat16 natively: steps are slow. Set train.precision=auto.",
            device,
        )
    hosts.on_rank_zero(partial(check_trackers, recipe.train.report_to))
    hosts.on_rank_zero(partial(refuse_broken, source, recipe.data.max_broken_fraction))
    # --- model and objective, random from the seed, then pretrained
    torch.manual_seed(recipe.seed)
    encoder = weights.encoder if weights is not None else None
    if encoder is None and resume:  # a resumed run reads its text encoder from its own checkpoint
        encoder = run_folder.kept_encoder(recipe.text, folder)
    model = _build_model(recipe, encoder, device)
    model.image_tower.refuse_size(recipe.image.model, recipe.image.size)
    objective = Objective(recipe, model, extensions.terms).to(device)
    objective.attach(model)
    pretrained = apply_pretrained(weights, model, objective)
    objective.prepare(source, model)
    # --- learner and optimizer
    learner = build_learner(model, objective)
    multipliers = pretrained.multipliers if pretrained is not None else {}
    trained = named_trainable(model, objective)
    built = build_optimizer(
        trained, recipe.train, multipliers, objective.over_vocabulary, extensions.optimizer
    )
    # Which continues the stream of the weights, as one process does
    if not distributed.is_rank_zero():
        distributed.seed_rank(recipe.seed, 0)
    # --- loader and held-out sets
    threads = 1
    if device.type == "cpu":
        threads = torch.get_num_threads()
    workers = auto_workers(threads) if recipe.data.workers == "auto" else recipe.data.workers
    loader = build_loader(source, model, objective, workers, extensions.augment)
    tasks = held_out.tasks(recipe.evaluation, final=True)
    samples = sample_hashes(source, held_out, tasks)
    # --- the run folder, and the checkpoint in it
    state = RunState(
        recipe, folder, extensions, hosts, source, held_out, model, objective, pretrained, learner, built,
        loader, workers, samples,
    )  # fmt: skip
    _start_or_continue(state, resume, prepared.lists)
    return state


def _build_model(
    recipe: Recipe, encoder: TextEncoder | WrappedModel | None, device: torch.device
) -> DualEncoder:
    """Build the model of a recipe on a device; refuse one that does not fit into the memory."""
    try:
        return DualEncoder(recipe, encoder).to(device)
    except (MemoryError, RuntimeError) as error:
        # A CPU's allocator raises a plain RuntimeError.
        short = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not short and "allocate memory" not in str(error):
            raise
        sizes = f"text.width={recipe.text.width}, text.layers={recipe.text.layers}"
        sizes += f", text.context_length={recipe.text.context_length}, embed_dim={recipe.embed_dim}"
        raise UserError(
            f"The model does not fit into the memory of {device}: {recipe.image.model}, {sizes}. "
            "Set a smaller one of them."
        ) from error


def auto_workers(training: int) -> int:
    """Number of loader processes: this rank's share of the machine's processors, minus the `training` threads."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = cores() // processes
    return max(0, min(MOST_LOADERS, own - training))


def build_loader(
    source: PairSource,
    model: DualEncoder,
    objective: Objective,
    workers: int = 0,
    augment: Augment | None = None,
) -> PairLoader:
    """Build the loader of the objective's recipe; its `step` is that of the next batch."""
    recipe = objective.recipe
    assembler = Assembler(
        source,
        model.tokenizer,
        plan_views(recipe, objective.needs),
        batch_size=recipe.train.batch_size,
        seed=recipe.seed,
        shuffle_buffer=recipe.data.shuffle_buffer,
        rank=distributed.rank(),
        ranks=distributed.world_size(),
        augment=augment,
    )
    cuda = model.device.type == "cuda"
    return PairLoader(
        assembler,
        workers=workers,
        pin_memory=cuda,
        max_broken_fraction=recipe.data.max_broken_fraction,
    )


def _start_or_continue(state: RunState, resume: bool, lists: Lists) -> None:
    """Lock the run folder; restore the checkpoint in it, which rank 0 chooses, or save what the run starts from."""
    read_already = dict[int, Checkpoint]()  # by step; empty on other ranks

    def choose() -> int | None:
        state.lock = run_folder.lock_folder(state.folder)
        newest = run_folder.open_folder(state.recipe, state.folder, resume, lists)
        if newest is None:
            return None
        read_already[newest.step] = newest
        return newest.step

    step = state.hosts.on_rank_zero(choose)
    if step is not None:
        checkpoint = read_already.get(step)
        restore(state, checkpoint or load_checkpoint(folder_of(state.folder, step)))
    elif state.pretrained is not None and distributed.is_rank_zero():
        state.pretrained.keep(state.folder, state.recipe)
    # The loader has not begun.
    state.loader.step = state.progress.step
    state.loader.skipped = state.progress.skipped
    state.loader.seen = state.progress.step * state.recipe.train.batch_size
