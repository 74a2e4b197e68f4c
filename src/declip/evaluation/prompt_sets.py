"""Prompt sets: the templates and class names of datasets, one file per dataset in `prompts/`."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import NamedTuple

from declip.errors import UserError, unknown
from declip.io.yaml_dialect import read_yaml

FOLDER = resources.files("declip.evaluation") / "prompts"


class PromptSet(NamedTuple):
    """Templates and class names of a dataset."""

    templates: tuple[str, ...]  # sentences with {} for the class name
    # Name in the files → name in prompts, by label; empty: see `class_names`
    classes: Mapping[str, str]


def prompt_names() -> list[str]:
    """Names of the shipped prompt sets."""
    files = [entry.name for entry in FOLDER.iterdir()]
    return sorted(file.removesuffix(".yaml") for file in files if file.endswith(".yaml"))


@cache
def read_prompts(name: str) -> PromptSet:
    """Read a shipped prompt set; raises `UserError` for an unknown name."""
    if name not in prompt_names():
        raise UserError(
            f"{unknown('template set', name, prompt_names())} Your own template has {{}} for the class."
        )
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    tree = read_yaml(text)
    classes = {str(raw): str(shown) for raw, shown in tree.get("classes", {}).items()}
    return PromptSet(tuple(tree["templates"]), classes)


def class_names(prompts: str, raw: Iterable[str]) -> tuple[str, ...]:
    """Convert the class names of a dataset's files to those for the templates, in the same order.

    A prompt set with classes maps each name; otherwise underscores become spaces, as in CLIP.
    """
    listed = read_prompts(prompts).classes
    raw = list(raw)
    if not listed:
        return tuple(name.replace("_", " ") for name in raw)
    strange = [name for name in raw if name not in listed]
    if strange:
        raise UserError(
            f"{len(strange)} classes of the data, such as '{strange[0]}', are not among the {len(listed)} classes of "
            f"'{prompts}'. Is it another dataset or version? Evaluate a folder with other classes as 'folder:PATH'."
        )
    return tuple(listed[name] for name in raw)


def read_templates(templates: str | Sequence[str]) -> tuple[str, list[str]]:
    """Read the templates of a shipped set, or the given ones, and return them after a name for the result."""
    if isinstance(templates, str) and "{}" not in templates:
        return templates, list(read_prompts(templates).templates)
    given = [templates] if isinstance(templates, str) else list(templates)
    if not given or not all("{}" in template for template in given):
        raise UserError(
            f"Each template needs {{}} where the class name goes, as in 'a drawing of {{}}': {given}."
        )
    return " | ".join(given), given
