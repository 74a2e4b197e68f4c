"""Loading a model: a run, a checkpoint or a file of ours, the authors' weights, or a model of another library's."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from declip.errors import UserError
from declip.evaluation.encode import Encoder
from declip.interchange.declip_authors import read_declip_authors
from declip.interchange.declip_backbone import is_backbone, read_declip_backbone
from declip.interchange.declip_file import FILE, holds_recipe, place_weights, read_declip_file, read_recipe
from declip.interchange.from_huggingface import PREFIX as HUGGINGFACE
from declip.interchange.from_huggingface import fetch, from_huggingface, is_huggingface, read_folder
from declip.interchange.open_clip import CONFIG, FOLDER, PREFIX, OpenClip, read_open_clip
from declip.interchange.weights_file import outline, read_weights
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import encoder_kept_in
from declip.models.lora import Adapters, adapted
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import STATE, Checkpoint, list_checkpoints, load_checkpoint, newest_good, part
from declip.runs.folder import RECIPE
from declip.supervision.objective import Objective


class Model(Encoder, Protocol):
    """What `load` gives: a `DualEncoder`, or another kind of model with the same methods."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        ...

    @property
    def preprocessor(self) -> Callable[..., Tensor]:
        """`preprocess` on the host: for the workers that read pictures."""
        ...

    @property
    def tokenizer(self) -> Callable[..., Tensor]:
        """`tokenize` on the host."""
        ...

    def encode_backbone(self, images: Tensor, /) -> Tensor:
        """(n, 3, S, S) normalized → (n, width) float32, the pooled feature before the projection."""
        ...


def load(where: str | Path, device: str = "auto") -> Model:
    """Load a trained model, in evaluation mode.

    Args:
        where: A row of `NAMED` or `KINDS`: a run folder (its newest good checkpoint), a checkpoint folder inside one, a
            file or folder that `declip.export` wrote as "safetensors", a file with the authors' weights (``.pth``,
            ``.pth.tar``, ``.pt``, ``.safetensors``), with both towers or the image tower alone, a folder of
            transformers' `CLIPModel`, ``huggingface:OWNER/NAME``, or a name of `declip.interchange.open_clip`, such as
            ``open_clip:ViT-B-32/openai``. Only names with a colon download.
        device: "auto", "cpu", "cuda", …

    Returns:
        The model: `encode_image(preprocess(images))` and `encode_text(tokenize(texts))`. Averaged weights are taken
        where the run kept them.

    Raises:
        UserError: nothing there, nothing loadable there, or a damaged file.
    """
    for prefix, read in NAMED.items():
        if isinstance(where, str) and where.startswith(prefix):
            return read(where).to(pick_device(device)).eval()
    path = Path(where)
    if not path.exists():
        raise UserError(
            f"There is no model at '{where}'. Give a run folder, a checkpoint folder, a weights file, a folder of "
            f"transformers' CLIPModel, {HUGGINGFACE}OWNER/NAME or {PREFIX}MODEL/TAG."
        )
    found = next(read(path) for is_kind, read in KINDS if is_kind(path))
    return found.to(pick_device(device)).eval()


def read_authors_file(path: Path) -> tuple[DualEncoder, Objective | None]:
    """Read the authors' weights: both towers and the heads, or an image tower alone, which comes without objective.

    Raises:
        UserError: the file cannot be read, or holds something else; what it holds is said where it is known.
    """
    try:
        return read_declip_authors(path)
    except UserError as error:
        if is_backbone(path):
            return read_declip_backbone(path), None
        raise _not_the_authors(path) or error from error


def _not_the_authors(path: Path) -> UserError | None:
    """Say how to load what is not the authors' but known all the same."""
    names = {name.removeprefix("module.") for name in _tensor_names(path)}
    if "model.logit_scale" in names and any(name.startswith("model.image_tower.") for name in names):
        return UserError(f"'{path}' holds the weights of a checkpoint. Give its folder, '{path.parent}', or its run.")
    if is_huggingface(path.parent) and any(name.startswith("vision_model.") for name in names):
        return UserError(f"'{path}' holds weights as transformers names them. Give its folder, '{path.parent}'.")
    has_text = "token_embedding.weight" in names or any(name.startswith("text.") for name in names)
    if has_text and any(name.startswith("visual.") for name in names):
        return UserError(
            f"'{path}' holds weights as open_clip names them. Say of which of its models: "
            f"{PREFIX}MODEL/{path}, where MODEL is for example ViT-B-32 (ViT-B-32-quickgelu for weights trained with "
            f"QuickGELU). In a folder with {CONFIG} it is {PREFIX}{FOLDER}{path.parent}."
        )
    return None


def _tensor_names(path: Path) -> Iterable[str]:
    """Names in a file of tensors, one wrapping undone; none where it cannot be read."""
    try:
        found = read_weights(path)
        for wrapping in ("state_dict", "model"):
            found = found.get(wrapping, found)
        return [name for name in found if isinstance(name, str)]
    except Exception:  # the first reading has said what is wrong with the file
        return []


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder, or the newest good checkpoint of a run folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if (path / STATE).is_file():
        return load_checkpoint(path)
    if list_checkpoints(path):
        newest, problems = newest_good(path)
        if newest is None:
            raise UserError(f"No checkpoint in '{path}' is whole. {problems[0]}")
        return newest
    if (path / CONFIG).is_file():
        raise UserError(f"'{path}' is a folder of open_clip's. Load it as {PREFIX}{FOLDER}{path}.")
    what = "has no checkpoint yet" if (path / RECIPE).is_file() else f"is not a run folder: it has no {RECIPE}"
    raise UserError(f"'{path}' {what}. Give a run folder, or a folder in its checkpoints.")


def model_of(checkpoint: Checkpoint, path: Path) -> DualEncoder:
    """Build a checkpoint's model, with the averaged weights where the run kept them.

    Args:
        checkpoint: What `read_checkpoint` gave.
        path: Where it came from, for messages.

    Raises:
        UserError: its recipe cannot be read, or its weights are not those of the recipe.
    """
    recipe = read_recipe(checkpoint.recipe, path)
    weights = part("average", checkpoint.weights) or part("model", checkpoint.weights)
    # Sizes come from the file, so the model is built without memory first, to see that the weights fit.
    encoder = encoder_kept_in(weights, recipe, path)
    _with_adapters(outline(recipe, encoder), recipe, weights, path, device="meta")
    return _with_adapters(DualEncoder.from_recipe(recipe, encoder), recipe, weights, path)


def _with_adapters(
    model: DualEncoder, recipe: Recipe, weights: Mapping[str, Tensor], path: Path, device: str = "cpu"
) -> DualEncoder:
    """Put a checkpoint's weights into a model, and merge the adapters where the run trains some."""
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    towers = adapted(weights) if recipe.finetune.lora is not None else []
    adapters = Adapters(model, recipe.finetune.lora, towers) if recipe.finetune.lora and towers else None
    place_weights(model, weights, path)
    return adapters.merge() if adapters is not None and device != "meta" else model


NAMED: Mapping[str, Callable[[str], OpenClip | DualEncoder]] = {
    PREFIX: read_open_clip,
    HUGGINGFACE: lambda name: read_folder(fetch(name))[0],
}
"""What a name starts with → what reads it."""

KINDS: Sequence[tuple[Callable[[Path], bool], Callable[[Path], DualEncoder]]] = (
    (lambda path: (path / FILE).is_file(), lambda path: read_declip_file(path / FILE)),
    (lambda path: path.is_file() and holds_recipe(path), read_declip_file),  # a pipe would be waited for
    (Path.is_file, lambda path: read_authors_file(path)[0]),
    (is_huggingface, from_huggingface),
    (Path.exists, lambda path: model_of(read_checkpoint(path), path)),
)
"""What there is at a path → what reads it; the first that fits."""
