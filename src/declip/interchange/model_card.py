"""The model card (README.md) of every export: training data, results, use."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

import declip
from declip.evaluation.results import short_names
from declip.interchange.provenance import Provenance, repository, without_folders
from declip.io.text import percent, times
from declip.models.dual_encoder import DualEncoder
from declip.models.no_text import has_text
from declip.recipe.schema import Recipe

NO_LICENSE = "unknown: set it"
IDENTIFIER = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9.]+)*", re.IGNORECASE)
"""A license as the Hub takes it in a card's head, such as "mit" or "cc-by-4.0"; others are "other" with a name."""


def model_card(
    model: DualEncoder, provenance: Provenance, library: str, checked: str = "", license: str = NO_LICENSE
) -> str:
    """Write the card as Markdown with the YAML head that the Hub reads.

    Args:
        library: The Hub's name of the library that loads the folder; the card has Python for it.
        checked: How the export was read back, as a sentence, where it was.
        license: An identifier of the Hub's such as "mit", or any words.
    """
    start = provenance.recipe.finetune.pretrained
    recipe = Recipe.model_validate(_without_folders(provenance.recipe.model_dump(mode="json")))
    names = short_names(result.dataset for result in provenance.results)
    return _template().render(
        vars(replace(provenance, recipe=recipe)),
        head=_head(has_text(model), library, license, repository(start) if start else None),
        name=recipe.name if provenance.step is not None else "A language-image model",
        whole=has_text(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embed_dim=model.image_tower.proj.out_features,
        version=declip.__version__,
        library=library,
        checked=checked,
        start=without_folders(start) if start else None,
        measured=[
            (without_folders(names[result.dataset]), result.task, measure)
            for result in provenance.results
            for measure in result.measures()
        ],
        license=license,
    )


@cache
def _template() -> Template:
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("declip.interchange"), keep_trailing_newline=True, **options)
    environment.filters |= {"percent": percent, "times": times}
    return environment.get_template("model_card.md")


def _without_folders(tree: Any) -> Any:
    """A recipe's tree with names in place of paths."""
    if isinstance(tree, dict):
        return {key: _without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(value) for value in tree]
    return without_folders(tree) if isinstance(tree, str) and ("/" in tree or "\\" in tree) else tree


def _head(whole: bool, library: str, license: str, base: str | None) -> str:
    task = "zero-shot-image-classification" if whole else "image-feature-extraction"
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": task}
    if license == NO_LICENSE:
        fields["license"] = "unknown"
    elif IDENTIFIER.fullmatch(license):
        fields["license"] = license.lower()
    else:
        fields |= {"license": "other", "license_name": license}
    if base is not None:
        fields |= {"base_model": base, "base_model_relation": "finetune"}
    fields["tags"] = ["clip", "declip", "contrastive-learning"]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
