"""Assembly of a run from a recipe: all checks are made here, before the first step."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from declip.data.batch import Plan, plan_views
from declip.data.loader import Assembler, PairLoader
from declip.data.pair import PairSource
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.runs import checkpoint as checkpoints
from declip.runs import folder as run_folder
from declip.runs.checkpoint import Checkpoint
from declip.supervision.objective import Objective, needs_of
from declip.training import distributed
from declip.training.distributed import HostGroup
from declip.training.optimizer import build_optimizer, named_trainable
from declip.training.pairs import TRAINING, open_held_out, refuse_broken, sample_hashes
from declip.training.parallel import build_learner
from declip.training.parts import Parts, restore
from declip.training.pretrained import apply_pretrained
from declip.training.resolve import Resolved, resolve
from declip.training.sinks import Sink
from declip.training.trackers import require_trackers
from declip.training.watchdogs import auto_workers


def assemble(
    recipe: Recipe,
    folder: Path,
    resume: bool = False,
    quiet: bool = False,
    callbacks: Sequence[Sink] = (),
) -> Parts:
    """Build the parts of a recipe's run, or of the run in the folder, to continue it; `callbacks` get its numbers."""
    # --- processes and device
    device = pick_device(distributed.local_device(recipe.train.device))
    distributed.join(device)
    hosts, rank_zero = HostGroup(), distributed.is_rank_zero()
    hosts.on_rank_zero(partial(require_trackers, recipe.train.report_to))

    # --- recipe, pretrained weights and pairs; from here on the recipe does not change
    resolved = resolve(recipe, folder, resume, device, hosts)
    recipe, source = resolved.recipe, resolved.source
    plan = plan_of(recipe)
    hosts.on_rank_zero(partial(refuse_broken, source, recipe.data.max_broken_fraction))

    # --- model and objective, random from the seed, then pretrained
    torch.manual_seed(recipe.seed)
    model = _build_model(resolved, folder, resume).to(device)
    objective = Objective(recipe, model).to(device)
    pretrained = apply_pretrained(resolved.weights, recipe, model, objective)
    objective.prepare(source, model)

    # --- learner and optimizer
    learner = build_learner(recipe, model, objective)
    multipliers = pretrained.multipliers if pretrained is not None else {}
    named = named_trainable(model, objective)
    optimizer = build_optimizer(named, recipe.train, multipliers, objective.over_vocabulary)
    if not rank_zero:  # rank 0 continues the stream of the weights, as one process does
        distributed.seed_rank(recipe.seed, 0)

    # --- loader and held-out sets
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    workers = auto_workers(threads) if recipe.data.workers == "auto" else recipe.data.workers
    loader = build_loader(recipe, source, model, workers)
    samples = {name: sample_hashes(pairs) for name, pairs in {TRAINING: source, **open_held_out(recipe)}.items()}

    # --- the run folder, and the checkpoint in it
    parts = Parts(
        recipe, folder, quiet, callbacks, hosts, source, plan, model, objective, pretrained, learner, optimizer,
        loader, workers, samples,
    )  # fmt: skip
    checkpoint = _open_folder(parts, resume)
    if checkpoint is not None:
        restore(parts, checkpoint)
    elif pretrained is not None and rank_zero:
        pretrained.keep(folder, recipe)
    continue_at(parts.progress.step, parts, loader)
    return parts


def _build_model(resolved: Resolved, folder: Path, resume: bool) -> DualEncoder:
    """Build the model with random weights; a resumed run reads its text encoder from its own checkpoint."""
    recipe, encoder = resolved.recipe, resolved.weights.encoder if resolved.weights is not None else None
    if encoder is None and resume:
        encoder = run_folder.kept_encoder(recipe, folder)
    model = DualEncoder.from_recipe(recipe, encoder)
    model.image_tower.refuse_size(recipe.image.model, recipe.image.size)
    return model


def plan_of(recipe: Recipe) -> Plan:
    """Plan the views of a pair that the losses of a recipe need."""
    return plan_views(recipe, needs_of(recipe))


def build_loader(recipe: Recipe, source: PairSource, model: DualEncoder, workers: int = 0) -> PairLoader:
    """Build the loader of a recipe; its `step` is that of the next batch."""
    assembler = Assembler(
        source,
        model.tokenizer,
        plan_of(recipe),
        batch_size=recipe.train.batch_size,
        seed=recipe.seed,
        shuffle_buffer=recipe.data.shuffle_buffer,
        rank=distributed.rank(),
        ranks=distributed.world_size(),
    )
    return PairLoader(
        assembler,
        workers=workers,
        pin_memory=model.device.type == "cuda",
        max_broken_fraction=recipe.data.max_broken_fraction,
    )


def continue_at(step: int, parts: Parts, loader: PairLoader) -> None:
    """Let a loader that has not begun start with the batch of a step, and count broken pairs for the run."""
    loader.step, loader.skipped = step, parts.progress.skipped
    loader.seen = step * parts.recipe.train.batch_size


def _open_folder(parts: Parts, resume: bool) -> Checkpoint | None:
    """Lock the run folder and find the checkpoint to resume from: rank 0 chooses it, the others read the same."""
    newest: Checkpoint | None = None

    def choose() -> int | None:
        nonlocal newest
        parts.lock = run_folder.lock_folder(parts.folder)
        newest = run_folder.open_folder(parts.recipe, parts.folder, resume)
        return newest.step if newest is not None else None

    step = parts.hosts.on_rank_zero(choose)
    if step is None or newest is not None:
        return newest
    return checkpoints.load_checkpoint(checkpoints.folder_of(parts.folder, step))
