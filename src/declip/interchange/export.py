"""Export a model as a folder of another library's or our format, with a model card."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from declip.errors import UserError, unknown
from declip.evaluation.encode import eval_mode
from declip.interchange import declip_file, huggingface, onnx, open_clip
from declip.interchange.declip_file import CARD
from declip.interchange.layouts import Refusal
from declip.interchange.model_card import NO_LICENSE, Traced, model_card, trace
from declip.interchange.onnx import FOLDERS
from declip.io.atomic import atomic_write
from declip.io.text import listed, one_line
from declip.models.dual_encoder import DualEncoder

TOLERANCE = 1e-4
"""Tolerance for features of length 1, between a model and its export; exact exports differ by about 1e-7."""

CAPTIONS = ("a red circle", "two cats asleep on a sofa, seen from above", "!")

FORMATS: Mapping[str, ModuleType] = {
    "open_clip": open_clip, "huggingface": huggingface, "onnx": onnx, "safetensors": declip_file,
}  # fmt: skip
"""Modules with `express(model)`, which raises a `Refusal` if the format cannot hold a model, `write(model, folder)`,
`reread(folder)`, which raises ImportError if the library is not installed, and `LIBRARY`, its name on the Hub."""

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME on the Hub


@dataclass(frozen=True)
class Exported:
    """Result of an export: the folder, and how the format's own library reads it back."""

    folder: Path
    difference: float | None  # largest of any number of a feature of length 1; None where the library is not installed
    by: str  # the library and its version

    def __str__(self) -> str:
        if self.difference is None:
            return f"Not read back: {self.by} is not installed here."
        return f"Read back by {self.by}: features differ by at most {self.difference:.1e}."


def export(
    model: str | Path | DualEncoder | Traced,
    format: str,
    out: str | Path,
    *,
    license: str = NO_LICENSE,
    overwrite: bool = False,
    repo: str | None = None,
) -> Exported:
    """Export a model as "open_clip", "huggingface", "onnx" or "safetensors", read it back, and write a model card.

    Args:
        model: What `declip.load` takes, or a loaded model. The card of a run shows data, steps and results.
        out: The folder to write; it appears when it is complete.
        license: License for the card: an identifier of the Hub such as "mit", or any text.
        overwrite: Replace an existing export.
        repo: OWNER/NAME of the repository on the Hub to which you will upload the folder, for the card. It is required
            if "open_clip" will load the model from there, unless the vocabulary is CLIP's.

    Examples:
        >>> declip.export("runs/demo", "safetensors", "exports/demo").difference < 1e-6
        True
    """
    # --- the request, before the model is loaded
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if repo is not None and not REPOSITORY.fullmatch(repo):
        raise UserError(f"The repository is '{repo}'; give OWNER/NAME, such as your-name/my-clip.")
    out, form, traced = Path(out).expanduser(), FORMATS[format], trace(model)
    built = traced.model
    options: dict[str, Any] = {"open_clip": {"repo": repo, "home": out}, "safetensors": {"heads": traced.heads}}
    if {weight.dtype for weight in built.parameters()} != {torch.float32}:
        built = deepcopy(built).float()
    # --- write into a new folder, read it back, add the card; the folder appears when all is done
    with _new_folder(out, overwrite) as folder, eval_mode(built):
        _write(built, format, folder, options.get(format, {}))
        exported = replace(_compare(built, form, folder), folder=out)
        card = model_card(traced, form.LIBRARY, str(exported), license, repo)
        (folder / CARD).write_text(card, encoding="utf-8")
    return exported


def _write(model: DualEncoder, format: str, folder: Path, options: Mapping[str, Any]) -> None:
    try:
        FORMATS[format].write(model, folder, **options)
    except Refusal as refusal:
        able = listed(list(supported_formats(model)))
        raise UserError(f"This model cannot be exported as {format}: {refusal}. Formats that can: {able}.") from refusal


@contextmanager
def _new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that replaces `out` when the block succeeds; nothing is left otherwise."""
    old = list(out.iterdir()) if out.is_dir() else []
    if out.is_file() or (old and not overwrite):
        raise UserError(f"'{out}' is a file, or not empty. Give another --out, or --overwrite to replace an export.")
    if old and (not (out / CARD).is_file() or any(path.is_dir() and path.name not in FOLDERS for path in old)):
        raise UserError(f"'{out}' is not an export, so --overwrite does not replace it. Give another --out.")
    try:
        with atomic_write(out, "give another folder as --out") as folder:
            folder.mkdir()
            yield folder
    except (OSError, SafetensorError) as error:  # the latter is its one class for every trouble with a file
        raise UserError(f"Cannot write '{out}': {error}. Make room, or give another folder as --out.") from error


def supported_formats(model: DualEncoder) -> Iterator[str]:
    """Formats that can hold a model."""
    for name, form in FORMATS.items():
        with suppress(Refusal):
            form.express(model)
            yield name


def _compare(model: DualEncoder, form: ModuleType, folder: Path) -> Exported:
    """Read a folder back and compare the features."""
    try:
        foreign = form.reread(folder)
    except ImportError as error:
        return Exported(folder, None, error.name or form.LIBRARY)
    except Exception as error:  # a library raises any class for a folder that it does not understand
        raise UserError(f"{form.LIBRARY} cannot read the export: {one_line(error, 200)} Report its recipe.") from error
    size = model.preprocessor.size
    # (3, 3, S, S) and (3, L)
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected, features = [model.encode_image(pixels.to(model.device))], [foreign.image(pixels)]
    if foreign.text is not None:
        tokens = model.tokenize(CAPTIONS)
        expected.append(model.encode_text(tokens))
        features.append(foreign.text(tokens.cpu()))
    ours, theirs = torch.cat(expected).cpu(), F.normalize(torch.cat(features).float(), dim=-1)
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE:  # NaN too
        raise UserError(
            f"{foreign.by} computes other features from the export (they differ by {difference:.1e}), so it was "
            "removed. Report its recipe."
        )
    return Exported(folder, difference, foreign.by)
