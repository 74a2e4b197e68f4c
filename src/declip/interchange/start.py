"""What training starts from: weights of a run, a file, open_clip, Hugging Face or timm, as tensors by our names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from declip.errors import UserError
from declip.interchange.declip_file import FILE, RECIPE, holds_recipe, read_declip_file, read_recipe
from declip.interchange.from_huggingface import PREFIX as HUGGINGFACE
from declip.interchange.from_huggingface import fetch, from_huggingface, is_huggingface, read_folder
from declip.interchange.from_open_clip import from_open_clip
from declip.interchange.load import model_of, read_authors_file, read_checkpoint
from declip.interchange.open_clip import CONFIG, FOLDER, PREFIX, read_open_clip
from declip.interchange.timm_weights import PREFIX as TIMM
from declip.interchange.timm_weights import read_timm
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import TextEncoder, encoder_kept_in
from declip.models.no_text import has_text
from declip.recipe.schema import LogitScale, Recipe
from declip.runs.checkpoint import part

IMAGE_PROJECTION = "image_tower.proj."
"""Leads into the space of a text tower; an image tower that comes alone leads nowhere."""


@dataclass(frozen=True)
class Start:
    """Weights to start from.

    Attributes:
        where: What the user gave.
        recipe: Describes the model that the weights are of.
        tensors: By the names of `DualEncoder`; of an image tower alone without its projection.
        heads: By the names of `Objective`; the queue is not among them, it holds another data set's captions.
        whole: Whether both towers are there, so that the model can be measured before it is trained.
    """

    where: str
    recipe: Recipe
    tensors: Mapping[str, Tensor]
    heads: Mapping[str, Tensor]
    whole: bool

    @property
    def encoder(self) -> TextEncoder | None:
        """The Hugging Face text encoder that the weights are of."""
        return encoder_kept_in(self.tensors, self.recipe, Path(self.where)) if self.whole else None

    def fit(self, recipe: Recipe) -> Recipe:
        """Put the weights' towers into a recipe: architecture, image statistics, tokenizer, activation, logit scale.

        How the image tower is trained stays the recipe's, and so do statistics that its user gave, and the image size
        where `finetune.image_size` is given. Without a text tower the recipe's own and its width of the shared space
        stay.

        Raises:
            UserError: the user gave keys that the weights overrule.
        """
        theirs, own = self.recipe, recipe.image
        statistics = (name for name in ("mean", "std") if f"image.{name}" in recipe.given)
        keep = {name: getattr(own, name) for name in ("freeze_patch_embed", "shared_bn_views", *statistics)}
        size = recipe.finetune.image_size or theirs.image.size
        changed: dict[str, Any] = {"image": theirs.image.model_copy(update={**keep, "size": size})}
        if self.whole:
            scale = recipe.logit_scale.model_copy(update={"init": float(self.tensors["logit_scale"])})
            changed |= {"text": theirs.text, "embed_dim": theirs.embed_dim, "logit_scale": scale}
        fitted = recipe.model_copy(update=changed)
        self._refuse_overruled(recipe, fitted)
        return fitted

    def _refuse_overruled(self, recipe: Recipe, fitted: Recipe) -> None:
        overruled = []
        for key in sorted(recipe.given):
            asked, found = _value(recipe, key), _value(fitted, key)
            # Every recipe that was written out has the scale's default.
            if asked == found or (key == "logit_scale.init" and asked == LogitScale().init):
                continue
            advice = f"give finetune.image_size={asked} instead" if key == "image.size" else "leave it out"
            overruled.append(f"{key}={asked} (becomes {found}; {advice})")
        if overruled:
            raise UserError(f"The weights of '{self.where}' overrule keys of this recipe: {', '.join(overruled)}.")


def _value(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key; None where image.model_kwargs lacks it."""
    found: Any = recipe
    for name in key.split("."):
        found = getattr(found, name) if isinstance(found, BaseModel) else found.get(name)
    return found


def read_start(where: str) -> Start:
    """Read weights to start training from.

    Args:
        where: A run, a checkpoint folder, a file or folder of ours, the authors' checkpoint (also of an image tower
            alone), a folder of open_clip's or of transformers' `CLIPModel`, ``open_clip:…``,
            ``huggingface:OWNER/NAME``, or ``timm:NAME.TAG`` and ``timm:NAME/FILE`` for an image tower.

    Returns:
        The weights, on the CPU, in float32.

    Raises:
        UserError: nothing there, or nothing that our model can take over.
    """
    if where.startswith(TIMM):
        recipe, tensors = read_timm(where)
        return Start(where, recipe, tensors, {}, whole=False)
    for prefix, read in NAMED.items():
        if where.startswith(prefix):
            return _of(where, *read(where))
    path = Path(where).expanduser()
    if not path.exists():
        raise UserError(
            f"There are no weights to start from at '{where}'. Give finetune.pretrained a run, a checkpoint, a weights "
            f"file, {PREFIX}MODEL/TAG, {HUGGINGFACE}OWNER/NAME or {TIMM}NAME.TAG."
        )
    if (path / FILE).is_file():
        path = path / FILE
    if (path / CONFIG).is_file():
        return _of(where, *_of_open_clip(f"{PREFIX}{FOLDER}{path}"))
    if is_huggingface(path):
        return _of(where, from_huggingface(path), {})
    return _of(where, *(_of_file(path) if path.is_file() else _of_run(path)))


def read_kept(path: Path) -> Start:
    """Read what a run kept of its start, which may be an image tower alone, without its projection.

    Raises:
        UserError: the file is damaged, or its recipe is of another version.
    """
    try:
        with safe_open(path, "pt") as file:
            text = file.metadata()[RECIPE]
        tensors = load_file(path)
    except Exception as error:  # safetensors has classes of its own
        raise UserError(f"'{path}' is damaged: {' '.join(str(error).split())[:200]}. Start the run anew.") from error
    own = part("model", tensors)
    return Start(str(path), read_recipe(text, path), own, part("objective", tensors), whole="logit_scale" in own)


def _of(where: str, model: DualEncoder, heads: Mapping[str, Tensor]) -> Start:
    assert model.recipe is not None, "every reader knows what it reads"
    whole = has_text(model)
    tensors = model.state_dict()
    if not whole:
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if name.startswith("image_tower.") and not name.startswith(IMAGE_PROJECTION)
        }
    heads = {name: t for name, t in heads.items() if isinstance(t, Tensor) and ".queue." not in name}
    return Start(where, model.recipe, tensors, heads, whole)


def _of_open_clip(where: str) -> tuple[DualEncoder, Mapping[str, Tensor]]:
    return from_open_clip(read_open_clip(where)), {}


def _of_file(path: Path) -> tuple[DualEncoder, Mapping[str, Tensor]]:
    if holds_recipe(path):
        return read_declip_file(path), part("objective", load_file(path))
    model, objective = read_authors_file(path)
    return model, objective.state_dict() if objective is not None else {}


def _of_run(path: Path) -> tuple[DualEncoder, Mapping[str, Tensor]]:
    checkpoint = read_checkpoint(path)
    return model_of(checkpoint, path), part("objective", checkpoint.training)


NAMED: Mapping[str, Callable[[str], tuple[DualEncoder, Mapping[str, Tensor]]]] = {
    PREFIX: _of_open_clip,
    HUGGINGFACE: lambda name: read_folder(fetch(name)),
}
"""What reads the names that are no paths."""
