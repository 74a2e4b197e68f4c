"""Where a model that is exported came from: its recipe, steps, pairs, results, and what it was fine-tuned from."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import yaml

from declip.errors import UserError
from declip.evaluation.results import Result
from declip.interchange.declip_file import CARD
from declip.interchange.from_huggingface import PREFIX as HUGGINGFACE
from declip.interchange.load import Model, load, model_of, read_checkpoint
from declip.interchange.open_clip import FOLDER, HUB
from declip.interchange.open_clip import PREFIX as OPEN_CLIP
from declip.interchange.timm_weights import PREFIX as TIMM
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import read_yaml
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import STATE, list_checkpoints
from declip.runs.records import read_run


@dataclass(frozen=True)
class Provenance:
    """What is known of a model's making.

    Attributes:
        recipe: The resolved recipe; None where the model was built otherwise.
        step: Steps done; None where no checkpoint says it.
        pairs: Distinct pairs of the source.
        results: Evaluations after that step.
        origin: Where the weights came from, in a few words, where it was not one of our runs.
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
        license: As timm or their own card says, where either is here.
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
    if given.startswith((HUGGINGFACE, f"{OPEN_CLIP}{HUB}")) or "://" in given:
        return given.partition("?")[0]
    prefix, path = re.fullmatch(r"((?:[\w-]+:)*)(.*)", given, re.DOTALL).groups()  # type: ignore[union-attr]
    if prefix in (OPEN_CLIP, TIMM):  # the model's name comes before the file's
        model, slash, path = path.partition("/")
        prefix += model + slash
    return prefix + (Path(path).name or path)


def _repository(where: str) -> str | None:
    """The Hub's id of weights by their name here."""
    for prefix in (HUGGINGFACE, f"{OPEN_CLIP}{HUB}"):
        if where.startswith(prefix):
            return where.removeprefix(prefix)
    if where.startswith(TIMM):
        config = timm.get_pretrained_cfg(where.removeprefix(TIMM)) if "/" not in where else None
        return config.hf_hub_id if config else None
    if where.startswith(OPEN_CLIP):
        try:
            import open_clip
        except ImportError:
            return None
        model, _, tag = where.removeprefix(OPEN_CLIP).partition("/")
        found = open_clip.get_pretrained_cfg(model, tag).get("hf_hub") or ""
        return "/".join(found.split("/")[:2]) or None
    return None


def _card(where: str, hub: str | None) -> Path:
    """The model card of weights: in their folder, or in the Hub's cache."""
    if hub is not None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(hub, CARD)
        return Path(found) if isinstance(found, str) else Path()
    path = Path(where.removeprefix(f"{OPEN_CLIP}{FOLDER}")).expanduser()
    return (path if path.is_dir() else path.parent) / CARD


def _license(card: Path) -> str | None:
    """The license in the head of a model card."""
    try:
        head = read_yaml(card.read_text(encoding="utf-8").split("---\n")[1])
        found = head.get("license_name") or head.get("license")
    except (OSError, ValueError, LookupError, AttributeError, yaml.YAMLError):  # none, or a file of another form
        return None
    return found if isinstance(found, str) and found != "unknown" else None


def trace(where: str | Path | Model) -> tuple[DualEncoder, Provenance]:
    """Load a model, with what its folder says of it.

    Args:
        where: What `declip.load` takes, or a model; of a model only the recipe is known.

    Returns:
        The model on the CPU (one that was given stays where it is), and where it came from.

    Raises:
        UserError: nothing loadable, or a model of open_clip's, which has no need to be exported.
    """
    if not isinstance(where, str | Path):
        return _ours(where), Provenance(getattr(where, "recipe", None))
    path = Path(where)
    if (path / STATE).is_file() or list_checkpoints(path):
        checkpoint = read_checkpoint(path)
        model = model_of(checkpoint, path).eval()
        run = path.parent.parent if (path / STATE).is_file() else path
        rows = read_run(run).evaluations
        results = tuple(row.result for row in rows if row.step == checkpoint.step)
        pairs = checkpoint.extra.get("pairs")
        return model, Provenance(model.recipe, checkpoint.step, _count(pairs), results)
    model = _ours(load(where, device="cpu"))
    return model, Provenance(model.recipe, origin=f"the file `{path.name}`")


def _count(found: Any) -> int | None:
    return found if isinstance(found, int) else None


def _ours(model: Any) -> DualEncoder:
    if not isinstance(model, DualEncoder):
        raise UserError(
            f"This {type(model).__name__} cannot be exported: a model of open_clip's is already in its own format, and "
            "only models of ours can be written in others. `declip import FILE --from open_clip` makes it one of ours."
        )
    return model
