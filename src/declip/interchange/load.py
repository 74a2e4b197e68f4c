"""Loading a model: a run folder or a checkpoint of ours, a checkpoint of the authors', or a model of open_clip's."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from declip.config import Recipe, read_yaml
from declip.errors import UserError
from declip.evaluation.features import Encoder
from declip.interchange.declip_authors import read_declip_authors
from declip.interchange.open_clip import CONFIG, FOLDER, PREFIX, read_open_clip
from declip.interchange.weights_file import outline, read_weights
from declip.models.dual_encoder import DualEncoder
from declip.training.build import pick_device
from declip.training.checkpoint import STATE, list_checkpoints, load_checkpoint, newest_good, part
from declip.training.run import RECIPE


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
        """(n, 3, S, S) normalised → (n, width) float32, the pooled feature before the projection."""
        ...


def load(where: str | Path, device: str = "auto") -> Model:
    """Load a trained model, in evaluation mode.

    Args:
        where: A run folder (its newest good checkpoint), a checkpoint folder inside one, a file with the authors'
            weights (``.pth``, ``.pth.tar``, ``.pt``, ``.safetensors``), or a name of
            `declip.interchange.open_clip`, such as ``open_clip:ViT-B-32/openai``.
        device: "auto", "cpu", "cuda", …

    Returns:
        The model: `encode_image(preprocess(images))` and `encode_text(tokenize(texts))`. Averaged weights are taken
        where the run kept them.

    Raises:
        UserError: nothing there, nothing loadable there, or a damaged file.
    """
    if isinstance(where, str) and where.startswith(PREFIX):
        return read_open_clip(where).to(pick_device(device))
    path = Path(where)
    if not path.exists():
        raise UserError(
            f"There is no model at '{where}'. Give a run folder, a checkpoint folder, a weights file, "
            f"or {PREFIX}MODEL/TAG."
        )
    found = _from_file(path) if path.is_file() else _from_checkpoint(path)
    return found.to(pick_device(device)).eval()


def _from_file(path: Path) -> DualEncoder:
    try:
        return read_declip_authors(path)[0]
    except UserError as error:
        raise _not_the_authors(path) or error from error


def _not_the_authors(path: Path) -> UserError | None:
    """Say how to load what is not the authors' but known all the same."""
    names = {name.removeprefix("module.") for name in _tensor_names(path)}
    if "model.logit_scale" in names and any(name.startswith("model.image_tower.") for name in names):
        return UserError(f"'{path}' holds the weights of a checkpoint. Give its folder, '{path.parent}', or its run.")
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


def _from_checkpoint(path: Path) -> DualEncoder:
    if (path / STATE).is_file():
        found = load_checkpoint(path)
    elif list_checkpoints(path):
        newest, problems = newest_good(path)
        if newest is None:
            raise UserError(f"No checkpoint in '{path}' is whole. {problems[0]}")
        found = newest
    elif (path / CONFIG).is_file():
        raise UserError(f"'{path}' is a folder of open_clip's. Load it as {PREFIX}{FOLDER}{path}.")
    else:
        what = "has no checkpoint yet" if (path / RECIPE).is_file() else f"is not a run folder: it has no {RECIPE}"
        raise UserError(f"'{path}' {what}. Give a run folder, or a folder in its checkpoints.")
    recipe = _recipe(found.recipe, path)
    weights = part("average", found.weights) or part("model", found.weights)
    # Sizes come from the file, so the model is built without memory first, to see that the weights fit.
    _put(outline(recipe), {name: tensor.to("meta") for name, tensor in weights.items()}, path)
    model = DualEncoder.from_recipe(recipe)
    _put(model, weights, path)
    return model


def _put(model: DualEncoder, weights: Mapping[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"The weights in '{path}' do not fit their recipe: {str(error).splitlines()[-1].strip()}"
        ) from error


def _recipe(text: str, path: Path) -> Recipe:
    """The recipe in a checkpoint, which may be a stranger's."""
    try:
        return Recipe.model_validate(read_yaml(text))
    except Exception as error:  # YAML's tags and pydantic's checks each have errors of their own
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"The recipe of the checkpoint in '{path}' cannot be read by this version: {said}") from error
