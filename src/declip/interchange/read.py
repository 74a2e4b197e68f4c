"""Load weights by a name, folder or file of any format."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
from torch import Tensor

from declip.errors import UserError
from declip.evaluation.encode import Encoder
from declip.interchange import (
    declip_file,
    fitted,
    huggingface,
    official,
    open_clip,
    open_clip_model,
    starter,
    timm_weights,
)
from declip.interchange.weights import Weights, read_recipe, read_tensors
from declip.io.hub import fetch
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.models.layers import IMAGE
from declip.models.precision import Precision, convert, pick_precision
from declip.recipe.starts import STARTS, no_model
from declip.runs.checkpoint import STATE, list_checkpoints, load_best, load_checkpoint, without_prefix
from declip.runs.fitted import FittedRun
from declip.runs.folder import MIXED, RECIPE, Run


class Reader(Protocol):
    """A module that reads a format."""

    def matches(self, where: str) -> bool:
        """Whether a name or path is of the format."""

    def read(self, where: str) -> Weights:
        """Read the weights; raises `UserError` if they are damaged or of another kind."""


READERS: tuple[Reader, ...] = (starter, timm_weights, declip_file, huggingface, open_clip, official)
"""In order of precedence; the last one matches any file."""

HUGGINGFACE = "huggingface:"
HUB_PREFIXES = ("hf-hub:", HUGGINGFACE, "open_clip:hf-hub:")
DESCRIPTION = ["*.json", "*.txt", "README.md", declip_file.FILE]
"""Files to fetch first, which show the format of the model; for our format they are all files."""


def hub_folder(where: str) -> str:
    """Fetch the files of a repository, unless they are in the cache, and return their folder; keep other names.

    If there are several formats, the order is declip, open_clip, transformers, or with ``huggingface:`` declip,
    transformers, open_clip. Pickle files are not fetched.
    """
    prefix = next((prefix for prefix in HUB_PREFIXES if where.startswith(prefix)), None)
    if prefix is None:
        return where
    repo, _, revision = where.removeprefix(prefix).partition("@")

    def get(*patterns: str) -> Path:
        options: Any = {"allow_patterns": [*DESCRIPTION, *patterns], "revision": revision or None}
        download = partial(huggingface_hub.snapshot_download, repo, **options)
        return Path(fetch(where, lambda offline: download(local_files_only=offline), "the path of their folder"))

    # First the small files, which show the format; then the weights of that format.
    folder = get()
    if declip_file.matches(str(folder)):
        return str(folder)
    theirs = prefix == HUGGINGFACE and (folder / huggingface.CONFIG).is_file()
    return str(get(open_clip.WEIGHTS) if open_clip.matches(str(folder)) and not theirs else get(huggingface.FILE))


def load(where: str | Path | Run | FittedRun, device: str = "auto", precision: Precision = "fp32") -> DualEncoder:
    """Load a model in evaluation mode from a run folder, a file, or a name.

    Only names with a colon are downloaded, except those that begin with ``builtin:``.

    Args:
        where: One of:

            - a `Run` or its folder (its best checkpoint, else the newest undamaged one), or a checkpoint folder in it;
            - a `FittedRun` or its folder, whose base must be where it was;
            - a file or folder that `declip.export` wrote, or a folder of open_clip or of transformers' `CLIPModel`;
            - a checkpoint of the official implementation (``.pth``, ``.pth.tar``, ``.pt``, ``.safetensors``) with both
              towers or the image tower alone;
            - ``hf-hub:OWNER/NAME`` or ``hf-hub:OWNER/NAME@REVISION``, in any of these formats;
            - ``open_clip:MODEL/TAG`` (see `declip.interchange.open_clip_model`) or ``timm:NAME.TAG``, with a text
              encoder as ``timm:NAME.TAG+FOLDER``;
            - ``builtin:lite2-minilm``, whose projections are fitted to the names of ImageNet's classes.
        device: "auto", "cpu", "cuda", …
        precision: "fp32"; "bf16" or "fp16", to use the model, not to train or export it; "auto": the fastest that the
            device computes itself.

    Returns:
        The model: `encode_image(preprocess(images))` and `encode_text(tokenize(texts))`.

    Examples:
        >>> model = declip.load("runs/demo")
        >>> model.encode_text(model.tokenize(["a red square", "a cat"])).shape
        torch.Size([2, 8])
    """
    target = pick_device(device)
    pick_precision(precision, target)  # refused before the weights are read
    return convert(read(folder_or_name(where)).build().to(target).eval(), precision)


def folder_or_name(model: Any) -> Any:
    """The folder of a run; a model, or the name of one, stays."""
    return model.folder if isinstance(model, Run | FittedRun) else model


def loaded(
    model: str | Path | Run | FittedRun | Encoder, device: str = "auto", precision: Precision = "fp32"
) -> Encoder:
    """The model that is given as an object, else the one that `load` loads."""
    if isinstance(model, str | Path | Run | FittedRun):
        return load(model, device, precision)
    if not hasattr(model, "encode_image"):
        allowed = "a run folder, a file, a name, or an object with `encode_image`"
        raise UserError(f"A model is what `declip.load` takes, {allowed}; {type(model).__name__} was given.")
    return model


def read(where: str | Path) -> Weights:
    """Read weights of a model, with `complete` if they lack projections; arguments and errors as `load`."""
    return timm_weights.complete(_read(where))


def read_start(where: str) -> Weights:
    """Read weights to start training from, as they are; arguments and errors as `load`."""
    return _read(where).as_start()


def is_published(where: str) -> bool:
    """Whether a name stands for the same weights later: built in, a tag of open_clip or timm, a revision on the Hub."""
    if where.startswith(HUB_PREFIXES):
        return "@" in where
    name, _, tag = where.removeprefix(open_clip_model.PREFIX).partition("/")
    if where.startswith(open_clip_model.PREFIX):
        return ":" not in name and not Path(tag).suffix and not Path(tag).is_file()
    return starter.matches(where) or (timm_weights.matches(where) and not tag and "+" not in where)


def _read(where: str | Path) -> Weights:
    given, where = str(where), hub_folder(str(where))
    if fitted.matches(where):
        return _read_fitted(where)
    for reader in READERS:
        if reader.matches(where):
            weights = reader.read(where)
            return replace(weights, origin=given) if given != where else weights
    path = Path(where).expanduser()
    if not path.exists():
        raise no_model(str(where))
    return read_checkpoint(path).check()


def _read_fitted(where: str) -> Weights:
    """Read the heads of a fit, and its base."""
    heads = fitted.read_heads(where)
    try:
        base = read_start(heads.base)
    except UserError as error:
        raise heads.missing(error) from error
    return heads.on(base)


def _text_of_fitted(where: str) -> Weights | None:
    """The text tower of a fit to a built-in start; None for another base."""
    heads = fitted.read_heads(where)
    if not starter.matches(heads.base):
        return None
    tower = starter.read_text(heads.base)
    own = {name: tensor for name, tensor in heads.tensors.items() if not name.startswith(IMAGE)}
    tensors = dict(tower.tensors) | own
    return Weights(heads.recipe, tensors, where, fingerprint=heads.fingerprint).check()


def read_text(where: str | Path) -> tuple[Weights, Mapping[str, Tensor] | None] | None:
    """Read the text tower of a run, a file of declip or the built-in start, which can be built without timm.

    Returns:
        The text tower, and all tensors of the model, None for published files; or None for other formats.
    """
    where = str(where)
    if starter.matches(where):
        text = timm_weights.complete_text(starter.read_text(where), STARTS[where])
        return None if text is None else (text.check(), None)
    if fitted.matches(where):
        text = _text_of_fitted(where)
        return None if text is None else (text, None)
    if declip_file.matches(where):
        weights = declip_file.read_part(where)
    elif (path := Path(where).expanduser()).is_dir() and ((path / STATE).is_file() or list_checkpoints(path)):
        weights = read_checkpoint(path)
    else:
        return None
    return None if weights.text is None else (weights.text.check(), weights.tensors)


def read_checkpoint(path: Path, mixed: bool = True) -> Weights:
    """Read a checkpoint, or the best one of a run, else its newest undamaged one; `mixed`: with its mixture.

    The weights are not checked.
    """
    if (path / STATE).is_file():
        chosen = load_checkpoint(path)
    elif list_checkpoints(path):
        chosen, mixture = load_best(path), path / MIXED
        if mixed and mixture.is_file():
            chosen = replace(chosen, weights=read_tensors(mixture))
    else:
        problem = "has no checkpoint yet" if (path / RECIPE).is_file() else f"is not a run folder: it has no {RECIPE}"
        raise UserError(
            f"'{path}' {problem}. Give a run folder, one in its checkpoints, or a folder of another format."
        )
    recipe, heads = read_recipe(chosen.recipe, str(path)), without_prefix("objective", chosen.training)
    return Weights(recipe, without_prefix("model", chosen.weights), str(path), heads, step=chosen.step)
