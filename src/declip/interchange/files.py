"""Files of tensors from elsewhere: no code in them runs, and they take no more memory than their size explains."""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from declip.errors import UserError
from declip.interchange.weights import one_line

MOST_GROWTH = 4
"""Times a file's size that its contents may take. Weights hardly compress, and tied weights count twice."""

ZIP = b"PK\x03\x04"
"""The first bytes of torch's archives."""


def read_tensors(path: Path) -> Any:
    """Read a file of torch's or a safetensors file onto the host."""
    if not path.is_file():
        raise UserError(f"There is no file '{path}'. Give the path of a file of weights.")
    if path.suffix == ".onnx":
        raise UserError(f"'{path}' is an ONNX file, which is a program for a runtime. Give a file of weights.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_size(path, content)
        return content
    except UserError:
        raise
    except Exception as error:  # a file can be wrong in any way
        raise UserError(
            f"Cannot read weights from '{path}': {reason(error)} Save them as torch.save or safetensors do; download "
            "the file again if it is cut."
        ) from error


def check_file(path: Path) -> None:
    """Check a file that another library will read; the tensors of torch's archives are mapped, not read."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # reads the header, which says no more than the file holds
            return
    _check_archive(path)
    if path.suffix not in {".npy", ".npz"}:  # NumPy unpickles nothing by default
        _check_size(path, torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path) or None))


def reason(error: Exception, longest: int = 300) -> str:
    """Say why a file cannot be read; torch's own message advises `weights_only=False`, which would run its code."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is no file of tensors, or it holds more than tensors."
    text = one_line(error, longest)
    return text if text.endswith((".", "…")) else f"{text}."


def _check_archive(path: Path) -> None:
    if not _is_archive(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise UserError(
            f"'{path}' is a TorchScript archive: a program with its weights, which is not run here. Take OpenAI's "
            "weights by their tag, as in 'open_clip:ViT-B-32/openai'; of your own program save the `state_dict()`."
        )
    _refuse_growth(path, sum(entry.file_size for entry in entries))


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def _check_size(path: Path, content: Any) -> None:
    """A tensor can repeat one number a million times a million times; whatever copies it would take the memory."""
    _refuse_growth(path, sum(tensor.nbytes for tensor in _tensors(content)))


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and lists, each once: these may hold each other, and themselves."""
    left, seen = [content], set[int]()
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
