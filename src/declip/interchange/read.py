"""One dispatcher for weights: a name, folder or file → `Weights`, for loading, fine-tuning and importing."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from declip.errors import UserError
from declip.evaluation.encode import Encoder
from declip.interchange import (
    declip_file,
    hub,
    huggingface,
    official,
    open_clip,
    open_clip_model,
    starter,
    timm_weights,
)
from declip.interchange.weights import Weights, read_recipe
from declip.models.device import pick_device
from declip.runs.checkpoint import (
    STATE,
    Checkpoint,
    best_of,
    folder_of,
    list_checkpoints,
    load_checkpoint,
    newest_good,
    part,
)
from declip.runs.folder import RECIPE


class Model(Encoder, Protocol):
    """A loaded model: a `DualEncoder`, or another kind of model with the same methods."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    @property
    def preprocessor(self) -> Callable[..., Tensor]:
        """`preprocess` on the host: for the workers that read images."""

    @property
    def tokenizer(self) -> Callable[..., Tensor]:
        """`tokenize` on the host."""

    def encode_backbone(self, images: Tensor, /) -> Tensor:
        """(n, 3, S, S) normalized → (n, width) float32, the pooled feature before the projection."""


class Reader(NamedTuple):
    """A format that models come in.

    Attributes:
        matches: Whether a name, folder or file is of this format.
        read: Its weights, as a model of ours.
        load: Its model as it is, of a format whose models ours cannot all express.
    """

    matches: Callable[[str], bool]
    read: Callable[[str], Weights]
    load: Callable[[str], open_clip_model.OpenClip] | None = None


READERS = (
    Reader(starter.matches, starter.read),
    Reader(timm_weights.matches, timm_weights.read),
    Reader(declip_file.matches, declip_file.read),
    Reader(huggingface.matches, huggingface.read),
    Reader(open_clip.matches, open_clip.read, open_clip_model.load_open_clip),
    Reader(official.matches, official.read),
)
"""The first that matches reads; the last takes any file."""


def load(where: str | Path, device: str = "auto") -> Model:
    """Load a trained model, in evaluation mode, with averaged weights where the run kept them.

    Args:
        where: A run folder (its best checkpoint if it keeps one, else the newest good one), a checkpoint folder inside
            one, a file or folder that `declip.export` wrote, a checkpoint of the official implementation (``.pth``,
            ``.pth.tar``, ``.pt``, ``.safetensors``) with both towers or the image tower alone, a folder of
            transformers' `CLIPModel` or of open_clip, ``hf-hub:OWNER/NAME`` or ``hf-hub:OWNER/NAME@REVISION`` of any of
            these formats, ``open_clip:MODEL/TAG`` (see `declip.interchange.open_clip_model`) or ``timm:NAME.TAG``. Only
            names with a colon download.
        device: "auto", "cpu", "cuda", …

    Returns:
        The model: `encode_image(preprocess(images))` and `encode_text(tokenize(texts))`.
    """
    where = hub.folder_of(str(where))
    reader = _reader(where)
    model = reader.load(where) if reader and reader.load else read(where).build()
    return model.to(pick_device(device)).eval()


def read(where: str | Path) -> Weights:
    """Read weights; arguments and errors as `load`."""
    where = hub.folder_of(str(where))
    if reader := _reader(where):
        return reader.read(where)
    path = Path(where).expanduser()
    if not path.exists():
        raise UserError(
            f"There is no model at '{where}'. Give a run folder, a checkpoint folder, a weights file, a folder of "
            f"transformers' CLIPModel or of open_clip, {hub.PREFIX}OWNER/NAME, "
            f"{open_clip_model.PREFIX}MODEL/TAG or {timm_weights.PREFIX}NAME.TAG."
        )
    return weights_of(read_checkpoint(path), where)


def read_start(where: str) -> Weights:
    """Read what a training can start from; arguments and errors as `load`."""
    return read(where).as_start()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder, or of a run folder the best checkpoint if it keeps one, else the newest good one."""
    if (path / STATE).is_file():
        return load_checkpoint(path)
    if list_checkpoints(path):
        newest, problems = newest_good(path)
        if newest is None:
            raise UserError(f"No checkpoint in '{path}' is whole. {problems[0]}")
        best = best_of(path, newest)
        return newest if best in (None, folder_of(path, newest.step)) else load_checkpoint(best)
    problem = "has no checkpoint yet" if (path / RECIPE).is_file() else f"is not a run folder: it has no {RECIPE}"
    raise UserError(f"'{path}' {problem}. Give a run folder, or a folder in its checkpoints.")


def weights_of(checkpoint: Checkpoint, where: str) -> Weights:
    """Take the weights of a checkpoint, averaged where the run kept them."""
    tensors = part("average", checkpoint.weights) or part("model", checkpoint.weights)
    heads = part("objective", checkpoint.training)
    return Weights(read_recipe(checkpoint.recipe, where), tensors, where, heads).check()


def _reader(where: str) -> Reader | None:
    return next((reader for reader in READERS if reader.matches(where)), None)
