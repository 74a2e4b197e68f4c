"""Format of declip: one safetensors file with the weights and, in its metadata, the recipe."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import declip
from declip.errors import UserError
from declip.interchange.format import Format, ModelRecord, ReadBack
from declip.interchange.weights import Weights, read_recipe
from declip.io.atomic import save_tensors
from declip.io.text import one_line
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import with_prefix, without_prefix

FILE = "declip.safetensors"
RECIPE, VERSION = "declip.recipe", "declip.version"  # keys of the metadata


def matches(where: str) -> bool:
    """Whether a path is a file of declip, or a folder with one."""
    path = Path(where).expanduser()
    if (path / FILE).is_file():
        return True
    if not path.is_file():  # a pipe would block
        return False
    try:
        with safe_open(path, "pt") as file:
            return RECIPE in (file.metadata() or {})
    except Exception:  # the reader of the actual format reports what is wrong
        return False


def read(where: str) -> Weights:
    """Read a file, or the file in a folder."""
    return read_part(where).check()


def read_part(where: str) -> Weights:
    """Read a file with a part of a model, such as the pretrained weights that a run started from."""
    path = Path(where).expanduser()
    if path.is_dir():
        path /= FILE
    try:
        with safe_open(path, "pt") as file:
            recipe = file.metadata()[RECIPE]
        tensors = load_file(path)
    except Exception as error:  # safetensors has its own classes
        raise UserError(f"'{path}' is damaged: {one_line(error, 200)}. Export it again.") from error
    return Weights(
        recipe=read_recipe(recipe, str(path)),
        tensors=without_prefix("model", tensors),
        origin=where,
        heads=without_prefix("objective", tensors),
    )


def write_declip_file(
    model: DualEncoder, path: Path, heads: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model, as "model.…" tensors, and heads of losses, as "objective.…" tensors."""
    if not heads and model.token_scorer:
        heads = model.token_scorer.heads
    tensors = with_prefix("model", model.state_dict()) | with_prefix("objective", heads or {})
    write_part(tensors, model.recipe, path)


def write_part(tensors: Mapping[str, Tensor], recipe: Recipe, path: Path) -> None:
    """Write tensors of a model, or a part of them, with the recipe."""
    metadata = {RECIPE: recipe.to_yaml(), VERSION: declip.__version__, "format": "pt"}
    save_tensors(tensors, path, metadata)


class DeclipFile(Format):
    """declip.safetensors, which holds every model."""

    name, library = "safetensors", "declip"

    def holds(self, model: DualEncoder) -> None:
        """Accept every model."""

    def write(self, record: ModelRecord, folder: Path, repo: str | None) -> None:
        """Write declip.safetensors, with the heads of losses."""
        write_declip_file(record.model, folder / FILE, record.heads)

    def read_back(self, folder: Path) -> ReadBack:
        """Load the folder."""
        model = read_part(str(folder)).build().eval()  # which this process wrote
        encode_text = model.encode_text if model.has_text else None
        return ReadBack(f"declip {declip.__version__}", model.encode_image, encode_text)
