"""Writing models: in a foreign format, or as a folder of ours; each folder is read back and gets a model card."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from declip.errors import UserError, unknown
from declip.evaluation.encode import measuring
from declip.interchange import declip_file, huggingface, official, onnx, open_clip
from declip.interchange.declip_file import CARD, FILE
from declip.interchange.foreign import Refusal
from declip.interchange.model_card import NO_LICENSE, Provenance, model_card, trace
from declip.interchange.read import read
from declip.interchange.weights import Weights, one_line
from declip.io.atomic import atomic_write
from declip.io.text import listed
from declip.models.dual_encoder import DualEncoder
from declip.supervision.objective import without_run_state

log = logging.getLogger("declip")

LARGEST_DIFFERENCE = 1e-4
"""Of features of length 1, between a model and its export; exact exports differ by some 1e-7."""

LEAST_COSINE = {"fp16": 0.999, "int8": 0.95}
"""Between features of a model and of its export in a lower precision, in place of `LARGEST_DIFFERENCE`."""

CAPTIONS = ("a red circle", "two cats asleep on a sofa, seen from above", "!")

FORMATS: Mapping[str, ModuleType] = {
    "open_clip": open_clip, "huggingface": huggingface, "onnx": onnx, "safetensors": declip_file,
}  # fmt: skip
"""Modules with `express(model)`, which raises a `Refusal` where the format cannot express a model, `write(model,
folder)`, `reread(folder)`, an ImportError where the library is not installed, and `LIBRARY`, its name on the Hub."""

SOURCES: Mapping[str, Callable[..., Weights]] = {
    "declip-official": official.read, "open_clip": open_clip.read, "huggingface": read,
}  # fmt: skip

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""OWNER/NAME on the Hub."""


@dataclass(frozen=True)
class Exported:
    """A folder that was written, and read back by the format's own library."""

    folder: Path
    difference: float | None  # largest of any number of a feature of length 1; None where the library is not installed
    by: str  # the library and its version
    cosine: float | None = None  # smallest of a feature and the one read back, for a lower precision

    def __str__(self) -> str:
        if self.difference is None:
            return f"Not read back here: {self.by} is not installed."
        rounded_down = math.floor((self.cosine or 0) * 1e6) / 1e6
        cosine = "" if self.cosine is None else f", their cosine is at least {rounded_down:.6f}"
        return f"Read back by {self.by}: features differ by at most {self.difference:.1e}{cosine}."


def export(
    model: str | Path | DualEncoder,
    format: str,
    out: str | Path,
    *,
    license: str = NO_LICENSE,
    overwrite: bool = False,
    repo: str | None = None,
    precision: str = "fp32",
) -> Exported:
    """Write a model in a foreign format, read it back where that library is installed, and add a model card.

    Args:
        model: What `declip.load` takes, or a loaded model. Of a run the card tells data, steps and results.
        format: A key of `FORMATS`.
        out: The folder to write; it appears when all of it is there.
        license: For the card: an identifier of the Hub's such as "mit", or any words.
        overwrite: Replace an export that is there.
        repo: The repository, OWNER/NAME, that the folder will be on the Hub, for the card. Loading "open_clip" from
            there needs it where the vocabulary is not CLIP's whole one.
        precision: For "onnx": "fp32", "fp16" or "int8"; refused where a feature's cosine is below `LEAST_COSINE`.
    """
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if repo is not None and not REPOSITORY.fullmatch(repo):
        raise UserError(f"The repository is '{repo}'; give OWNER/NAME, such as your-name/my-clip.")
    if precision != "fp32" and (format != "onnx" or precision not in LEAST_COSINE):
        raise UserError(f"--precision is '{precision}'; {', '.join(LEAST_COSINE)} are for onnx, fp32 for all.")
    out, form = Path(out).expanduser(), FORMATS[format]
    options: dict[str, Any] = {"open_clip": {"repo": repo, "home": out}, "onnx": {"precision": precision}}
    traced, provenance = trace(model)
    if {weight.dtype for weight in traced.parameters()} != {torch.float32}:
        traced = deepcopy(traced).float()
    with _new_folder(out, overwrite) as folder, measuring(traced):
        try:
            form.write(traced, folder, **options.get(format, {}))
        except Refusal as refusal:
            takers = listed(list(_takers(traced)))
            raise UserError(
                f"This model cannot be exported as {format}: {refusal}. Formats that can: {takers}."
            ) from refusal
        exported = replace(_compare(traced, form, folder, precision), folder=out)
        card = model_card(traced, provenance, form.LIBRARY, str(exported), license, repo)
        (folder / CARD).write_text(card, encoding="utf-8")
    if exported.difference is None:
        log.warning("%s Check it where that is.", exported)
    return exported


def import_weights(
    file: str | Path,
    source: str,
    out: str | Path,
    *,
    license: str = NO_LICENSE,
    overwrite: bool = False,
    text_heads: int | None = None,
    image_heads: int | None = None,
) -> Path:
    """Write another library's weights as a folder that `declip.load` reads: declip.safetensors and a model card.

    Args:
        file: Of "declip-official" a checkpoint; of "open_clip" a name, with or without "open_clip:", or a folder; of
            "huggingface" a folder, or ``huggingface:OWNER/NAME``.
        source: A key of `SOURCES`.
        out, license, overwrite: See `export`.
        text_heads, image_heads: For "declip-official"; by default one for each 64 channels.
    """
    if source not in SOURCES:
        raise unknown("source of weights", source, SOURCES)
    heads = {n: h for n, h in {"text_heads": text_heads, "image_heads": image_heads}.items() if h is not None}
    if heads and source != "declip-official":
        raise UserError(f"Weights of {source} say their numbers of attention heads. Leave {', '.join(heads)} out.")
    weights = SOURCES[source](str(file), **heads)
    provenance = Provenance(weights.recipe, origin=f"`{Path(file).name}` ({source})")
    folder = Path(out).expanduser()
    write_folder(weights.build(), provenance, folder, without_run_state(weights.heads), license, overwrite)
    return folder


def write_folder(
    model: DualEncoder,
    provenance: Provenance,
    out: Path,
    heads: Mapping[str, Tensor] | None = None,
    license: str = NO_LICENSE,
    overwrite: bool = False,
) -> None:
    """Write a model as a folder that `declip.load` reads, with a model card."""
    with _new_folder(out, overwrite) as folder:
        declip_file.write_declip_file(model, folder / FILE, heads)
        card = model_card(model, provenance, declip_file.LIBRARY, license=license)
        (folder / CARD).write_text(card, encoding="utf-8")


@contextmanager
def _new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder that takes the place of `out` when all went well; nothing is left otherwise."""
    old = list(out.iterdir()) if out.is_dir() else []
    if out.is_file() or (old and not overwrite):
        raise UserError(f"'{out}' is a file, or not empty. Give another --out, or --overwrite to replace an export.")
    if old and (not (out / CARD).is_file() or any(path.is_dir() for path in old)):
        raise UserError(f"'{out}' is no export, so --overwrite does not replace it. Give another --out.")
    try:
        with atomic_write(out, "give another folder as --out") as folder:
            folder.mkdir()
            yield folder
    except (OSError, SafetensorError) as error:  # the latter is its one class for every trouble with a file
        raise UserError(f"Cannot write '{out}': {error}. Make room, or give another folder as --out.") from error


def _takers(model: DualEncoder) -> Iterator[str]:
    for name, form in FORMATS.items():
        with suppress(Refusal):
            form.express(model)
            yield name


def _compare(model: DualEncoder, form: ModuleType, folder: Path, precision: str) -> Exported:
    """Read a folder back and compare the features."""
    try:
        foreign = form.reread(folder)
    except ImportError as error:
        return Exported(folder, None, error.name or form.LIBRARY)
    except Exception as error:  # of whatever kind: a library that finds what it reads to be none of its own
        raise UserError(
            f"{form.LIBRARY} cannot read the export, so it is not kept: {one_line(error, 200)} Report its recipe."
        ) from error
    size = model.preprocessor.size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected, features = [model.encode_image(pixels.to(model.device))], [foreign.image(pixels)]
    if foreign.text is not None:
        tokens = model.tokenize(CAPTIONS)
        expected.append(model.encode_text(tokens))
        features.append(foreign.text(tokens.cpu()))
    ours, theirs = torch.cat(expected).cpu(), F.normalize(torch.cat(features).float(), dim=-1)
    difference, cosine = float((ours - theirs).abs().max()), float((ours * theirs).sum(-1).min())  # NaN where any is
    near = difference <= LARGEST_DIFFERENCE if precision == "fp32" else cosine >= LEAST_COSINE[precision]
    if not near:
        raise UserError(
            f"{foreign.by} computes other features from the export in {precision} (they differ by {difference:.1e}, "
            f"with a cosine of {cosine:.4f}), so it is not kept. Give another --precision, or report its recipe."
        )
    return Exported(folder, difference, foreign.by, None if precision == "fp32" else cosine)
