"""Export a model as a folder of another library's or our format, with a model card (README.md)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors import SafetensorError
from torch import Tensor

import declip
from declip.errors import UserError, unknown
from declip.evaluation.encode import eval_mode
from declip.evaluation.results import Result, short_names
from declip.interchange import declip_file, huggingface, onnx, open_clip, open_clip_model, timm_weights
from declip.interchange.layouts import Refusal
from declip.interchange.read import HUB_PREFIXES, folder_or_name, read, read_checkpoint
from declip.io.atomic import atomic_write
from declip.io.text import about, one_line, percent
from declip.models.dual_encoder import DualEncoder, has_text
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import STATE, list_checkpoints
from declip.runs.folder import read_run
from declip.supervision.objective import without_run_state

NO_LICENSE = "unknown: set it"
IDENTIFIER = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9.]+)*", re.IGNORECASE)
"""License identifiers of the Hub, such as "mit" or "cc-by-4.0"; any other license is "other" with a name."""

TOLERANCE = 1e-4
"""Tolerance for features of length 1, between a model and its export; exact exports differ by about 1e-7."""

CAPTIONS = ("a red circle", "two cats asleep on a sofa, seen from above", "!")

FORMATS: Mapping[str, ModuleType] = {
    "open_clip": open_clip, "huggingface": huggingface, "onnx": onnx, "safetensors": declip_file,
}  # fmt: skip
"""Modules with `write(model, folder)`, which raises a `Refusal` if the format cannot hold a model, `reread(folder)`,
which raises ImportError if the library is not installed, and `LIBRARY`, its name on the Hub."""

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME on the Hub


@dataclass(frozen=True)
class Exported:
    """Result of an export: the folder, and how the format's own library reads it back."""

    folder: Path
    difference: float | None  # largest of any number of a feature of length 1; None where the library is not installed
    by: str  # the library and its version
    limits: str = ""  # what the format cannot hold

    def __str__(self) -> str:
        if self.difference is None:
            return f"Not read back: {self.by} is not installed here.{self.limits}"
        return f"Read back by {self.by}: features differ by at most {self.difference:.1e}.{self.limits}"


@dataclass(frozen=True)
class Traced:
    """A model to export, with what is recorded of its origin."""

    model: DualEncoder
    step: int | None = None  # number of steps; None without a checkpoint
    pairs: int | None = None  # number of distinct training pairs
    fitted: bool = False  # projections in closed form, without steps
    results: Sequence[Result] = ()  # after that step
    origin: str | None = None  # description of the weights' origin, unless that is a run
    heads: Mapping[str, Tensor] = field(default_factory=dict)  # of losses, by the names of `Objective`


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
    options: dict[str, Any] = {"open_clip": {"repo": repo}, "safetensors": {"heads": traced.heads}}
    if {weight.dtype for weight in built.parameters()} != {torch.float32}:
        built = deepcopy(built).float()
    # --- write into a new folder, read it back, add the card; the folder appears when all is done
    with _new_folder(out, overwrite) as folder, eval_mode(built):
        try:
            form.write(built, folder, **options.get(format, {}))
        except Refusal as refusal:
            way_out = "Export as safetensors, which holds every model."
            raise Refusal(f"This model cannot be exported as {format}: {refusal}. {way_out}") from refusal
        limits = open_clip.limits(built) if form is open_clip else ""
        exported = Exported(out, *_compare(built, form, folder), limits)
        card = model_card(traced, form.LIBRARY, str(exported), license, repo)
        (folder / declip_file.CARD).write_text(card, encoding="utf-8")
    return exported


@contextmanager
def _new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that replaces `out` when the block succeeds; nothing is left otherwise."""
    old, card = out.is_dir() and any(out.iterdir()), out / declip_file.CARD
    if out.is_file() or (old and not overwrite):
        raise UserError(f"'{out}' is a file, or not empty. Give another --out, or --overwrite to replace an export.")
    if old and not (card.is_file() and b"written by declip" in card.read_bytes()):
        raise UserError(f"'{out}' is not an export, so --overwrite does not replace it. Give another --out.")
    try:
        with atomic_write(out, "give another folder as --out") as folder:
            folder.mkdir()
            yield folder
            if others := sorted(_files(out) - _files(folder)):
                raise UserError(
                    f"'{out}' has '{others[0]}', which is not in the new export. Move it, or give another --out."
                )
    except (OSError, SafetensorError) as error:  # the latter is its one class for every trouble with a file
        raise UserError(f"Cannot write '{out}': {error}. Make room, or give another folder as --out.") from error


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _compare(model: DualEncoder, form: ModuleType, folder: Path) -> tuple[float | None, str]:
    """Largest difference of the features that the format's library computes, and its version: see `Exported`."""
    try:
        by, encode_image, encode_text = form.reread(folder)
    except ImportError as error:
        return None, error.name or form.LIBRARY
    except Exception as error:  # a library raises any class for a folder that it does not understand
        raise UserError(f"{form.LIBRARY} cannot read the export: {one_line(error, 200)} Report its recipe.") from error
    size = model.preprocessor.size
    # (3, 3, S, S) and (3, L)
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected, features = [model.encode_image(pixels.to(model.device))], [encode_image(pixels)]
    if encode_text is not None:
        tokens = model.tokenize(CAPTIONS)
        expected.append(model.encode_text(tokens))
        features.append(encode_text(tokens.cpu()))
    ours, theirs = torch.cat(expected).cpu(), F.normalize(torch.cat(features).float(), dim=-1)
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE:  # NaN too
        raise UserError(f"{by} computes other features from the export ({difference:.1e} off). Report its recipe.")
    return difference, by


def without_folders(given: str) -> str:
    """Remove local folders, and the query of a URL, from the name of a source, a set or weights."""
    if given.startswith(HUB_PREFIXES) or "://" in given:
        return given.partition("?")[0]
    prefix, path = re.fullmatch(r"((?:[\w-]+:)*)(.*)", given, re.DOTALL).groups()  # type: ignore[union-attr]
    if prefix in (open_clip_model.PREFIX, timm_weights.PREFIX):  # the model's name comes before the file's
        model, slash, path = path.partition("/")
        prefix += model + slash
    return prefix + (Path(path).name or path)


def trace(where: str | Path | DualEncoder | Traced) -> Traced:
    """Load a model on the CPU, with the origin that its folder records; a loaded model keeps its device.

    Heads that came with foreign weights are kept; those of a run stay in its checkpoints.
    """
    if isinstance(where, Traced):
        return where
    where = folder_or_name(where)
    if not isinstance(where, str | Path):
        if not isinstance(where, DualEncoder):
            raise UserError(f"This {type(where).__name__} cannot be exported: it is not a model of declip.")
        return Traced(where)
    path = Path(where).expanduser()
    if not (path / STATE).is_file() and not list_checkpoints(path):
        weights = read(where)
        origin = f"`{without_folders(str(where))}`"
        if weights.whole and weights.classes is not None:
            origin += ", with projections fitted to the names of its classifier's classes (arXiv 2605.22484)"
        return Traced(weights.build().eval(), origin=origin, heads=without_run_state(weights.heads))
    # A run: results and pairs are those of the exported step.
    weights, run = read_checkpoint(path).check(), read_run(path.parent.parent if (path / STATE).is_file() else path)
    rows = (row.result for row in run.evaluated if row.weights == weights.step)
    results = tuple({(result.dataset, result.task): result for result in rows}.values())
    pairs, fitted = run.examples.get("source", {}).get("pairs"), bool(run.cross_validation)
    return Traced(weights.build().eval(), weights.step, pairs, fitted, results)


def model_card(
    traced: Traced, library: str, checked: str = "", license: str = NO_LICENSE, repo: str | None = None
) -> str:
    """Write the card as Markdown, with metadata for the Hub and Python code that loads the model, also from `repo`."""
    # Names without folders: a card is published.
    model, results = traced.model, traced.results
    recipe = Recipe.model_validate(_without_folders(model.recipe.model_dump(mode="json")))
    names = short_names(result.dataset for result in results)
    task = "zero-shot-image-classification" if has_text(model) else "image-feature-extraction"
    terms: dict[str, Any] = {"license": "other", "license_name": license}
    if license == NO_LICENSE or IDENTIFIER.fullmatch(license):
        terms = {"license": license.partition(":")[0].lower()}
    tags = ["clip", "declip", "contrastive-learning"]
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("declip.interchange"), keep_trailing_newline=True, **options)
    environment.filters |= {"percent": percent, "about": about}
    return environment.get_template("model_card.md").render(
        vars(traced),
        recipe=recipe,
        head=f"{ModelCardData(library_name=library, pipeline_tag=task, tags=tags, **terms).to_yaml()}\n",
        name=recipe.name if traced.step is not None else "A language-image model",
        repo=repo,
        whole=has_text(model),
        preprocessor=model.preprocessor,
        cleaned=onnx.cleaning(model.tokenizer),
        encoder=open_clip.text_encoder(model) is not None,
        sigmoid=model.logit_bias is not None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        version=declip.__version__,
        library=library,
        checked=checked,
        start=without_folders(model.recipe.finetune.pretrained or ""),
        measured=[(without_folders(names[r.dataset]), r.task, m) for r in results for m in r.measures()],
        license=license,
    )


def _without_folders(tree: Any) -> Any:
    """Replace paths by names in a recipe's tree."""
    if isinstance(tree, dict):
        return {key: _without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(value) for value in tree]
    return without_folders(tree) if isinstance(tree, str) and ("/" in tree or "\\" in tree) else tree
