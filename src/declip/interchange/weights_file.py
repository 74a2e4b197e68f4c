"""Files of weights that came from elsewhere: no code runs, and they take no more memory than their size explains."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import TextEncoder
from declip.recipe.schema import Recipe

MOST_GROWTH = 4
"""How many times a file's size its contents may take. Weights hardly compress and torch does not try; tied weights
count twice."""

ZIP = b"PK\x03\x04"
"""What an archive of torch's starts with; files of other kinds do not."""


def read_weights(path: Path) -> Any:
    """Read what a file of torch's or a safetensors file holds, onto the host, and check it against the file's size.

    Raises:
        UserError: it is a program, or a bomb.
        Exception: of whatever kind the libraries raise for files that are damaged or hold other things.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    check_archive(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    _check_tensors(path, found)
    return found


def check_weights(path: Path) -> None:
    """Check a file that another library will read; the tensors of torch's archives are mapped, not read.

    Raises:
        UserError, Exception: as `read_weights`.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # reads the header, which says no more than the file holds
            return
    check_archive(path)
    if path.suffix not in {".npy", ".npz"}:  # of NumPy's, which unpickles nothing unless it is told to
        _check_tensors(path, torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path) or None))


def check_archive(path: Path) -> None:
    """Refuse a TorchScript archive, the form in which OpenAI publishes its weights, and an archive that is a bomb.

    Raises:
        UserError: it is one of these.
        BadZipFile: it is damaged.
    """
    if not _is_archive(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise UserError(
            f"'{path}' is a TorchScript archive: a program with its weights, which is not run here. "
            "OpenAI's weights are had by their tag, as in 'open_clip:ViT-B-32/openai'; "
            "of a program of your own save the `state_dict()` alone."
        )
    _refuse_growth(path, sum(entry.file_size for entry in entries))


def outline(recipe: Recipe, encoder: TextEncoder | None = None) -> DualEncoder:
    """Build the model that a recipe from elsewhere describes without memory for its weights, on the device "meta".

    Args:
        recipe: The recipe.
        encoder: The text encoder that came with it, where it has one.

    Raises:
        UserError: it cannot be built.
    """
    try:
        with torch.device("meta"):
            return DualEncoder.from_recipe(recipe, encoder)
    except UserError:
        raise
    except Exception as error:  # sizes that no one meant fail anywhere in torch and timm
        raise UserError(f"A model of these sizes cannot be built: {type(error).__name__}: {error}") from error


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def _check_tensors(path: Path, found: Any) -> None:
    """A tensor can repeat one number a million times a million times; whatever copies it would take the memory."""
    _refuse_growth(path, sum(tensor.nbytes for tensor in _tensors(found)))


def _tensors(found: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and lists, each once: these may hold each other, and themselves."""
    left, seen = [found], set[int]()
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            left.extend(item.values())
        elif isinstance(item, list | tuple | set):
            left.extend(item)


def _refuse_growth(path: Path, unpacked: int) -> None:
    size = path.stat().st_size
    if unpacked > MOST_GROWTH * size:
        raise UserError(
            f"'{path}' has {size:,} bytes but says that {unpacked:,} come out of it: more than weights ever do. It is "
            "not read. Save the weights again, as torch.save or safetensors do."
        )
