"""A whole model in one safetensors file: weights, and the recipe in the file's metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import declip
from declip.errors import UserError
from declip.interchange.weights_file import outline
from declip.io.atomic import save_tensors
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import encoder_kept_in
from declip.models.no_text import drop_text
from declip.recipe.load import read_yaml
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import part, prefixed

FILE, CARD = "declip.safetensors", "README.md"
RECIPE, VERSION = "declip.recipe", "declip.version"
"""Names in the metadata."""

USAGE = """
import declip, torch
from PIL import Image

model = declip.load("declip.safetensors")
picture = Image.new("RGB", (320, 240), "orange")  # your picture
with torch.no_grad():
    image = model.encode_image(model.preprocess(picture))
    texts = model.encode_text(model.tokenize(["an orange square", "a cat"]))
print((model.logit_scale.exp() * image @ texts.T).softmax(dim=-1))
"""
IMAGE_USAGE = """
import declip, torch
from PIL import Image

model = declip.load("declip.safetensors")
picture = Image.new("RGB", (320, 240), "orange")  # your picture
with torch.no_grad():
    image = model.encode_image(model.preprocess(picture))
    hidden = model.encode_backbone(model.preprocess(picture))
print(image.shape, hidden.shape)
"""


def write_declip_file(model: DualEncoder, path: Path, heads: Mapping[str, Tensor] | None = None) -> None:
    """Write a model that knows its recipe.

    Args:
        model: The model; its tensors are named "model.…" as in a checkpoint.
        path: The file.
        heads: What only training needs, named "objective.…" in the file: projectors, the language head, the queue.

    Raises:
        UserError: the model has no recipe.
    """
    if model.recipe is None:
        raise UserError("This model was not built from a recipe, so no file can say what it is. Use another format.")
    tensors = prefixed("model", model.state_dict()) | prefixed("objective", heads or {})
    metadata = {RECIPE: model.recipe.to_yaml(), VERSION: declip.__version__, "format": "pt"}
    save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)


def holds_recipe(path: Path) -> bool:
    """Whether a file is one that `write_declip_file` wrote; a file of any other kind is not."""
    try:
        with safe_open(path, "pt") as file:
            return RECIPE in (file.metadata() or {})
    except Exception:  # of whatever kind; what reads the file next says what is wrong with it
        return False


def read_declip_file(path: Path) -> DualEncoder:
    """Read a model back, in training mode, on the CPU; no code in the file is run.

    Raises:
        UserError: the recipe cannot be read by this version, or the weights are not those of the recipe: the first
            one that differs is named.
    """
    with safe_open(path, "pt") as file:
        recipe = read_recipe(file.metadata()[RECIPE], path)
    weights = part("model", load_file(path))
    alone = not any(name.startswith("text_tower.") for name in weights)
    # Sizes come from the file, so the model is built without memory first, to see that the weights fit.
    encoder, shapes = encoder_kept_in(weights, recipe, path), {name: t.to("meta") for name, t in weights.items()}
    place_weights(_without_text(outline(recipe, encoder), alone), shapes, path)
    with torch.random.fork_rng(devices=[]):
        model = _without_text(DualEncoder.from_recipe(recipe, encoder), alone)
    place_weights(model, weights, path)
    return model


def read_recipe(text: str, path: Path) -> Recipe:
    """Read the recipe that came with weights, perhaps a stranger's.

    Raises:
        UserError: this version cannot read it.
    """
    try:
        return Recipe.model_validate(read_yaml(text))
    except Exception as error:  # YAML's tags and pydantic's checks each have errors of their own
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"The recipe of the model in '{path}' cannot be read by this version: {said}") from error


def place_weights(model: DualEncoder, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put weights into a model.

    Raises:
        UserError: they are not the model's: the first one that differs is named.
    """
    if difference := first_difference(model.state_dict(), weights):
        raise UserError(f"The weights in '{path}' do not fit their recipe: {difference}.")
    model.load_state_dict(weights)


def first_difference(expected: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """Say what differs first between two sets of named tensors, and how many more differ; None where nothing does."""
    problems = [f"'{name}' is missing" for name in expected if name not in given]
    problems += [f"'{name}' belongs to another model" for name in given if name not in expected]
    problems += [
        f"'{name}' has shape {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    more = f", and {len(problems) - 1:,} more differ" if len(problems) > 1 else ""
    return problems[0] + more if problems else None


def _without_text(model: DualEncoder, alone: bool) -> DualEncoder:
    return drop_text(model) if alone else model
