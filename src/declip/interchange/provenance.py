"""The origin of a model: its recipe, steps, pairs, results, and the weights that it was fine-tuned from."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import timm

from declip.errors import UserError
from declip.evaluation.results import Result
from declip.interchange import open_clip
from declip.interchange.huggingface import PREFIX as HUGGINGFACE
from declip.interchange.open_clip_model import HUB, OpenClip
from declip.interchange.open_clip_model import PREFIX as OPEN_CLIP
from declip.interchange.read import Model, read, read_checkpoint, weights_of
from declip.interchange.timm_weights import PREFIX as TIMM
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import STATE, list_checkpoints
from declip.runs.folder import read_run

HUBS = (HUGGINGFACE, HUB, f"{OPEN_CLIP}{HUB}")
"""Prefixes of names on the Hub."""


@dataclass(frozen=True)
class Provenance:
    """The origin of a model, as far as it is recorded.

    Attributes:
        step: Number of steps done; None where no checkpoint says it.
        pairs: Number of distinct pairs of the source.
        results: Evaluations after that step.
        origin: The weights' origin in a few words, where it was not one of our runs.
    """

    recipe: Recipe
    step: int | None = None
    pairs: int | None = None
    results: Sequence[Result] = ()
    origin: str | None = None


def repository(where: str) -> str | None:
    """The Hub's id of weights by their name here, without network; None where they have none."""
    for prefix in HUBS:
        if where.startswith(prefix):
            return where.removeprefix(prefix).partition("@")[0]
    if where.startswith(TIMM):
        config = timm.get_pretrained_cfg(where.removeprefix(TIMM)) if "/" not in where else None
        return config.hf_hub_id if config else None
    if where.startswith(OPEN_CLIP) and find_spec("open_clip"):
        from open_clip import get_pretrained_cfg

        model, _, tag = where.removeprefix(OPEN_CLIP).partition("/")
        path = get_pretrained_cfg(model, tag).get("hf_hub") or ""
        return "/".join(path.split("/")[:2]) or None
    return None


def without_folders(given: str) -> str:
    """Cut the folders of this machine, and a URL's query, from the name of a source, a set or weights."""
    if given.startswith(HUBS) or "://" in given:
        return given.partition("?")[0]
    prefix, path = re.fullmatch(r"((?:[\w-]+:)*)(.*)", given, re.DOTALL).groups()  # type: ignore[union-attr]
    if prefix in (OPEN_CLIP, TIMM):  # the model's name comes before the file's
        model, slash, path = path.partition("/")
        prefix += model + slash
    return prefix + (Path(path).name or path)


def trace(where: str | Path | Model) -> tuple[DualEncoder, Provenance]:
    """Load a model on the CPU, with what its folder records of it; a model that is given stays where it is."""
    if isinstance(where, OpenClip):
        where = open_clip.convert(where).build().eval()
    if not isinstance(where, str | Path):
        if not isinstance(where, DualEncoder) or where.recipe is None:
            raise UserError(f"This {type(where).__name__} cannot be exported: it was not built from a recipe.")
        return where, Provenance(where.recipe)
    path = Path(where)
    if not (path / STATE).is_file() and not list_checkpoints(path):
        weights = read(where)
        return weights.build().eval(), Provenance(weights.recipe, origin=f"`{without_folders(str(where))}`")
    checkpoint = read_checkpoint(path)
    run = path.parent.parent if (path / STATE).is_file() else path
    results = tuple(row.result for row in read_run(run).evaluated if row.step == checkpoint.step)
    pairs = checkpoint.extra.get("pairs")
    weights = weights_of(checkpoint, str(where))
    pairs = pairs if isinstance(pairs, int) else None
    return weights.build().eval(), Provenance(weights.recipe, checkpoint.step, pairs, results)
