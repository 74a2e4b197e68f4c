"""Files of tensors from elsewhere: no code in them runs, and they take no more memory than their size explains."""

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from declip.errors import UserError
from declip.interchange.weights import one_line

T = TypeVar("T")

MOST_GROWTH = 4
"""Times a file's size that its contents may take. Weights hardly compress, and tied weights count twice."""


def read_tensors(path: Path) -> Any:
    """Read a file of torch's or a safetensors file onto the host."""
    if not path.is_file() or path.suffix == ".onnx":
        raise UserError(f"'{path}' is no file of weights. Give a path of one, as torch.save or safetensors write it.")
    try:
        return load_file(path) if path.suffix == ".safetensors" else _load(path)
    except UserError:
        raise
    except Exception as error:  # a file can be wrong in any way
        raise UserError(f"Cannot read weights from '{path}': {reason(error)} Download the file again.") from error


def unwrapped(content: Any, *keys: str) -> Mapping[str, Any]:
    """The weights in a checkpoint's content, under the first of the keys that it has, or all of it."""
    content = content if isinstance(content, Mapping) else {}
    return next((content[key] for key in keys if isinstance(content.get(key), Mapping)), content)


def check_file(path: Path) -> None:
    """Check a file that another library will read; the tensors of torch's archives are mapped, not read."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # reads the header, which says no more than the file holds
            return
    if path.suffix not in {".npy", ".npz"}:  # NumPy unpickles nothing by default
        _load(path, mmap=True)


def fetch(given: str, get: Callable[[], T], here: str) -> T:
    """Call what fetches a model by its name; `here` says how weights on this machine are named instead."""
    try:
        return get()
    except Exception as error:  # hub, network and disk each have errors of their own
        raise UserError(
            f"Cannot fetch '{given}': {one_line(error, 180).rstrip('.')}. Check the network and the name; weights on "
            f"this machine are given as {here}."
        ) from error


def reason(error: Exception, longest: int = 300) -> str:
    """Say why a file cannot be read; torch's own message advises `weights_only=False`, which would run its code."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is no file of tensors, or it holds more than tensors."
    text = one_line(error, longest)
    return text if text.endswith((".", "…")) else f"{text}."


def _load(path: Path, mmap: bool = False) -> Any:
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"  # by which torch knows its archives
    if archive:
        with zipfile.ZipFile(path) as opened:
            entries = opened.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise UserError(
                f"'{path}' is a TorchScript archive, a program, which is not run here. Take OpenAI's weights by their "
                "tag, as in 'open_clip:ViT-B-32/openai'; of your own program save the `state_dict()`."
            )
        _refuse_growth(path, sum(entry.file_size for entry in entries))
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=(mmap and archive) or None)
    # A tensor can repeat one number a million times a million times; whatever copies it would take the memory.
    _refuse_growth(path, sum(tensor.nbytes for tensor in _tensors(content)))
    return content


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
        elif isinstance(item, Mapping | list | tuple | set):
            left.extend(item.values() if isinstance(item, Mapping) else item)


def _refuse_growth(path: Path, unpacked: int) -> None:
    size = path.stat().st_size
    if unpacked > MOST_GROWTH * size:
        raise UserError(
            f"'{path}' has {size:,} bytes but says that {unpacked:,} come out of it. Save the weights again."
        )
