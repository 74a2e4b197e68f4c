"""The model card (README.md) of every export: training data, results, use."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

import declip
from declip.evaluation.results import Result, short_names
from declip.interchange import starter
from declip.interchange.provenance import Provenance, repository, without_folders
from declip.io.text import percent, times
from declip.models.dual_encoder import DualEncoder
from declip.models.no_text import has_text
from declip.recipe.schema import Recipe

NO_LICENSE = "unknown: set it"
IDENTIFIER = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9.]+)*", re.IGNORECASE)
"""A license as the Hub takes it in a card's head, such as "mit" or "cc-by-4.0"; others are "other" with a name."""


TASKS: Mapping[str, str] = {
    "zero-shot": "zero-shot-image-classification",
    "features": "image-feature-extraction",
    "retrieval": "image-text-retrieval",
}
"""A result's task, or "features" → the Hub's type of task; probes are "image-classification"."""

HUB_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")


def model_card(
    model: DualEncoder,
    provenance: Provenance,
    library: str,
    checked: str = "",
    license: str = NO_LICENSE,
    repo: str | None = None,
) -> str:
    """Write the card as Markdown with the YAML head that the Hub reads.

    Args:
        library: The Hub's name of the library that loads the folder; the card has Python for it.
        checked: How the export was read back, as a sentence, where it was.
        license: An identifier of the Hub's such as "mit", or any words.
        repo: OWNER/NAME on the Hub, from where the card's Python then loads the model.
    """
    start = provenance.recipe.finetune.pretrained
    recipe = Recipe.model_validate(_without_folders(provenance.recipe.model_dump(mode="json")))
    names = short_names(result.dataset for result in provenance.results)
    name = recipe.name if provenance.step is not None else "A language-image model"
    return _template().render(
        vars(replace(provenance, recipe=recipe)),
        head=_head(name, has_text(model), library, license, provenance),
        name=name,
        repo=repo,
        whole=has_text(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embed_dim=recipe.embed_dim,
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


def _head(name: str, whole: bool, library: str, license: str, provenance: Provenance) -> str:
    """Write the card's metadata, with results as the Hub's model-index."""
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": TASKS["zero-shot" if whole else "features"]}
    if license == NO_LICENSE:
        fields["license"] = "unknown"
    elif IDENTIFIER.fullmatch(license):
        fields["license"] = license.lower()
    else:
        fields |= {"license": "other", "license_name": license}
    if bases := _base_models(provenance.recipe):
        fields |= {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": "finetune"}
    if provenance.step is not None and (datasets := HUB_DATASET.findall(provenance.recipe.data.label)):
        fields["datasets"] = list(dict.fromkeys(datasets))
    fields["tags"] = ["clip", "declip", "contrastive-learning"]
    if results := _eval_results(provenance.results):
        fields |= {"model_name": name, "eval_results": results}
    return f"{ModelCardData(**fields).to_yaml()}\n"


def _base_models(recipe: Recipe) -> list[str]:
    """List the Hub's ids of the weights that a run began with."""
    if recipe.finetune.pretrained == starter.NAME:
        return list(starter.REPOSITORIES)
    starts = recipe.finetune.pretrained, recipe.text.hf_model if recipe.text.pretrained else None
    return list(dict.fromkeys(id for start in starts if start and (id := repository(start))))


def _eval_results(results: Sequence[Result]) -> list[EvalResult]:
    """Convert results to the Hub's form; its metrics on a dataset are grouped by the type of their task."""
    names = short_names(result.dataset for result in results)
    rows = []
    for result in results:
        task = TASKS.get(result.task, "image-classification")
        on, hub = without_folders(names[result.dataset]), HUB_DATASET.findall(result.dataset)
        for measure in result.measures():
            recall = re.search(r"R@(\d+)", measure.name)
            if not math.isfinite(measure.value):
                continue
            rows.append(
                EvalResult(
                    task_type=task,
                    task_name=task.replace("-", " "),
                    dataset_type=hub[0] if hub else re.sub(r"[^\w.-]+", "-", on),
                    dataset_name=on,
                    metric_type=f"recall_at_{recall[1]}" if recall else "accuracy",
                    metric_name=measure.label,
                    metric_value=round(measure.value, 4),
                )
            )
    return rows
