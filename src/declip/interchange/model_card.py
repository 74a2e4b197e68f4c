"""The model card (README.md) of every export: training data, results, use."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import yaml

import declip
from declip.evaluation.results import Result, short_names
from declip.interchange.provenance import Base, Provenance, base_of, without_folders
from declip.io.text import percent, times
from declip.models.dual_encoder import DualEncoder
from declip.models.no_text import has_text
from declip.recipe.schema import Recipe, TextTowerConfig

log = logging.getLogger("declip")

NO_LICENSE = "unknown: set it"
_IDENTIFIERS = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc
lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl
odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_IDENTIFIERS.split())
"""Identifiers that the Hub takes in a card's head; any other license is "other" with a name."""

LIMITS = """\
For research on contrastive pre-training with few pairs: zero-shot classification, retrieval and probes on data
like that of training. It repeats the content and the gaps of its pairs, social bias included; few captions were
not English. Measure it on your own data, group by group, before anything depends on it. It is not meant for
surveillance, for identifying people, or for decisions about people."""

CITATION = """\
```bibtex
@inproceedings{li2022declip,
  title = {Supervision Exists Everywhere: A Data Efficient Contrastive Language-Image Pre-training Paradigm},
  author = {Yangguang Li and Feng Liang and Lichen Zhao and Yufeng Cui and Wanli Ouyang and Jing Shao and Fengwei Yu and Junjie Yan},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  note = {arXiv:2110.05208}
}
@inproceedings{radford2021clip,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Alec Radford and Jong Wook Kim and Chris Hallacy and Aditya Ramesh and Gabriel Goh and Sandhini Agarwal and Girish Sastry and Amanda Askell and Pamela Mishkin and Jack Clark and Gretchen Krueger and Ilya Sutskever},
  booktitle = {International Conference on Machine Learning},
  year = {2021},
  note = {arXiv:2103.00020}
}
```"""  # fmt: skip # noqa: E501


def model_card(
    model: DualEncoder, provenance: Provenance, library: str, usage: str, checked: str = "", license: str = NO_LICENSE
) -> str:
    """Write the card as Markdown with the YAML head that the Hub reads.

    Args:
        model: The model.
        provenance: Its origin.
        library: The Hub's name of the library that loads the folder.
        usage: Python that works in the folder as it is.
        checked: How the export was read back, as a sentence, where it was.
        license: An identifier of the Hub's such as "mit", or any words.
    """
    recipe = provenance.recipe
    base = None
    if recipe is not None:
        base = base_of(recipe.finetune.pretrained) if recipe.finetune.pretrained else None
        recipe = Recipe.model_validate(_without_folders(recipe.model_dump(mode="json")))
        provenance = replace(provenance, recipe=recipe)
    its = base.license if base else None
    if license == NO_LICENSE and its:
        license = its
    elif license != NO_LICENSE:
        license = _known(license)
    name = recipe.name if recipe is not None and provenance.step is not None else "A language-image model"
    parts = [
        _head(model, library, license, base),
        f"# {name}",
        _summary(model, provenance),
        _section("How to use it", f"```python\n{usage.strip()}\n```\n\n{checked}".strip()),
        _section("Data", _data(provenance, base)),
        _section("Recipe", _recipe(provenance)),
        _section("Measured", _measured(provenance.results)),
        _section("Intended use and limits", LIMITS),
        _section(
            "License",
            f"{license}." + (f" Of the weights it was fine-tuned from, `{base.name}`: {its}." if base and its else ""),
        ),
        _section("How to cite", CITATION),
    ]
    return "\n\n".join(parts) + "\n"


def _without_folders(tree: Any) -> Any:
    """A recipe's tree with names in place of paths."""
    if isinstance(tree, dict):
        return {key: _without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(value) for value in tree]
    return without_folders(tree) if isinstance(tree, str) and ("/" in tree or "\\" in tree) else tree


def _known(license: str) -> str:
    """Give the Hub's identifier of a license where it is one, else warn."""
    if license.lower() in LICENSES:
        return license.lower()
    near = get_close_matches(license.lower().replace(" ", "-"), sorted(LICENSES), n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    log.warning("The license '%s' is no identifier of the Hub: the card names it as 'other'.%s", license, hint)
    return license


def _head(model: DualEncoder, library: str, license: str, base: Base | None) -> str:
    task = "zero-shot-image-classification" if has_text(model) else "image-feature-extraction"
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": task}
    if license == NO_LICENSE:
        fields["license"] = "unknown"
    elif license in LICENSES:
        fields["license"] = license
    else:
        fields |= {"license": "other", "license_name": license}
    if base is not None and base.hub:
        fields |= {"base_model": base.hub, "base_model_relation": "finetune"}
    fields["tags"] = ["clip", "declip", "contrastive-learning"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _summary(model: DualEncoder, provenance: Provenance) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    towers = "image and text tower" if has_text(model) else "image tower alone"
    origin = f" Weights from {provenance.origin}." if provenance.origin else ""
    return (
        f"A contrastive language-image model ({towers}, {millions:,.1f} M parameters, {model.preprocessor.size} px, "
        f"{model.image_tower.proj.out_features:,} numbers a feature), written by declip {declip.__version__}.{origin}"
    )


def _data(provenance: Provenance, base: Base | None) -> str:
    recipe, step = provenance.recipe, provenance.step
    if recipe is None or step is None:
        return "Not recorded: the weights came without the folder of their run. Say here what they were trained on."
    pairs = "" if provenance.pairs is None else f", {provenance.pairs:,} distinct pairs"
    seen = step * recipe.train.batch_size
    if base is not None:
        count = "" if provenance.pairs is None else f"{provenance.pairs:,} "
        return (
            f"Fine-tuned on {count}pairs of `{recipe.data.label}` ({seen:,} pairs seen in {step:,} steps of "
            f"{recipe.train.batch_size:,}), from the weights `{base.name}`: their own training is not counted here."
        )
    return f"`{recipe.data.label}`{pairs}; {seen:,} pairs seen in {step:,} steps of {recipe.train.batch_size:,}."


def _recipe(provenance: Provenance) -> str:
    recipe = provenance.recipe
    if recipe is None or provenance.step is None:
        return "Not recorded: weights say nothing of how they were trained."
    terms = ", ".join(f"{weight:g} {term}" for term, weight in recipe.active_losses.items())
    rows = [
        f"- losses: {terms}",
        f"- image tower: {recipe.image.model}, {recipe.image.size} px",
        f"- text tower: {_text_tower(recipe.text)}, context {recipe.text.context_length}",
        f"- seed {recipe.seed}, peak learning rate {recipe.train.lr:g}, weight decay {recipe.train.weight_decay:g}",
    ]
    whole = f"<details><summary>the whole recipe</summary>\n\n```yaml\n{recipe.to_yaml()}```\n\n</details>"
    return "\n".join(rows) + f"\n\n{whole}"


def _text_tower(text: TextTowerConfig) -> str:
    if text.hf_model is None:
        return f"{text.layers} layers, width {text.width}"
    start = "its own weights" if text.pretrained else "random weights"
    return f"{text.hf_model}, from {start}, pooling {text.pooling}"


def _measured(results: Sequence[Result]) -> str:
    if not results:
        return "Nothing was recorded with these weights: `declip evaluate` measures them."
    rows = ["| dataset | task | measure | value | chance | × chance | n |", "|---|---|---|--:|--:|--:|--:|"]
    names = short_names(result.dataset for result in results)
    for result in results:
        for measure in result.measures():
            numbers = (
                f"{percent(measure.value)} | {percent(measure.chance)} | {times(measure.times_chance)} | {measure.n:,}"
            )
            rows.append(f"| {without_folders(names[result.dataset])} | {result.task} | {measure.label} | {numbers} |")
    return "\n".join(rows)
