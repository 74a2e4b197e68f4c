"""Load weights by a name, folder or file of any format."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from torch import Tensor

from declip.errors import UserError
from declip.interchange import (
    declip_file,
    fitted,
    huggingface,
    official,
    open_clip,
    open_clip_model,
    own_encoder,
    run_folder,
    starter,
    timm_weights,
)
from declip.interchange.hub import HUB_PREFIXES, hub_folder
from declip.interchange.weights import Weights
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.models.encoder import Encoder, as_encoder
from declip.models.layers import IMAGE
from declip.models.precision import Precision, convert, pick_precision
from declip.models.tensor_names import all_but
from declip.recipe.starts import STARTS, is_own, no_model
from declip.runs.fitted import FittedRun
from declip.runs.folder import Run


class Reader(Protocol):
    """A module that reads a format."""

    def matches(self, where: str) -> bool:
        """Whether a name or path is of the format."""

    def read(self, where: str) -> Weights:
        """Read the weights; raises `UserError` if they are damaged or of another kind."""


READERS: tuple[Reader, ...] = (
    starter,  # builtin:NAME
    timm_weights,  # timm:NAME.TAG, timm:NAME/FILE
    declip_file,  # a file of declip, or a folder with one
    huggingface,  # a folder with a config.json
    open_clip,  # open_clip:MODEL/TAG, open_clip:MODEL/FILE, or a folder with an open_clip_config.json
    official,  # any other file
    run_folder,  # any other folder
)
"""In order of precedence: the first that matches reads."""


def load(
    where: str | Path | Run | FittedRun, device: str = "auto", precision: Precision = "fp32"
) -> DualEncoder:
    """Load a model in evaluation mode from a run folder, a file, or a name.

    Only names with a colon are downloaded, except those that begin with ``builtin:``.

    Args:
        where: One of:

            - a `Run` or its folder (its best checkpoint, else the newest undamaged one), or a checkpoint folder in it;
            - a `FittedRun` or its folder, whose base must be where it was;
            - a file or folder that `declip.export` wrote, or a folder of open_clip or of transformers'
              `CLIPModel` or `SiglipModel`;
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
    pick_precision(precision, target)  # raises before the weights are read
    model = read(folder_or_name(where)).build()
    return convert(model.to(target).eval(), precision)


def folder_or_name(model: Any) -> Any:
    """The folder of a run; a model, or the name of one, stays."""
    return model.folder if isinstance(model, Run | FittedRun) else model


def loaded(
    model: str | Path | Run | FittedRun | Encoder,
    device: str = "auto",
    precision: Precision = "fp32",
) -> Encoder:
    """The model that is given as an object or as FILE.py:function, else the one that `load` loads.

    A file that is named is run: call it with what the user gave, not with a name that a file holds.
    """
    if isinstance(model, str | Path) and is_own(model):
        return own_encoder.open_encoder(str(model), device, precision)
    if isinstance(model, str | Path | Run | FittedRun):
        return load(model, device, precision)
    return as_encoder(model)


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
        is_file = bool(Path(tag).suffix) or Path(tag).is_file()
        return ":" not in name and not is_file
    if timm_weights.matches(where):
        return not tag and "+" not in where
    return starter.matches(where)


def _read(where: str | Path) -> Weights:
    given = str(where)
    here = hub_folder(given)
    if is_own(given):
        raise UserError(
            f"'{given}' names an encoder of your own, which has no weights to train, convert or export. It can be "
            "evaluated, embedded, searched and fitted with frozen towers; in Python, call the function."
        )
    if fitted.matches(here):
        return _read_fitted(here)
    for reader in READERS:
        if reader.matches(here):
            weights = reader.read(here)
            if here != given:  # of the Hub
                weights = replace(weights, origin=given)
            return weights
    raise no_model(here)


def _read_fitted(where: str) -> Weights:
    """Read the heads of a fit, and its base."""
    heads = fitted.read_heads(where)
    if is_own(heads.base):
        raise UserError(
            f"'{where}' was fitted to '{heads.base}', a Python file, which runs only where you name it. "
            f"If you trust the file, give {quote(f'{heads.base}+{where}')}."
        )
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
    tensors = {**tower.tensors, **all_but(IMAGE, heads.tensors)}
    return Weights(heads.recipe, tensors, where, fingerprint=heads.fingerprint)


def read_text(where: str | Path) -> tuple[Weights, Mapping[str, Tensor] | None] | None:
    """Read the text tower of a run, a file of declip or the built-in start, which can be built without timm.

    Returns:
        The text tower, and all tensors of the model, None for published files; or None for other formats.
    """
    where = str(where)
    tensors = None
    if starter.matches(where):
        text = timm_weights.complete_text(starter.read_text(where), STARTS[where])
    elif fitted.matches(where):
        text = _text_of_fitted(where)
    else:
        weights = _read_ours(where)
        if weights is None:
            return None
        text = weights.text
        tensors = weights.tensors
    return None if text is None else (text.check(), tensors)


def _read_ours(where: str) -> Weights | None:
    """Read a file of declip or a run, unchecked; None for other formats."""
    if declip_file.matches(where):
        return declip_file.read_part(where)
    path = Path(where).expanduser()
    if path.is_dir() and run_folder.has_checkpoint(path):
        return run_folder.read_checkpoint(path)
    return None
