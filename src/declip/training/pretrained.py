"""Pretrained weights of a run: loaded into the model, saved in the run folder, partly frozen, with learning rates."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from declip.errors import UserError
from declip.interchange.architecture import load_tensors
from declip.interchange.declip_file import read_part, write_part
from declip.interchange.read import is_published, read_start
from declip.interchange.weights import Weights
from declip.io.atomic import HINT, atomic_write
from declip.models.dual_encoder import DualEncoder
from declip.models.layers import (
    IMAGE,
    MARK,
    TEXT,
    add_adapters,
    blocks,
    depths,
    freeze,
    keep_in_evaluation,
)
from declip.recipe.schema import FineTuning, LoRA, Recipe
from declip.runs.checkpoint import with_prefix
from declip.runs.folder import KEPT
from declip.supervision.objective import Objective, without_run_state
from declip.training.optimizer import LrMultiplier


def load_pretrained(
    tune: FineTuning, folder: Path, resume: bool, start: Weights | None = None
) -> Weights | None:
    """Load a run's pretrained weights, if any: the copy in its folder when resuming, else `finetune.pretrained`.

    The latter are `start`, if they are read already.
    """
    if tune.pretrained is None:
        return None
    if resume and (folder / KEPT).is_file():
        return read_part(str(folder / KEPT))
    start = start or read_start(tune.pretrained)
    if tune.class_names is None:
        return start
    # Projections of other names are not those of the published weights.
    return replace(start, classes=start.named_classes(tune.class_names), published="")


@dataclass(frozen=True)
class Pretrained:
    """The pretrained part of a model before its first step."""

    loaded: Mapping[str, Tensor]  # by "model.…" and "objective.…"; empty if they can be read again
    multipliers: Mapping[str, LrMultiplier]  # by the names of `named_trainable`
    whole: bool  # whether the model can be evaluated before the first step
    summary: str

    def keep(self, folder: Path, recipe: Recipe) -> None:
        """Write the loaded tensors into the run folder, from where they are read again when resuming."""
        if not self.loaded:
            return
        with atomic_write(folder / KEPT, HINT, durable=True) as temporary:
            write_part(self.loaded, recipe, temporary)


def apply_pretrained(
    start: Weights | None, model: DualEncoder, objective: Objective
) -> Pretrained | None:
    """Load weights into a model and its heads, and freeze the pretrained part; None where all are random.

    Parameters that the weights lack stay random, are never frozen, and have the recipe's learning rate.
    """
    recipe = objective.recipe
    tune = recipe.finetune
    # --- what is loaded
    loaded = set[str]()
    heads = set[str]()
    kept = dict[str, Tensor]()
    if start is not None:
        loaded = load_tensors(start, model)
        if loaded:
            heads = _load_heads(start, objective)
        kept = _kept_tensors(start, model, loaded, objective, heads)
    if recipe.text.hf_model is not None and recipe.text.pretrained:
        names = (name for name, _ in model.named_parameters())
        loaded |= {name for name in names if name.startswith(f"{TEXT}encoder.")}
    if not loaded:
        return None
    # --- what is new
    new = [name for name, _ in model.named_parameters() if name not in loaded]
    whole = start is not None and start.has_text
    whole = whole and not any(name.startswith((IMAGE, TEXT)) for name in new)
    of_heads = [name for name, _ in objective.named_parameters() if name not in heads]
    new += [name.removeprefix("terms.") for name in of_heads]
    parts = dict.fromkeys(_beginning(name, 2) for name in new)
    origin = recipe.text.hf_model
    if start is not None:
        origin = start.origin
    summary = (
        f"Weights of '{origin}': {len(loaded)} tensors of the towers and {len(heads)} of heads "
        f"loaded; new: {', '.join(parts) or 'nothing'}."
    )
    # --- what is trained, and at which rates
    layers = depths(model)
    _freeze(model, tune, layers, loaded)
    trained = [name for name, _ in model.named_parameters() if name in loaded]
    if tune.lora is not None:
        trained += _add_adapters(model, tune, tune.lora, loaded)
    frozen = recipe.head_warmup > 0 and bool(new)
    if frozen:
        summary += (
            f" Steps 1 to {recipe.head_warmup} (finetune.head_warmup_steps) train only what is new."
        )
    multipliers = {f"model.{name}": _multiplier(name, tune, layers, frozen) for name in trained}
    return Pretrained(kept, multipliers, whole, summary)


def _kept_tensors(
    start: Weights, model: DualEncoder, loaded: set[str], objective: Objective, heads: set[str]
) -> dict[str, Tensor]:
    """The tensors that a run keeps; published ones are read again by their name, unless they were resampled."""
    state = model.state_dict()
    of_heads = objective.state_dict()
    same = all(tensor.shape == state[name].shape for name, tensor in start.tensors.items())
    if same and is_published(start.origin):
        return {}
    weights = {name: state[name].clone() for name in loaded}
    head_weights = {name: of_heads[name].clone() for name in heads}
    return with_prefix("model", weights) | with_prefix("objective", head_weights)


def _load_heads(start: Weights, objective: Objective) -> set[str]:
    """Load the heads whose tensors all fit, and return their names."""
    given = without_run_state(start.heads, objective.classes)
    state = objective.state_dict()
    own = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    fits = {name for name in own if name in given and given[name].shape == own[name].shape}
    # A head is terms.LOSS.HEAD
    partly = {_beginning(name, 3) for name in own.keys() - fits}
    heads = {name for name in fits if _beginning(name, 3) not in partly}
    objective.load_state_dict({name: given[name] for name in heads}, strict=False)
    return heads


def _beginning(name: str, parts: int) -> str:
    """The first parts of a tensor's name."""
    return ".".join(name.split(".")[:parts])


def _freeze(
    model: DualEncoder, tune: FineTuning, layers: Mapping[str, int], loaded: set[str]
) -> None:
    for tower, key in ((IMAGE, "freeze_image_blocks"), (TEXT, "freeze_text_blocks")):
        asked = getattr(tune, key)
        names = [name for name in layers if name.startswith(tower) and name in loaded]
        most = 0
        if names:
            most = blocks(layers, tower)
        count = asked
        if asked == "all":
            count = most
        if asked != 0 and count not in range(1, most + 1):
            allowed = "Leave it and --freeze out"
            if most:
                allowed = f"Give 0 to {most}, or all"
            raise UserError(
                f"finetune.{key}={asked}: the weights hold {most} blocks of the {tower[:-1]}. {allowed}."
            )
        if asked != "all":
            names = [name for name in names if layers[name] <= asked]
        if asked == 0:
            names = []
        freeze(model, names)
    if tune.lr_scale < 1 or tune.layer_decay < 1 or tune.head_warmup_steps:
        # Statistics of a few small batches would replace those of millions of images, to which the weights belong.
        modules = dict(model.named_modules())
        norms = [name for name in modules if f"{name}.running_mean" in loaded]
        keep_in_evaluation(model, [modules[name] for name in norms])


def _add_adapters(model: DualEncoder, tune: FineTuning, lora: LoRA, loaded: set[str]) -> list[str]:
    """Add adapters to the loaded towers that are not all frozen, and return the names of the adapters' parameters."""
    towers = []
    for tower, frozen in ((IMAGE, tune.freeze_image_blocks), (TEXT, tune.freeze_text_blocks)):
        if frozen != "all" and any(name.startswith(tower) for name in loaded):
            towers.append(tower)
    new = {name for name, _ in model.named_parameters()} - loaded
    add_adapters(model, lora, towers)
    adapters = []
    others = []
    for name, parameter in model.named_parameters():
        if MARK in name:
            adapters.append(name)
        if MARK in name or name in new:
            parameter.requires_grad_(True)
        elif not parameter.requires_grad:
            others.append(name)
    freeze(model, others)
    return adapters


def _multiplier(
    name: str, tune: FineTuning, layers: Mapping[str, int], frozen: bool
) -> LrMultiplier:
    """Apply layer-wise decay, by the distance from the tower's last layer (as in BEiT, arXiv 2106.08254)."""
    tower = next((tower for tower in (IMAGE, TEXT) if name.startswith(tower)), None)
    if tower is None:
        return LrMultiplier(1.0, frozen)
    below_top = 0
    if name in layers:
        below_top = blocks(layers, tower) + 1 - layers[name]
    factor = tune.lr_scale * tune.layer_decay**below_top
    return LrMultiplier(factor, frozen)
