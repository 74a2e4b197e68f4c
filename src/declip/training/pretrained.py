"""The start of a run from weights that exist: put in place, kept in the run folder, partly frozen, paced."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import declip
from declip.errors import UserError
from declip.interchange.declip_file import RECIPE, VERSION
from declip.interchange.start import Start, read_kept, read_start
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


def load_pretrained(recipe: Recipe, folder: Path, resume: bool) -> Start | None:
    """What a run starts from, or started from; None for random weights.

    Raises:
        UserError: see `read_start`.
    """
    if recipe.finetune.pretrained is None:
        return None
    kept = folder / KEPT
    return read_kept(kept) if resume and kept.is_file() else read_start(recipe.finetune.pretrained)


@dataclass(frozen=True)
class Pretrained:
    """A model as its training starts.

    Attributes:
        taken: The tensors that came with the weights, by "model.…" and "objective.…".
        paces: How each parameter follows the learning rate, by the names of `named_trainable`.
        whole: Whether the model can be measured before the first step.
        story: What was taken and what is new, in a line for the log.
    """

    taken: Mapping[str, Tensor]
    paces: Mapping[str, LrMultiplier]
    whole: bool
    story: str

    def keep(self, folder: Path, recipe: Recipe) -> None:
        """Write what `finetune.pretrained` gave into the run folder, beside and renamed; `declip.load` reads it.

        Raises:
            UserError: no space left, or no permission.
        """
        if not self.taken:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.taken.items()}
        metadata = {RECIPE: recipe.to_yaml(), VERSION: declip.__version__, "format": "pt"}
        try:
            with atomic_write(folder / KEPT, "choose another folder with --out", durable=True) as beside:
                save_tensors(tensors, beside, metadata)
        except SafetensorError as error:  # of a full disk
            raise UserError(f"Cannot write '{folder / KEPT}': {error}. Make room, or choose another --out.") from error


def apply_pretrained(
    start: Start | None, recipe: Recipe, model: DualEncoder, objective: Objective
) -> Pretrained | None:
    """Put weights into a model and its heads, and freeze and pace what is pretrained as the recipe says.

    Args:
        start: See `load_pretrained`. A pretrained text encoder has weights of its own.
        recipe: Fitted to it by `Start.fit`.
        model, objective: Built from that recipe; changed in place.

    Returns:
        What was taken; None where all weights are random. What the weights do not hold stays random, is never frozen,
        and learns at the recipe's rate.

    Raises:
        UserError: the weights are not those of the model, or more is to be frozen than there is.
    """
    tune = recipe.finetune
    taken = _place_model(start, model) if start is not None else set()
    came = taken | _of_encoder(recipe, model)
    if not came:
        return None
    heads = _place_heads(start, objective) if start is not None else set()
    kept = prefixed("model", {name: model.state_dict()[name].clone() for name in taken})
    kept |= prefixed("objective", {name: objective.state_dict()[name].clone() for name in heads})
    places = depths(model)
    new = [name for name, _ in model.named_parameters() if name not in came]
    new += [f"objective.{name}" for name, _ in objective.named_parameters() if name not in heads]
    _freeze(model, tune, places, came)
    waits = recipe.head_warmup > 0 and bool(new)
    paces = {f"model.{name}": _pace(name, tune, places, waits) for name, _ in model.named_parameters() if name in came}
    if tune.lora is not None:
        added = _add_adapters(model, tune, tune.lora, came)
        paces |= {f"model.{name}": _pace(name, tune, places, waits) for name in added}
    where = start.where if start is not None else str(recipe.text.hf_model)
    story = _story(where, len(taken or came), len(heads), new, tune)
    rates = " and ".join(_rates(model, tower, paces, recipe.train.lr) for tower in (IMAGE, TEXT))
    return Pretrained(kept, paces, start is not None and start.whole, f"{story} Peak learning rates: {rates}.")


def waiting_norms(model: DualEncoder, paces: Mapping[str, LrMultiplier]) -> list[nn.Module]:
    """The batch norms whose parameters wait for the heads: their statistics rest as long, or they would drift apart."""
    waiting = {name for name, pace in paces.items() if pace.waits}
    found: list[nn.Module] = []
    for name, module in model.named_modules():
        own = {f"model.{name}.{each}" for each, _ in module.named_parameters(recurse=False)}
        if isinstance(module, _BatchNorm) and own and own <= waiting:
            found.append(module)
    return found


def _place_model(start: Start, model: DualEncoder) -> set[str]:
    """Put the tensors in; returns their names."""
    own = model.state_dict()
    fitted = {}
    for name, tensor in start.tensors.items():
        if name not in own:
            raise UserError(f"'{start.where}' holds '{name}', which the model of its own recipe has not.")
        fitted[name] = tensor if tensor.shape == own[name].shape else _resized(name, tensor, own[name], model)
        if fitted[name].shape != own[name].shape:
            raise UserError(
                f"'{name}' of '{start.where}' has shape {tuple(tensor.shape)} and the model needs "
                f"{tuple(own[name].shape)}: this tower cannot be taken to another image size. Leave "
                "finetune.image_size out."
            )
    model.load_state_dict({**own, **fitted})
    return set(fitted)


def _of_encoder(recipe: Recipe, model: DualEncoder) -> set[str]:
    """What a Hugging Face encoder brought: it has weights of its own where an image tower alone is the start."""
    if recipe.text.hf_model is None or not recipe.text.pretrained:
        return set()
    return {name for name, _ in model.named_parameters() if name.startswith(f"{TEXT}encoder.")}


def _resized(name: str, tensor: Tensor, own: Tensor, model: DualEncoder) -> Tensor:
    """Positions for another image size: the square grid is interpolated, the class token's stays."""
    if not name.endswith(POSITIONS) or tensor.ndim not in (2, 3):
        return tensor
    trunk = model.image_tower.trunk
    before = 1 if tensor.ndim == 2 else int(getattr(trunk, "num_prefix_tokens", 0))
    old, new = (round((each.shape[-2] - before) ** 0.5) for each in (tensor, own))
    rows = tensor if tensor.ndim == 3 else tensor[None]
    found = resample_abs_pos_embed(rows.float(), [new, new], [old, old], num_prefix_tokens=before)
    return found if tensor.ndim == 3 else found[0]


def _place_heads(start: Start, objective: Objective) -> set[str]:
    """Put heads in whose tensors all fit; returns their names."""
    own = {name: t for name, t in objective.state_dict().items() if isinstance(t, Tensor)}
    heads: dict[str, list[str]] = {}
    for name in own:
        heads.setdefault(name.rsplit(".", 2)[0] if name.count(".") > 2 else name, []).append(name)
    fits = {
        name: start.heads[name]
        for names in heads.values()
        if all(name in start.heads and start.heads[name].shape == own[name].shape for name in names)
        for name in names
    }
    objective.load_state_dict({**objective.state_dict(), **fits})
    return set(fits)


def _freeze(model: DualEncoder, tune: FineTuning, places: Mapping[str, int], taken: set[str]) -> None:
    for tower, key, asked in (
        (IMAGE, "freeze_image_blocks", tune.freeze_image_blocks),
        (TEXT, "freeze_text_blocks", tune.freeze_text_blocks),
    ):
        if asked == 0:
            continue
        if not _came(tower, taken):
            raise UserError(f"finetune.{key}={asked}, but the weights hold no {tower[:-1]}. Set it to 0.")
        most = blocks(places, tower)
        if asked != "all" and asked > most:
            raise UserError(
                f"finetune.{key}={asked}, but the {tower[:-1]} has {most} blocks. Give 0 to {most}, or all."
            )
        names = [name for name, depth in places.items() if name.startswith(tower) and name in taken]
        freeze(model, [name for name in names if asked == "all" or places[name] <= asked])


def _add_adapters(model: DualEncoder, tune: FineTuning, lora: LoRA, came: set[str]) -> list[str]:
    """Adapt the towers that came and are not frozen whole; returns the names of the adapters' parameters."""
    frozen = {IMAGE: tune.freeze_image_blocks, TEXT: tune.freeze_text_blocks}
    towers = [tower for tower in (IMAGE, TEXT) if frozen[tower] != "all" and _came(tower, came)]
    new = {name for name, _ in model.named_parameters()} - came
    Adapters(model, lora, towers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in name or name in new or parameter.requires_grad)
    freeze(model, [name for name, parameter in model.named_parameters() if not parameter.requires_grad])
    return [name for name, _ in model.named_parameters() if MARK in name]


def _pace(name: str, tune: FineTuning, places: Mapping[str, int], waits: bool) -> LrMultiplier:
    """Each layer's rate is the decay's power of its distance from the tower's last (as in BEiT, arXiv 2106.08254)."""
    factor = tune.image_lr_scale if name.startswith(IMAGE) else tune.text_lr_scale if name.startswith(TEXT) else 1.0
    if name in places:
        tower = IMAGE if name.startswith(IMAGE) else TEXT
        factor *= tune.layer_decay ** (blocks(places, tower) + 1 - places[name])
    return LrMultiplier(factor, waits)


def _came(tower: str, taken: set[str]) -> bool:
    return any(name.startswith(tower) for name in taken)


def _story(where: str, towers: int, heads: int, new: list[str], tune: FineTuning) -> str:
    named = dict.fromkeys(".".join(name.split(".")[:2]) for name in new)
    waits = "; nothing is new, so nothing waits for heads" if tune.head_warmup_steps and not new else ""
    return (
        f"Weights of '{where}': {towers} tensors of the towers and {heads} of heads taken over; "
        f"new: {', '.join(named) or 'nothing'}{waits}."
    )


def _rates(model: DualEncoder, tower: str, paces: Mapping[str, LrMultiplier], peak: float) -> str:
    """Say at which rates a tower's pretrained and new parameters learn."""
    own = [(f"model.{name}", p.requires_grad) for name, p in model.named_parameters() if name.startswith(tower)]
    factors = [paces[name].factor for name, learns in own if learns and name in paces]
    said = [f"{peak * factor:.2g}" for factor in sorted({min(factors), max(factors)})] if factors else ["frozen"]
    parts = [" to ".join(said)] if any(name in paces for name, _ in own) else []
    parts += [f"{peak:.2g} (new)"] if any(learns and name not in paces for name, learns in own) else []
    return f"{tower[:-1].replace('_', ' ')} {', '.join(parts)}"
