"""Pretrained weights of a run: put in place, kept in the run folder, partly frozen, with their learning rates."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import declip
from declip.errors import UserError
from declip.interchange.declip_file import RECIPE, VERSION, read_part
from declip.interchange.read import read_start
from declip.interchange.weights import Weights
from declip.io.atomic import atomic_write, save_tensors
from declip.models.dual_encoder import DualEncoder
from declip.models.freezing import freeze
from declip.models.layers import IMAGE, TEXT, blocks, depths
from declip.models.lora import MARK, Adapters
from declip.recipe.schema import FineTuning, LoRA, Recipe
from declip.runs.checkpoint import prefixed
from declip.runs.folder import KEPT
from declip.supervision.objective import Objective
from declip.training.optimizer import LrMultiplier

POSITIONS = "pos_embed"
LOGIT_SCALE = "logit_scale"


def load_pretrained(recipe: Recipe, folder: Path, resume: bool) -> Weights | None:
    """Load a run's pretrained weights, if any: the copy in its folder when resuming, else `finetune.pretrained`."""
    if recipe.finetune.pretrained is None:
        return None
    kept = folder / KEPT
    return read_part(str(kept)) if resume and kept.is_file() else read_start(recipe.finetune.pretrained)


@dataclass(frozen=True)
class Pretrained:
    """The pretrained part of a model before its first step.

    Attributes:
        loaded: The tensors that were loaded, by "model.…" and "objective.…".
        multipliers: Learning rates by the names of `named_trainable`.
        whole: Whether the model can be evaluated before the first step.
        summary: Loaded and new tensors and their learning rates, in a line for the log.
    """

    loaded: Mapping[str, Tensor]
    multipliers: Mapping[str, LrMultiplier]
    whole: bool
    summary: str

    def keep(self, folder: Path, recipe: Recipe) -> None:
        """Write the loaded tensors into the run folder, from where they are read again when resuming."""
        if not self.loaded:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.loaded.items()}
        metadata = {RECIPE: recipe.to_yaml(), VERSION: declip.__version__, "format": "pt"}
        try:
            with atomic_write(folder / KEPT, "choose another folder with --out", durable=True) as beside:
                save_tensors(tensors, beside, metadata)
        except SafetensorError as error:  # of a full disk
            raise UserError(f"Cannot write '{folder / KEPT}': {error}. Make room, or choose another --out.") from error


def apply_pretrained(
    start: Weights | None, recipe: Recipe, model: DualEncoder, objective: Objective
) -> Pretrained | None:
    """Put weights into a model and its heads, and freeze the pretrained part as the recipe says.

    Args:
        start: See `load_pretrained`. A pretrained text encoder has weights of its own.
        recipe: Fitted to it by `Weights.fit`.

    Returns:
        None where all weights are random. Parameters that the weights lack stay random, are never frozen, and have the
        recipe's learning rate.

    Raises:
        UserError: the weights are not those of the model, or more is to be frozen than there is.
    """
    tune = recipe.finetune
    taken = _place_model(start, model) if start is not None else set()
    loaded = set(taken)
    if recipe.text.hf_model is not None and recipe.text.pretrained:
        loaded |= {name for name, _ in model.named_parameters() if name.startswith(f"{TEXT}encoder.")}
    if not loaded:
        return None
    heads = _place_heads(start, objective) if start is not None else set()
    kept = prefixed("model", {name: model.state_dict()[name].clone() for name in taken})
    kept |= prefixed("objective", {name: objective.state_dict()[name].clone() for name in heads})
    layers = depths(model)
    new = [name for name, _ in model.named_parameters() if name not in loaded]
    new += [f"objective.{name}" for name, _ in objective.named_parameters() if name not in heads]
    _freeze(model, tune, layers, loaded)
    frozen = recipe.head_warmup > 0 and bool(new)
    names = [name for name, _ in model.named_parameters() if name in loaded]
    if tune.lora is not None:
        names += _add_adapters(model, tune, tune.lora, loaded)
    multipliers = {f"model.{name}": _multiplier(name, tune, layers, frozen) for name in names}
    where = start.origin if start is not None else str(recipe.text.hf_model)
    summary = _summary(where, len(taken or loaded), len(heads), new, tune)
    rates = " and ".join(_rates(model, tower, multipliers, recipe.train.lr) for tower in (IMAGE, TEXT))
    return Pretrained(kept, multipliers, start is not None and start.whole, f"{summary} Peak learning rates: {rates}.")


def frozen_norms(model: DualEncoder, multipliers: Mapping[str, LrMultiplier]) -> list[nn.Module]:
    """List the batch norms that are frozen while heads warm up: their statistics must not change either."""
    frozen = {name for name, multiplier in multipliers.items() if multiplier.frozen_in_warmup}
    norms: list[nn.Module] = []
    for name, module in model.named_modules():
        own = {f"model.{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)}
        if isinstance(module, _BatchNorm) and own and own <= frozen:
            norms.append(module)
    return norms


def _place_model(start: Weights, model: DualEncoder) -> set[str]:
    own = model.state_dict()
    fitted = {}
    for name, tensor in start.tensors.items():
        if name not in own:
            raise UserError(f"'{start.origin}' holds '{name}', which the model of its own recipe lacks.")
        fitted[name] = tensor if tensor.shape == own[name].shape else _resized(name, tensor, own[name], model)
        if fitted[name].shape != own[name].shape:
            raise UserError(
                f"'{name}' of '{start.origin}' has shape {tuple(tensor.shape)} and the model needs "
                f"{tuple(own[name].shape)}: this tower cannot be taken to another image size. Leave "
                "finetune.image_size out."
            )
    model.load_state_dict({**own, **fitted})
    return set(fitted)


def _resized(name: str, tensor: Tensor, own: Tensor, model: DualEncoder) -> Tensor:
    """Interpolate the square grid of position embeddings for another image size; the class token's stays."""
    if not name.endswith(POSITIONS) or tensor.ndim not in (2, 3):
        return tensor
    trunk = model.image_tower.trunk
    before = 1 if tensor.ndim == 2 else int(getattr(trunk, "num_prefix_tokens", 0))
    old, new = (round((embedding.shape[-2] - before) ** 0.5) for embedding in (tensor, own))
    rows = tensor if tensor.ndim == 3 else tensor[None]
    resized = resample_abs_pos_embed(rows.float(), [new, new], [old, old], num_prefix_tokens=before)
    return resized if tensor.ndim == 3 else resized[0]


def _place_heads(start: Weights, objective: Objective) -> set[str]:
    """Load the heads whose tensors all fit; give their names."""
    own = {name: t for name, t in objective.state_dict().items() if isinstance(t, Tensor)}
    heads: dict[str, list[str]] = {}
    for name in own:
        heads.setdefault(".".join(name.split(".")[:3]), []).append(name)  # "terms.simsiam.projector"
    fits = {
        name: start.heads[name]
        for names in heads.values()
        if all(name in start.heads and start.heads[name].shape == own[name].shape for name in names)
        for name in names
    }
    objective.load_state_dict({**objective.state_dict(), **fits})
    return set(fits)


def _freeze(model: DualEncoder, tune: FineTuning, layers: Mapping[str, int], loaded: set[str]) -> None:
    for tower, key in ((IMAGE, "freeze_image_blocks"), (TEXT, "freeze_text_blocks")):
        asked = getattr(tune, key)
        if asked == 0:
            continue
        if not any(name.startswith(tower) for name in loaded):
            raise UserError(f"finetune.{key}={asked}, but the weights hold no {tower[:-1]}. Set it to 0.")
        most = blocks(layers, tower)
        if asked != "all" and asked > most:
            raise UserError(
                f"finetune.{key}={asked}, but the {tower[:-1]} has {most} blocks. Give 0 to {most}, or all."
            )
        names = [name for name in layers if name.startswith(tower) and name in loaded]
        freeze(model, [name for name in names if asked == "all" or layers[name] <= asked])


def _add_adapters(model: DualEncoder, tune: FineTuning, lora: LoRA, loaded: set[str]) -> list[str]:
    """Add adapters to the loaded towers that are not all frozen; give the names of the adapters' parameters."""
    frozen = {IMAGE: tune.freeze_image_blocks, TEXT: tune.freeze_text_blocks}
    towers = [t for t in (IMAGE, TEXT) if frozen[t] != "all" and any(name.startswith(t) for name in loaded)]
    new = {name for name, _ in model.named_parameters()} - loaded
    Adapters(model, lora, towers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in name or name in new or parameter.requires_grad)
    freeze(model, [name for name, parameter in model.named_parameters() if not parameter.requires_grad])
    return [name for name, _ in model.named_parameters() if MARK in name]


def _multiplier(name: str, tune: FineTuning, layers: Mapping[str, int], frozen: bool) -> LrMultiplier:
    """Apply layer-wise decay, by the distance from the tower's last layer (as in BEiT, arXiv 2106.08254)."""
    factor = tune.image_lr_scale if name.startswith(IMAGE) else tune.text_lr_scale if name.startswith(TEXT) else 1.0
    if name in layers:
        tower = IMAGE if name.startswith(IMAGE) else TEXT
        factor *= tune.layer_decay ** (blocks(layers, tower) + 1 - layers[name])
    return LrMultiplier(factor, frozen)


def _summary(where: str, towers: int, heads: int, new: list[str], tune: FineTuning) -> str:
    named = dict.fromkeys(".".join(name.removeprefix("objective.terms.").split(".")[:2]) for name in new)
    warmup = "; without new parameters there is no warm-up of heads" if tune.head_warmup_steps and not new else ""
    return (
        f"Weights of '{where}': {towers} tensors of the towers and {heads} of heads loaded; "
        f"new: {', '.join(named) or 'nothing'}{warmup}."
    )


def _rates(model: DualEncoder, tower: str, multipliers: Mapping[str, LrMultiplier], peak: float) -> str:
    """Word the learning rates of a tower's pretrained and new parameters."""
    own = [(f"model.{name}", p.requires_grad) for name, p in model.named_parameters() if name.startswith(tower)]
    factors = [multipliers[name].factor for name, learns in own if learns and name in multipliers]
    rates = [f"{peak * factor:.2g}" for factor in sorted({min(factors), max(factors)})] if factors else ["frozen"]
    parts = [" to ".join(rates)] if any(name in multipliers for name, _ in own) else []
    parts += [f"{peak:.2g} (new)"] if any(learns and name not in multipliers for name, learns in own) else []
    return f"{tower[:-1].replace('_', ' ')} {', '.join(parts)}"
