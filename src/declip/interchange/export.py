"""Writing models: in a foreign format, or as a folder of ours; each folder is read back and gets a model card."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from declip.errors import UserError, unknown
from declip.evaluation.encode import measuring
from declip.interchange import declip_file, huggingface, official, onnx, open_clip
from declip.interchange.declip_file import CARD, FILE
from declip.interchange.foreign import Refusal, ToFeatures
from declip.interchange.model_card import NO_LICENSE, model_card
from declip.interchange.provenance import Provenance, trace
from declip.interchange.read import Model
from declip.interchange.weights import Weights, one_line, without_queue
from declip.io.atomic import atomic_write
from declip.io.text import listed
from declip.models.dual_encoder import DualEncoder

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
    "declip-official": official.read, "open_clip": open_clip.read, "huggingface": huggingface.read,
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A folder that was written.

    Attributes:
        difference: Largest difference of any number of a feature of length 1, read back by the format's own library;
            None where that is not installed.
        by: That library and its version.
        cosine: Smallest cosine of a feature and the one read back, for a lower precision.
    """

    folder: Path
    difference: float | None
    by: str
    cosine: float | None = None

    def __str__(self) -> str:
        if self.difference is None:
            return f"Not read back here: {self.by} is not installed."
        cosine = ""
        if self.cosine is not None:  # rounded down
            cosine = f", their cosine is at least {math.floor(self.cosine * 1e6) / 1e6:.6f}"
        return f"Read back by {self.by}: features differ by at most {self.difference:.1e}{cosine}."


def export(
    model: str | Path | Model,
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
        overwrite: Replace a folder that is not empty.
        repo: The repository, OWNER/NAME, that the folder will be on the Hub, for the card. Loading "open_clip" from
            there needs it where the vocabulary is not CLIP's whole one.
        precision: For "onnx": "fp32", "fp16" or "int8"; refused where a feature's cosine is below `LEAST_COSINE`.
    """
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--repo is '{repo}'; give the repository that the folder will be on the Hub, OWNER/NAME.")
    if precision != "fp32" and (format != "onnx" or precision not in LEAST_COSINE):
        raise UserError(f"--precision is '{precision}'; {', '.join(LEAST_COSINE)} are for onnx, fp32 for all.")
    out, form = Path(out), FORMATS[format]
    traced, provenance = trace(model)
    write = partial(open_clip.write, repo=repo, home=out) if format == "open_clip" else form.write
    if precision != "fp32":
        write = partial(onnx.write, precision=precision)
    with _new_folder(out, overwrite) as folder, measuring(traced):
        try:
            write(traced, folder)
        except Refusal as refusal:
            takers = [name for name, other in FORMATS.items() if _expresses(other, traced)]
            raise UserError(
                f"This model cannot be exported as {format}: {refusal}. Formats that can: {listed(takers)}."
            ) from refusal
        exported = Exported(out, *_compare(traced, form, folder, precision))
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
        file: Of "declip-official" a checkpoint, with both towers or the image tower alone; of "open_clip" a name, with
            or without "open_clip:", or a folder; of "huggingface" a folder of transformers' `CLIPModel`, or
            ``huggingface:OWNER/NAME``.
        source: A key of `SOURCES`.
        out, license, overwrite: See `export`.
        text_heads, image_heads: Attention heads of the towers, which a checkpoint of "declip-official" does not hold;
            by default one for each 64 channels.
    """
    if source not in SOURCES:
        raise unknown("source of weights", source, SOURCES)
    given = {"text_heads": text_heads, "image_heads": image_heads}
    heads = {name: number for name, number in given.items() if number is not None}
    if heads and source != "declip-official":
        raise UserError(f"Weights of {source} say their number of attention heads. Leave {', '.join(heads)} out.")
    weights = SOURCES[source](str(file), **heads)
    provenance = Provenance(weights.recipe, origin=f"`{Path(file).name}` ({source})")
    write_folder(weights.build(), provenance, Path(out), without_queue(weights.heads), license, overwrite)
    return Path(out)


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
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"'{out}' is not empty. Give --overwrite to replace it whole, or another folder as --out.")
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file. Give a folder as --out.")
    try:
        with atomic_write(out, "give another folder as --out") as folder:
            folder.mkdir()
            yield folder
    except (OSError, SafetensorError) as error:  # the latter is its one class for every trouble with a file
        raise UserError(f"Cannot write '{out}': {error}. Make room, or give another folder as --out.") from error


def _expresses(form: ModuleType, model: DualEncoder) -> bool:
    try:
        form.express(model)
    except Refusal:
        return False
    return True


def _compare(
    model: DualEncoder, form: ModuleType, folder: Path, precision: str
) -> tuple[float | None, str, float | None]:
    """Give the largest difference of features, the library that read the folder, and the smallest cosine."""
    try:
        foreign = form.reread(folder)
    except ImportError as error:
        return None, error.name or form.LIBRARY, None
    except Exception as error:  # of whatever kind: a library that finds what it reads to be none of its own
        raise UserError(
            f"{form.LIBRARY} cannot read the export, so it is not kept: {one_line(error, 200)} Report its recipe."
        ) from error
    size = model.preprocessor.size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    encoders: list[tuple[ToFeatures, ToFeatures, Tensor]] = [(model.encode_image, foreign.image, pixels)]
    if foreign.text is not None:
        encoders.append((model.encode_text, foreign.text, model.tokenize(CAPTIONS)))
    differences, cosines = [], []
    for ours, theirs, batch in encoders:
        expected, features = ours(batch.to(model.device)).cpu(), F.normalize(theirs(batch.cpu()).float(), dim=-1)
        differences.append((expected - features).abs().max())
        cosines.append((expected * features).sum(-1).min())
    difference, cosine = float(torch.stack(differences).max()), float(torch.stack(cosines).min())  # NaN where any is
    if precision != "fp32" and not cosine >= LEAST_COSINE[precision]:
        raise UserError(
            f"In {precision} features are too different: a cosine of {cosine:.4f}, at least {LEAST_COSINE[precision]} "
            "is required. The export is not kept; give another --precision."
        )
    if precision == "fp32" and not difference <= LARGEST_DIFFERENCE:
        raise UserError(
            f"{foreign.by} computes other features from the export (they differ by {difference:.1e}), so it is not "
            "kept. Report its recipe."
        )
    return difference, foreign.by, None if precision == "fp32" else cosine
