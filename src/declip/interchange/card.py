"""The model card of an export: README.md with metadata for the Hub, usage, data, recipe and results."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import declip
from declip.evaluation.results import short_names
from declip.interchange import open_clip_model, timm_weights
from declip.interchange.format import Format, ModelRecord, render
from declip.interchange.hub import HUB_PREFIXES
from declip.recipe.schema import Recipe

NO_LICENSE = "unknown: set it"
IDENTIFIER = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9.]+)*", re.IGNORECASE)
"""License identifiers of the Hub, such as "mit" or "cc-by-4.0"; any other license is "other" with a name."""


def model_card(
    record: ModelRecord,
    form: Format,
    checked: str = "",
    license: str = NO_LICENSE,
    repo: str | None = None,
) -> str:
    """Write the card as Markdown."""
    # Names without folders: a card is published.
    model = record.model
    results = record.results
    tree = model.recipe.model_dump(mode="json")
    recipe = Recipe.model_validate(_without_folders(tree))
    names = short_names(result.dataset for result in results)
    task = "image-feature-extraction"
    if model.has_text:
        task = "zero-shot-image-classification"
    terms: dict[str, Any] = {"license": "other", "license_name": license}
    if license == NO_LICENSE or IDENTIFIER.fullmatch(license):
        terms = {"license": license.partition(":")[0].lower()}
    tags = ["clip", "declip", "contrastive-learning"]
    metadata = ModelCardData(library_name=form.library, pipeline_tag=task, tags=tags, **terms)
    return render(
        "model_card.md",
        **vars(record),
        recipe=recipe,
        head=f"{metadata.to_yaml()}\n",
        name=recipe.name if record.step is not None else "A language-image model",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        version=declip.__version__,
        usage=form.card(model, repo),
        checked=checked,
        start=without_folders(model.recipe.finetune.pretrained or ""),
        measured=[
            (without_folders(names[r.dataset]), r.task, m) for r in results for m in r.measures()
        ],
        license=license,
    )


def without_folders(given: str) -> str:
    """Remove local folders, and the query of a URL, from the name of a source, a set or weights."""
    if given.startswith(HUB_PREFIXES) or "://" in given:
        return given.partition("?")[0]
    path = re.sub(r"^(?:[\w-]+:)+", "", given)
    prefix = given.removesuffix(path)
    if prefix in (open_clip_model.PREFIX, timm_weights.PREFIX):
        # The model's name comes before the file's
        model, slash, path = path.partition("/")
        prefix += model + slash
    return prefix + (Path(path).name or path)


def _without_folders(tree: Any) -> Any:
    """Replace paths by names in a recipe's tree."""
    if isinstance(tree, dict):
        return {key: _without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(value) for value in tree]
    if isinstance(tree, str) and ("/" in tree or "\\" in tree):
        return without_folders(tree)
    return tree
