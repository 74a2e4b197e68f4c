"""The way out: a model written so that another library, or one file, holds all of it."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

import declip
from declip.errors import UserError, unknown
from declip.evaluation.encode import measuring
from declip.interchange import declip_file, huggingface, onnx, open_clip_folder
from declip.interchange.declip_file import CARD
from declip.interchange.foreign import Reread
from declip.interchange.load import Model
from declip.interchange.model_card import NO_LICENCE, model_card
from declip.interchange.provenance import trace
from declip.io.atomic import atomic_write
from declip.models.dual_encoder import DualEncoder
from declip.models.no_text import has_text

log = logging.getLogger("declip")

Encode = Callable[[Tensor], Tensor]

FURTHEST = 1e-4
"""An export whose features, of length 1, differ more than this anywhere is not kept; exact ones differ by some 1e-7."""

CAPTIONS = ("a red circle", "two cats asleep on a sofa, seen from above", "!")


@dataclass(frozen=True)
class Format:
    """A format: how it is written and read back, and what its model card says.

    Attributes:
        write: Writes a model into a folder, which are its arguments; a `UserError` where it cannot be expressed.
        reread: Reads the folder by the format's own library; an ImportError where that is not installed.
        library: The Hub's name of the library that loads it.
        usage: Python that works in the folder as it is.
        image_usage: The same for an image tower alone; empty where the format needs both.
    """

    write: Callable[..., None]
    reread: Callable[[Path], Reread]
    library: str
    usage: str
    image_usage: str = ""


def _write_safetensors(model: DualEncoder, folder: Path) -> None:
    declip_file.write_declip_file(model, folder / declip_file.FILE)


def _reread_safetensors(folder: Path) -> Reread:
    model = declip_file.read_declip_file(folder / declip_file.FILE).eval()
    return Reread(f"declip {declip.__version__}", model.encode_image, model.encode_text if has_text(model) else None)


FORMATS: Mapping[str, Format] = {
    "open_clip": Format(
        open_clip_folder.write_open_clip, open_clip_folder.reread_open_clip, "open_clip", open_clip_folder.USAGE
    ),
    "huggingface": Format(
        huggingface.write_huggingface, huggingface.reread_huggingface, "transformers", huggingface.USAGE
    ),
    "onnx": Format(onnx.write_onnx, onnx.reread_onnx, "onnx", onnx.USAGE, onnx.IMAGE_USAGE),
    "safetensors": Format(
        _write_safetensors, _reread_safetensors, "declip", declip_file.USAGE, declip_file.IMAGE_USAGE
    ),
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where it is.
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
    license: str = NO_LICENCE,
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

    Returns:
        The folder, and how far its features are from the model's.

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
    check_out(Path(out), overwrite)
    found, provenance = trace(model)
    form = FORMATS[format]
    write = partial(form.write, repo=repo, home=Path(out)) if format == "open_clip" else form.write
    with folder_beside(Path(out)) as beside, measuring(found):
        write(found, beside)
        difference, by = _reread(found, form, beside)
        exported = Exported(Path(out), difference, by)
        usage = form.usage if has_text(found) else form.image_usage
        card = model_card(found, provenance, form.library, usage, str(exported), license)
        (beside / CARD).write_text(card, encoding="utf-8")
    if difference is None:
        log.warning("%s Check it where that is.", exported)
    return exported


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a path that is in use.

    Raises:
        UserError: it is a file, or a folder that is not empty.
    """
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"'{out}' is not empty. Give --overwrite to replace it whole, or another folder as --out.")
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file. Give a folder as --out.")


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """Give an empty folder beside `out` that takes its place when all went well; nothing is left otherwise.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    try:
        with atomic_write(out) as beside:
            beside.mkdir()
            yield beside
    except (UserError, OSError, SafetensorError) as error:
        # The cache's own advice is about the cache; safetensors has one class for every trouble with a file.
        cause = error.__cause__ if isinstance(error, UserError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        said = getattr(cause, "strerror", None) or str(cause)
        raise UserError(f"Cannot write '{out}': {said}. Make room, or give another folder as --out.") from cause


def _reread(model: DualEncoder, form: Format, folder: Path) -> tuple[float | None, str]:
    """The largest difference of features, and by what the folder was read.

    Raises:
        UserError: the features differ.
    """
    try:
        foreign = form.reread(folder)
    except ImportError as error:
        return None, error.name or form.library
    except Exception as error:  # of whatever kind: a library that finds what it reads to be none of its own
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"The export was written, but {form.library} cannot read it, so it is not kept: {said} "
            "Use the format safetensors, and report this model's recipe."
        ) from error
    size = model.preprocessor.size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    difference = _distance(model.encode_image, foreign.image, pixels, model.device)
    if foreign.text is not None:
        tokens = model.tokenize(CAPTIONS)
        difference = max(difference, _distance(model.encode_text, foreign.text, tokens, model.device))
    if not difference <= FURTHEST:
        raise UserError(
            f"The export was written, but {foreign.by} computes other features from it (they differ by "
            f"{difference:.1e}), so it is not kept. Use the format safetensors, and report this model's recipe."
        )
    return difference, foreign.by


def _distance(ours: Encode, theirs: Encode, batch: Tensor, device: torch.device) -> float:
    expected, found = ours(batch.to(device)).cpu(), theirs(batch.cpu())
    return float((expected - F.normalize(found.float(), dim=-1)).abs().max())
