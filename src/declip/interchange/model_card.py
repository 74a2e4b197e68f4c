"""The origin of a model, and its model card (README.md): how to use it, training data, results."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

import declip
from declip.errors import UserError
from declip.evaluation.results import Result, short_names
from declip.interchange import starter
from declip.interchange.open_clip_model import PREFIX as OPEN_CLIP
from declip.interchange.read import HUB_PREFIXES, read, read_checkpoint, weights_of
from declip.interchange.timm_weights import PREFIX as TIMM
from declip.io.text import percent, times
from declip.models.dual_encoder import DualEncoder, has_text
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import STATE, list_checkpoints, step_of
from declip.runs.folder import read_run
from declip.supervision.objective import without_run_state

NO_LICENSE = "unknown: set it"
IDENTIFIER = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9.]+)*", re.IGNORECASE)
"""License identifiers of the Hub, such as "mit" or "cc-by-4.0"; any other license is "other" with a name."""

HUB_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")


@dataclass(frozen=True)
class Traced:
    """A model to export, with what is recorded of its origin."""

    model: DualEncoder
    recipe: Recipe
    step: int | None = None  # number of steps; None without a checkpoint
    pairs: int | None = None  # number of distinct training pairs
    results: Sequence[Result] = ()  # after that step
    origin: str | None = None  # description of the weights' origin, unless that is a run
    heads: Mapping[str, Tensor] = field(default_factory=dict)  # of losses, by the names of `Objective`


def repository(where: str) -> str | None:
    """Repository on the Hub of weights by their name; None for other names."""
    prefix = next((prefix for prefix in HUB_PREFIXES if where.startswith(prefix)), None)
    return where.removeprefix(prefix).partition("@")[0] if prefix else None


def without_folders(given: str) -> str:
    """Remove local folders, and the query of a URL, from the name of a source, a set or weights."""
    if given.startswith(HUB_PREFIXES) or "://" in given:
        return given.partition("?")[0]
    prefix, path = re.fullmatch(r"((?:[\w-]+:)*)(.*)", given, re.DOTALL).groups()  # type: ignore[union-attr]
    if prefix in (OPEN_CLIP, TIMM):  # the model's name comes before the file's
        model, slash, path = path.partition("/")
        prefix += model + slash
    return prefix + (Path(path).name or path)


def trace(where: str | Path | DualEncoder | Traced, model: DualEncoder | None = None) -> Traced:
    """Load a model on the CPU, with the origin that its folder records; a loaded model keeps its device.

    Heads that came with foreign weights are kept; those of a run stay in its checkpoints.

    Args:
        model: The model of a run with one checkpoint, if it is in memory.
    """
    if isinstance(where, Traced):
        return where
    if not isinstance(where, str | Path):
        if not isinstance(where, DualEncoder) or where.recipe is None:
            raise UserError(f"This {type(where).__name__} cannot be exported: it was not built from a recipe.")
        return Traced(where, where.recipe)
    path = Path(where).expanduser()
    if not (path / STATE).is_file() and not list_checkpoints(path):
        weights = read(where)
        origin = f"`{without_folders(str(where))}`"
        if weights.whole and weights.classes is not None:
            origin += ", with projections fitted to the names of its classifier's classes (arXiv 2605.22484)"
        heads = without_run_state(weights.heads)
        return Traced(weights.build().eval(), weights.recipe, origin=origin, heads=heads)
    # A run: results and pairs are those of the exported step.
    if model is None:
        checkpoint = read_checkpoint(path)
        step, model = checkpoint.step, weights_of(checkpoint, str(where)).build().eval()
    else:
        step = step_of(list_checkpoints(path)[-1])
    assert model.recipe is not None, "of a run"
    run = read_run(path.parent.parent if (path / STATE).is_file() else path)
    rows = (row.result for row in run.evaluated if row.weights == step)
    results = tuple({(result.dataset, result.task): result for result in rows}.values())
    return Traced(model, model.recipe, step, run.examples.get("source", {}).get("pairs"), results)


def model_card(
    traced: Traced, library: str, checked: str = "", license: str = NO_LICENSE, repo: str | None = None
) -> str:
    """Write the card as Markdown, with metadata for the Hub and Python code that loads the model, also from `repo`."""
    # Names without folders: a card is published.
    model, start, results = traced.model, traced.recipe.finetune.pretrained, traced.results
    recipe = Recipe.model_validate(_without_folders(traced.recipe.model_dump(mode="json")))
    names = short_names(result.dataset for result in results)
    name = recipe.name if traced.step is not None else "A language-image model"
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("declip.interchange"), keep_trailing_newline=True, **options)
    environment.filters |= {"percent": percent, "times": times}
    return environment.get_template("model_card.md").render(
        vars(replace(traced, recipe=recipe)),
        head=_head(traced, library, license),
        name=name,
        repo=repo,
        whole=has_text(model),
        sigmoid=model.logit_bias is not None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embed_dim=recipe.embed_dim,
        version=declip.__version__,
        library=library,
        checked=checked,
        start=without_folders(start) if start else None,
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


def _head(traced: Traced, library: str, license: str) -> str:
    """Metadata of the card as YAML."""
    task = "zero-shot-image-classification" if has_text(traced.model) else "image-feature-extraction"
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": task}
    fields |= {"license": "other", "license_name": license}
    if license == NO_LICENSE or IDENTIFIER.fullmatch(license):
        fields |= {"license": license.partition(":")[0].lower(), "license_name": None}
    if bases := _base_models(traced.recipe):
        fields |= {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": "finetune"}
    if traced.step is not None and (datasets := HUB_DATASET.findall(traced.recipe.data.label)):
        fields["datasets"] = list(dict.fromkeys(datasets))
    fields["tags"] = ["clip", "declip", "contrastive-learning"]
    return f"{ModelCardData(**fields).to_yaml()}\n"


def _base_models(recipe: Recipe) -> list[str]:
    """Repositories on the Hub of the weights that a run started from."""
    starts = recipe.finetune.pretrained, recipe.text.hf_model
    if builtin := next(filter(starter.matches, map(str, starts)), None):
        return starter.repositories(builtin)
    starts = recipe.finetune.pretrained, recipe.text.hf_model if recipe.text.pretrained else None
    return list(dict.fromkeys(id for start in starts if start and (id := repository(start))))
