"""One dispatcher for weights: a name, folder or file → `Weights`, for loading, fine-tuning and importing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub

from declip.errors import UserError, no_model
from declip.interchange import declip_file, huggingface, official, open_clip, starter, timm_weights
from declip.interchange.weights import Weights, fetch, read_recipe
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.runs.checkpoint import (
    STATE,
    Checkpoint,
    best_of,
    folder_of,
    list_checkpoints,
    load_checkpoint,
    log,
    newest_good,
    part,
)
from declip.runs.folder import RECIPE

READERS = (starter, timm_weights, declip_file, huggingface, open_clip, official)
"""Modules with `matches(where)` and `read(where)`: the first that matches reads; the last takes any file."""

HUGGINGFACE = "huggingface:"
HUB_PREFIXES = ("hf-hub:", HUGGINGFACE, "open_clip:hf-hub:")
DESCRIPTION = ["*.json", "*.txt", declip_file.CARD, declip_file.FILE]
"""Files to fetch first: they say of which format the model is. Ours is then whole."""


def hub_folder(where: str) -> str:
    """Give the folder of a name's files, fetched unless they are in the cache; other names and paths stay.

    Of several formats ours is taken, else open_clip's, else transformers'; after ``huggingface:`` transformers' comes
    before open_clip's. No pickle is fetched.
    """
    prefix = next((prefix for prefix in HUB_PREFIXES if where.startswith(prefix)), None)
    if prefix is None:
        return where
    repo, _, revision = where.removeprefix(prefix).partition("@")

    def get(*patterns: str) -> Path:
        def download(offline: bool) -> str:
            options: Any = {"allow_patterns": [*DESCRIPTION, *patterns], "revision": revision or None}
            return str(huggingface_hub.snapshot_download(repo, local_files_only=offline, **options))

        return Path(fetch(where, download, "the path of their folder"))

    folder = get()
    if declip_file.matches(str(folder)):
        return str(folder)
    theirs = prefix == HUGGINGFACE and (folder / huggingface.CONFIG).is_file()
    return str(get(open_clip.WEIGHTS) if open_clip.matches(str(folder)) and not theirs else get(*huggingface.WEIGHTS))


def load(where: str | Path, device: str = "auto") -> DualEncoder:
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
    return read(where).build().to(pick_device(device)).eval()


def read(where: str | Path) -> Weights:
    """Read weights; arguments and errors as `load`."""
    given, where = str(where), hub_folder(str(where))
    for reader in READERS:
        if reader.matches(where):
            weights = reader.read(where)
            return replace(weights, origin=given) if given != where else weights
    path = Path(where).expanduser()
    if not path.exists():
        raise no_model(str(where))
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
        chosen, best = newest, best_of(path, newest)
        if best not in (None, folder_of(path, newest.step)):
            try:
                chosen = load_checkpoint(best)
            except UserError as error:  # damaged, or removed since one better was kept that is damaged now
                problems.append(str(error))
        for problem in problems:
            log.warning("%s Step %d is read instead.", problem, chosen.step)
        return chosen
    problem = "has no checkpoint yet" if (path / RECIPE).is_file() else f"is not a run folder: it has no {RECIPE}"
    raise UserError(f"'{path}' {problem}. Give a run folder, one in its checkpoints, or a folder of another format.")


def weights_of(checkpoint: Checkpoint, where: str) -> Weights:
    """Take the weights of a checkpoint, averaged where the run kept them."""
    tensors = part("model", checkpoint.weights) | part("average", checkpoint.weights)
    heads = part("objective", checkpoint.training)
    return Weights(read_recipe(checkpoint.recipe, where), tensors, where, heads).check()
