"""Our format: a whole model in one safetensors file, weights and, in its metadata, the recipe."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import declip
from declip.errors import UserError
from declip.interchange.layouts import Reread
from declip.interchange.weights import Weights, one_line, read_recipe
from declip.io.atomic import save_tensors
from declip.models.dual_encoder import DualEncoder, has_text
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import part, prefixed

LIBRARY = "declip"
FILE, CARD = "declip.safetensors", "README.md"
RECIPE, VERSION = "declip.recipe", "declip.version"
"""Names in the metadata."""


def matches(where: str) -> bool:
    """Whether a path is such a file, or a folder with one."""
    path = Path(where).expanduser()
    if (path / FILE).is_file():
        return True
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with safe_open(path, "pt") as file:
            return RECIPE in (file.metadata() or {})
    except Exception:  # of whatever kind; the reader of the file's own format says what is wrong with it
        return False


def read(where: str) -> Weights:
    """Read a file, or the one in a folder."""
    return read_part(where).check()


def read_part(where: str) -> Weights:
    """Read a file that may hold less than a model: a run keeps the part of its pretrained weights that it took."""
    path = Path(where).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        with safe_open(path, "pt") as file:
            recipe = file.metadata()[RECIPE]
        tensors = load_file(path)
    except Exception as error:  # safetensors has classes of its own
        raise UserError(f"'{path}' is damaged: {one_line(error, 200)}. Write it again.") from error
    return Weights(read_recipe(recipe, str(path)), part("model", tensors), str(where), part("objective", tensors))


def express(model: DualEncoder) -> None:
    """Every model can be expressed."""


def write(model: DualEncoder, folder: Path, heads: Mapping[str, Tensor] | None = None) -> None:
    """Write the file into a folder."""
    write_declip_file(model, folder / FILE, heads)


def write_declip_file(model: DualEncoder, path: Path, heads: Mapping[str, Tensor] | None = None) -> None:
    """Write a model that knows its recipe, named "model.…" as in a checkpoint, and heads of losses as "objective.…"."""
    assert model.recipe is not None, "built from a recipe"
    write_part(prefixed("model", model.state_dict()) | prefixed("objective", heads or {}), model.recipe, path)


def write_part(tensors: Mapping[str, Tensor], recipe: Recipe, path: Path) -> None:
    """Write tensors, perhaps a part of a model's, with the recipe."""
    metadata = {RECIPE: recipe.to_yaml(), VERSION: declip.__version__, "format": "pt"}
    save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)


def reread(folder: Path) -> Reread:
    """Load the folder again."""
    model = read(str(folder)).build().eval()
    return Reread(f"declip {declip.__version__}", model.encode_image, model.encode_text if has_text(model) else None)
