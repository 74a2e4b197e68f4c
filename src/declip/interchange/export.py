"""Writing models: in a foreign format, or as a folder of ours; each folder is read back and gets a model card."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

import declip
from declip.errors import UserError, unknown
from declip.evaluation.encode import measuring
from declip.interchange import declip_file, huggingface, official, onnx, open_clip, open_clip_model
from declip.interchange.declip_file import CARD, FILE
from declip.interchange.foreign import Refusal, Reread
from declip.interchange.model_card import NO_LICENSE, model_card
from declip.interchange.provenance import Provenance, trace
from declip.interchange.read import Model
from declip.interchange.weights import Weights, one_line, without_queue
from declip.io.atomic import atomic_write
from declip.io.text import listed
from declip.models.dual_encoder import DualEncoder
from declip.models.no_text import has_text

log = logging.getLogger("declip")

LARGEST_DIFFERENCE = 1e-4
"""Of features of length 1, between a model and its export; exact exports differ by some 1e-7."""

CAPTIONS = ("a red circle", "two cats asleep on a sofa, seen from above", "!")


@dataclass(frozen=True)
class ExportFormat:
    """A format that models are written in.

    Attributes:
        express: Raises `Refusal` where the format cannot express a model.
        write: Writes a model into a folder.
        reread: Reads the folder by the format's own library; an ImportError where that is not installed.
        library: The Hub's name of the library that loads it.
        usage: Python that works in the folder as it is.
        image_usage: The same for an image tower alone; empty where the format needs both.
    """

    express: Callable[[DualEncoder], Any]
    write: Callable[..., None]
    reread: Callable[[Path], Reread]
    library: str
    usage: str
    image_usage: str = ""


def _reread_ours(folder: Path) -> Reread:
    model = declip_file.read(str(folder)).build().eval()
    return Reread(f"declip {declip.__version__}", model.encode_image, model.encode_text if has_text(model) else None)


FORMATS: Mapping[str, ExportFormat] = {
    "open_clip": ExportFormat(open_clip.express, open_clip.write, open_clip.reread, "open_clip", open_clip.USAGE),
    "huggingface": ExportFormat(
        huggingface.express, huggingface.write, huggingface.reread, "transformers", huggingface.USAGE
    ),
    "onnx": ExportFormat(lambda _: None, onnx.write, onnx.reread, "onnx", onnx.USAGE, onnx.IMAGE_USAGE),
    "safetensors": ExportFormat(
        declip_file.express,
        lambda model, folder: declip_file.write_declip_file(model, folder / FILE),
        _reread_ours,
        "declip",
        declip_file.USAGE,
        declip_file.IMAGE_USAGE,
    ),
}


@dataclass(frozen=True)
class Exported:
    """A folder that was written.

    Attributes:
        folder: Its path.
        difference: Largest difference of any number of a feature of length 1, read back by the format's own library;
            None where that is not installed.
        by: That library and its version.
    """

    folder: Path
    difference: float | None
    by: str

    def __str__(self) -> str:
        if self.difference is None:
            return f"Not read back here: {self.by} is not installed."
        return f"Read back by {self.by}: features differ by at most {self.difference:.1e}."


def export(
    model: str | Path | Model,
    format: str,
    out: str | Path,
    *,
    license: str = NO_LICENSE,
    overwrite: bool = False,
    repo: str | None = None,
) -> Exported:
    """Write a model in a foreign format, read it back where that library is installed, and add a model card.

    Args:
        model: What `declip.load` takes, or a loaded model. Of a run the card tells data, steps and results.
        format: "open_clip", "huggingface", "onnx" or "safetensors".
        out: The folder to write; it appears when all of it is there.
        license: For the card: an identifier of the Hub's such as "mit", or any words.
        overwrite: Replace a folder that is not empty.
        repo: For "open_clip": the repository, OWNER/NAME, that the folder will be on the Hub. Loading from there needs
            it where the vocabulary is not CLIP's whole one.

    Raises:
        UserError: unknown format, a model that the format cannot express, features that come out differently, a
            folder that is in use or cannot be written.
    """
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if repo is not None and format != "open_clip":
        raise UserError(f"--repo is for the format open_clip; of {format} no file names its repository. Leave it out.")
    if repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--repo is '{repo}'; give the repository's id on the Hub, OWNER/NAME.")
    _check_out(Path(out), overwrite)
    traced, provenance = trace(model)
    form = FORMATS[format]
    write = partial(form.write, repo=repo, home=Path(out)) if format == "open_clip" else form.write
    with _new_folder(Path(out)) as folder, measuring(traced):
        try:
            write(traced, folder)
        except Refusal as refusal:
            raise _refused(traced, format, refusal) from refusal
        difference, by = _reread(traced, format, folder)
        exported = Exported(Path(out), difference, by)
        usage = form.usage if has_text(traced) else form.image_usage
        card = model_card(traced, provenance, form.library, usage, str(exported), license)
        (folder / CARD).write_text(card, encoding="utf-8")
    if difference is None:
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
        source: "declip-official", "open_clip" or "huggingface".
        out: The folder to write; it appears when all of it is there.
        license: See `export`.
        overwrite: Replace a folder that is not empty.
        text_heads, image_heads: Attention heads of the towers, which a checkpoint of "declip-official" does not hold;
            by default one for each 64 channels.

    Returns:
        The folder.

    Raises:
        UserError: unknown source, a file that is not of it (the first difference is named), a folder that is in use or
            cannot be written.
    """
    if source not in SOURCES:
        raise unknown("source of weights", source, SOURCES)
    heads = {name: n for name, n in (("text_heads", text_heads), ("image_heads", image_heads)) if n is not None}
    if heads and source != "declip-official":
        raise UserError(f"Weights of {source} say their number of attention heads. Leave {', '.join(heads)} out.")
    _check_out(Path(out), overwrite)
    weights = SOURCES[source](str(file), **heads)
    provenance = Provenance(weights.recipe, origin=f"`{Path(file).name}` ({source})")
    write_folder(weights.build(), provenance, Path(out), without_queue(weights.heads), license, overwrite)
    return Path(out)


def _read_open_clip(file: str) -> Weights:
    given = file.removeprefix(open_clip_model.PREFIX)
    if Path(given).is_file():
        raise UserError(f"'{given}' does not say which model its weights are of. {open_clip_model.which_model(given)}")
    return open_clip.read(given if Path(given).is_dir() else f"{open_clip_model.PREFIX}{given}")


SOURCES: Mapping[str, Callable[..., Weights]] = {
    "declip-official": official.read,
    "open_clip": _read_open_clip,
    "huggingface": huggingface.read,
}


def write_folder(
    model: DualEncoder,
    provenance: Provenance,
    out: Path,
    heads: Mapping[str, Tensor] | None = None,
    license: str = NO_LICENSE,
    overwrite: bool = False,
) -> None:
    """Write a model as a folder that `declip.load` reads, with a model card."""
    _check_out(out, overwrite)
    with _new_folder(out) as folder:
        declip_file.write_declip_file(model, folder / FILE, heads)
        usage = declip_file.USAGE if has_text(model) else declip_file.IMAGE_USAGE
        card = model_card(model, provenance, "declip", usage, license=license)
        (folder / CARD).write_text(card, encoding="utf-8")


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"'{out}' is not empty. Give --overwrite to replace it whole, or another folder as --out.")
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file. Give a folder as --out.")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `out` when all went well; nothing is left otherwise."""
    try:
        with atomic_write(out) as folder:
            folder.mkdir()
            yield folder
    except (UserError, OSError, SafetensorError) as error:
        # The cache's own advice is about the cache; safetensors has one class for every trouble with a file.
        cause = error.__cause__ if isinstance(error, UserError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        reason = getattr(cause, "strerror", None) or str(cause)
        raise UserError(f"Cannot write '{out}': {reason}. Make room, or give another folder as --out.") from cause


def _refused(model: DualEncoder, format: str, refusal: Refusal) -> UserError:
    """Say why a format refuses a model, how another training would be accepted, and which formats take this model."""
    takers = []
    for name, form in FORMATS.items():
        try:
            form.express(model)
            takers.append(name)
        except Refusal:
            pass
    instead = f"Formats that can: {listed(takers)}." if takers else "No other format can."
    return UserError(
        f"This model cannot be exported as {format}: {refusal.reason}. {instead} For {format}: {refusal.way_out}."
    )


def _reread(model: DualEncoder, format: str, folder: Path) -> tuple[float | None, str]:
    """Give the largest difference of features, and the library that read the folder."""
    form = FORMATS[format]
    advice = "Report this model's recipe" + ("." if format == "safetensors" else "; the format safetensors is exact.")
    try:
        foreign = form.reread(folder)
    except ImportError as error:
        return None, error.name or form.library
    except Exception as error:  # of whatever kind: a library that finds what it reads to be none of its own
        raise UserError(
            f"The export was written, but {form.library} cannot read it, so it is not kept: {one_line(error, 200)} "
            f"{advice}"
        ) from error
    size = model.preprocessor.size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    difference = _distance(model.encode_image, foreign.image, pixels, model.device)
    if foreign.text is not None:
        difference = max(difference, _distance(model.encode_text, foreign.text, model.tokenize(CAPTIONS), model.device))
    if not difference <= LARGEST_DIFFERENCE:
        raise UserError(
            f"The export was written, but {foreign.by} computes other features from it (they differ by "
            f"{difference:.1e}), so it is not kept. {advice}"
        )
    return difference, foreign.by


def _distance(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], batch: Tensor, device: torch.device
) -> float:
    expected, features = ours(batch.to(device)).cpu(), theirs(batch.cpu())
    return float((expected - F.normalize(features.float(), dim=-1)).abs().max())
