"""Export a model as a folder of another library's or our format, with a model card (README.md)."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from declip.errors import UserError, unknown
from declip.evaluation.encode import eval_mode
from declip.interchange.card import NO_LICENSE, model_card, without_folders
from declip.interchange.declip_file import DeclipFile
from declip.interchange.format import Format, ModelRecord, Refusal
from declip.interchange.huggingface import Huggingface
from declip.interchange.onnx import Onnx
from declip.interchange.open_clip import OpenClip
from declip.interchange.read import folder_or_name, read
from declip.interchange.run_folder import has_checkpoint, read_checkpoint
from declip.io.atomic import atomic_write
from declip.io.outputs import CARD, check_export
from declip.io.text import one_line
from declip.models.dual_encoder import DualEncoder
from declip.models.neighbors import NeighborProjection
from declip.models.posteriors import PosteriorProjection
from declip.runs.checkpoint import STATE
from declip.runs.fitted import FittedRun, is_fitted
from declip.runs.folder import read_run

FORMATS: Mapping[str, Format] = {
    form.name: form for form in (OpenClip(), Huggingface(), Onnx(), DeclipFile())
}

LINEAR = (
    " {} has linear projections, so the export lacks class posteriors and neighbors, and its features differ from "
    "those of the model itself. The formats safetensors and onnx have them."
)

TOLERANCE = 1e-4
"""Tolerance for features of length 1, between a model and its export; exact exports differ by about 1e-7."""

CAPTIONS = ("a red circle", "two cats asleep on a sofa, seen from above", "!")
IMAGES = 3  # random ones, that features are compared on

log = logging.getLogger("declip")

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME on the Hub


@dataclass(frozen=True)
class Exported:
    """Result of an export: the folder, and how the format's own library reads it back."""

    folder: Path
    # Largest of any number of a feature of length 1; None where the library is not installed
    difference: float | None
    by: str  # the library and its version
    limits: str = ""  # what the format cannot hold

    def __str__(self) -> str:
        if self.difference is None:
            return f"Not read back: {self.by} is not installed here.{self.limits}"
        return f"Read back by {self.by}: features differ by at most {self.difference:.1e}.{self.limits}"


def export(
    model: str | Path | DualEncoder | ModelRecord,
    format: str,
    out: str | Path,
    *,
    license: str = NO_LICENSE,
    overwrite: bool = False,
    repo: str | None = None,
) -> Exported:
    """Export a model for other libraries or for declip, read it back, and write a model card.

    Args:
        model: What `declip.load` takes, or a loaded model. The card of a run shows data, steps and results.
        format: "open_clip", "huggingface", "onnx" or "safetensors".
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
    out = Path(out).expanduser()
    form = FORMATS[format]
    record = with_provenance(model)
    if not record.model.has_image:
        raise UserError("This is a text tower alone. Export a model with an image tower.")
    try:
        form.holds(record.model)
    except Refusal as refusal:
        way_out = "Export as safetensors, which holds every model."
        raise Refusal(
            f"This model cannot be exported as {format}: {refusal}. {way_out}"
        ) from refusal
    # --- the model as the format holds it
    limits = ""
    if not _is_float32_on_cpu(record.model):
        copy = deepcopy(record.model)
        record = replace(record, model=copy.float().cpu())
    if form.linear and not is_linear(record.model):
        record = replace(record, model=linear_part(record.model))
        limits = LINEAR.format(form.library)
    # --- write into a new folder, read it back, add the card; the folder appears when all is done
    with _new_folder(out, overwrite) as folder, eval_mode(record.model):
        form.write(record, folder, repo)
        limits += form.limits(record.model, repo)
        difference, by = _compare(record.model, form, folder)
        exported = Exported(out, difference, by, limits)
        card = model_card(record, form, str(exported), license, repo)
        (folder / CARD).write_text(card, encoding="utf-8")
    return exported


def is_linear(model: DualEncoder) -> bool:
    """Whether the projections have neither class posteriors nor neighbors."""
    return not isinstance(model.image_tower.proj, PosteriorProjection | NeighborProjection)


def linear_part(model: DualEncoder) -> DualEncoder:
    """A copy of a model with linear projections: about as good as one that was fitted without more."""
    copy = deepcopy(model)
    image = copy.image_tower.proj
    text = copy.text_tower.text_projection
    copy.image_tower.proj = image.linear()
    if isinstance(text, NeighborProjection):
        copy.text_tower.text_projection = text.linear()
    width = copy.image_tower.proj.out_features
    copy.recipe = copy.recipe.with_keys({"embed_dim": width})
    return copy


def export_complete(record: ModelRecord, folder: Path) -> None:
    """Export a fine-tuned model to every format that holds it completely; others are left out.

    Class posteriors are in no linear projection: `export` says what a format of such loses.
    """
    formats = ["safetensors"]
    if is_linear(record.model):
        formats += ["open_clip", "huggingface"]
    for format in formats:
        try:
            export(record, format, folder / format, overwrite=True)
        except Refusal:
            continue
        except UserError as error:  # the run is complete without it
            log.warning(str(error))


def _is_float32_on_cpu(model: DualEncoder) -> bool:
    weights = list(model.parameters())
    return all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights)


@contextmanager
def _new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that replaces `out` when the block succeeds; nothing is left otherwise."""
    check_export(out, overwrite)
    try:
        with atomic_write(out, "give another folder as --out") as folder:
            folder.mkdir()
            yield folder
            others = sorted(_files(out) - _files(folder))
            if others:
                raise UserError(
                    f"'{out}' has '{others[0]}', which is not in the new export. Move it, or give another --out."
                )
    # The latter is its one class for every trouble with a file
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"Cannot write '{out}': {error}. Make room, or give another folder as --out."
        ) from error


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _compare(model: DualEncoder, form: Format, folder: Path) -> tuple[float | None, str]:
    """Largest difference of the features that the format's library computes, and its version: see `Exported`."""
    try:
        by, encode_image, encode_text = form.read_back(folder)
    except ImportError as error:
        return None, error.name or form.library
    # A library raises any class for a folder that it does not understand
    except Exception as error:
        raise UserError(
            f"{form.library} cannot read the export: {one_line(error, 200)} Report its recipe."
        ) from error
    # (n, 3, S, S) and (m, L)
    size = model.preprocessor.size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(IMAGES, 3, size, size, generator=generator)
    difference = _difference(model.encode_image(pixels), encode_image(pixels))
    if encode_text is not None:
        tokens = model.tokenize(CAPTIONS)
        of_texts = _difference(model.encode_text(tokens), encode_text(tokens))
        difference = torch.maximum(difference, of_texts)  # NaN if either is
    if not difference <= TOLERANCE:  # NaN too
        raise UserError(
            f"{by} computes other features from the export ({difference:.1e} off). Report its recipe."
        )
    return float(difference), by


def _difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """Largest difference of any number between features, theirs of any length."""
    unit = F.normalize(theirs.float(), dim=-1)
    return (ours - unit).abs().max()


def with_provenance(where: str | Path | DualEncoder | ModelRecord) -> ModelRecord:
    """Load a model on the CPU, with the origin that its folder records; a loaded model keeps its device.

    Heads that came with foreign weights are kept; those of a run stay in its checkpoints.
    """
    if isinstance(where, ModelRecord):
        return where
    where = folder_or_name(where)
    if not isinstance(where, str | Path):
        if not isinstance(where, DualEncoder):
            raise UserError(
                f"This {type(where).__name__} cannot be exported: it is not a model of declip."
            )
        return ModelRecord(where)
    path = Path(where).expanduser()
    if is_fitted(path):
        return _of_fit(path)
    if not has_checkpoint(path):
        weights = read(where)
        origin = f"`{without_folders(str(where))}`"
        if weights.has_text and weights.classes is not None:
            origin += ", with projections fitted to the names of its classifier's classes (arXiv 2605.22484)"
        return ModelRecord(weights.build().eval(), origin=origin, heads=weights.heads)
    weights = read_checkpoint(path).check()
    folder = path
    if (path / STATE).is_file():  # a checkpoint
        folder = path.parent.parent
    model = weights.build().eval()
    return of_run(folder, model, weights.step)


def of_run(folder: Path, model: DualEncoder, step: int | None) -> ModelRecord:
    """A model of a run after a step, with the results and the pairs of that step."""
    run = read_run(folder)
    # the last result of each task on each dataset
    results = {}
    for row in run.evaluated:
        if row.weights == step:
            results[row.result.dataset, row.result.task] = row.result
    return ModelRecord(
        model,
        step=step,
        pairs=run.examples.get("source", {}).get("pairs"),
        results=tuple(results.values()),
    )


def _of_fit(folder: Path) -> ModelRecord:
    """The merged model of a fit, with its results and its pairs."""
    run = FittedRun(folder)
    source = run.facts.get("source", {})
    model = read(folder).build().eval()
    return ModelRecord(model, 1, source.get("pairs"), run.cross_validation, run.results)
