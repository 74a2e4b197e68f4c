"""The origin of a model: its recipe, steps, pairs, results, and the weights that it was fine-tuned from."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import yaml

from declip.errors import UserError
from declip.evaluation.results import Result
from declip.interchange import open_clip
from declip.interchange.declip_file import CARD
from declip.interchange.huggingface import OTHER_PREFIX
from declip.interchange.huggingface import PREFIX as HUGGINGFACE
from declip.interchange.open_clip_model import FOLDER, HUB, OpenClip
from declip.interchange.open_clip_model import PREFIX as OPEN_CLIP
from declip.interchange.read import Model, read, read_checkpoint, weights_of
from declip.interchange.timm_weights import PREFIX as TIMM
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import read_yaml
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import STATE, list_checkpoints, resolve_last
from declip.runs.folder import read_run

HUBS = (HUGGINGFACE, OTHER_PREFIX, f"{OPEN_CLIP}{HUB}")
"""Prefixes of names on the Hub."""


@dataclass(frozen=True)
class Provenance:
    """The origin of a model, as far as it is recorded.

    Attributes:
        recipe: The resolved recipe; None where the model was not built from one.
        step: Number of steps done; None where no checkpoint says it.
        pairs: Number of distinct pairs of the source.
        results: Evaluations after that step.
        origin: The weights' origin in a few words, where it was not one of our runs.
    """

    recipe: Recipe | None = None
    step: int | None = None
    pairs: int | None = None
    results: Sequence[Result] = field(default_factory=tuple)
    origin: str | None = None


@dataclass(frozen=True)
class Base:
    """The weights that a model was fine-tuned from.

    Attributes:
        name: Without the folders of this machine.
        hub: Their repository on the Hub, where they have one.
        license: From timm or their own model card, where either is on this machine.
    """

    name: str
    hub: str | None
    license: str | None


def base_of(where: str) -> Base:
    """Look up the weights that `finetune.pretrained` names, without network."""
    hub = _repository(where)
    if hub is not None and hub.startswith("timm/"):
        config = timm.get_pretrained_cfg(hub.removeprefix("timm/"))
        return Base(without_folders(where), hub, config.license if config else None)
    return Base(without_folders(where), hub, _license(_card(where, hub)))


def without_folders(given: str) -> str:
    """Cut the folders of this machine, and a URL's query, from the name of a source, a set or weights."""
    if given.startswith(HUBS) or "://" in given:
        return given.partition("?")[0]
    prefix, path = re.fullmatch(r"((?:[\w-]+:)*)(.*)", given, re.DOTALL).groups()  # type: ignore[union-attr]
    if prefix in (OPEN_CLIP, TIMM):  # the model's name comes before the file's
        model, slash, path = path.partition("/")
        prefix += model + slash
    return prefix + (Path(path).name or path)


def _repository(where: str) -> str | None:
    """The Hub's id of weights by their name here."""
    for prefix in HUBS:
        if where.startswith(prefix):
            return where.removeprefix(prefix)
    if where.startswith(TIMM):
        config = timm.get_pretrained_cfg(where.removeprefix(TIMM)) if "/" not in where else None
        return config.hf_hub_id if config else None
    if where.startswith(OPEN_CLIP):
        try:
            from open_clip import get_pretrained_cfg
        except ImportError:
            return None
        model, _, tag = where.removeprefix(OPEN_CLIP).partition("/")
        path = get_pretrained_cfg(model, tag).get("hf_hub") or ""
        return "/".join(path.split("/")[:2]) or None
    return None


def _card(where: str, hub: str | None) -> Path:
    """The model card of weights: in their folder, or in the Hub's cache."""
    if hub is not None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(hub, CARD)
        return Path(cached) if isinstance(cached, str) else Path()
    path = Path(where.removeprefix(f"{OPEN_CLIP}{FOLDER}")).expanduser()
    return (path if path.is_dir() else path.parent) / CARD


def _license(card: Path) -> str | None:
    """The license in the head of a model card."""
    try:
        head = read_yaml(card.read_text(encoding="utf-8").split("---\n")[1])
        license = head.get("license_name") or head.get("license")
    except (OSError, ValueError, LookupError, AttributeError, yaml.YAMLError):  # none, or a file of another form
        return None
    return license if isinstance(license, str) and license != "unknown" else None


def trace(where: str | Path | Model) -> tuple[DualEncoder, Provenance]:
    """Load a model, with what its folder records of it.

    Args:
        where: What `declip.load` takes, or a model; of a model only the recipe is known.

    Returns:
        The model on the CPU (one that was given stays where it is), and its origin.
    """
    if isinstance(where, OpenClip):
        return open_clip.convert(where).build().eval(), Provenance()
    if not isinstance(where, str | Path):
        if not isinstance(where, DualEncoder):
            raise UserError(
                f"This {type(where).__name__} cannot be exported: only models of ours can, and open_clip's."
            )
        return where, Provenance(where.recipe)
    path = Path(resolve_last(str(where)))
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
