"""The shipped prompts: one file per dataset in `prompts/`, with its source in its head."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from declip.errors import UserError, unknown
from declip.recipe.yaml_text import read_yaml

FOLDER = resources.files("declip.evaluation") / "prompts"


@dataclass(frozen=True)
class PromptSet:
    """Templates and class names of a dataset."""

    source: str  # the publication
    templates: tuple[str, ...]  # sentences with {} for the class name
    classes: Mapping[str, str]  # name in the dataset's files → for the templates, by label; empty: see `class_names`


def prompt_names() -> list[str]:
    """Names of the shipped prompt sets."""
    return sorted(entry.name.removesuffix(".yaml") for entry in FOLDER.iterdir() if entry.name.endswith(".yaml"))


@cache
def read_prompts(name: str) -> PromptSet:
    """Read a shipped prompt set; raises `UserError` for an unknown name."""
    if name not in prompt_names():
        raise UserError(f"{unknown('template set', name, prompt_names())} An own template has {{}} for the class.")
    tree = read_yaml((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    classes = {str(raw): str(shown) for raw, shown in tree.get("classes", {}).items()}
    return PromptSet(tree["source"], tuple(tree["templates"]), classes)


def class_names(prompts: str, raw: Iterable[str]) -> tuple[str, ...]:
    """Convert the class names of a dataset's files to those that go into the templates, in the same order.

    They are looked up by name where the prompt set lists classes; else underscores become spaces, as CLIP has it.
    """
    listed, raw = read_prompts(prompts).classes, list(raw)
    if listed and (strange := [name for name in raw if name not in listed]):
        raise UserError(
            f"{len(strange)} classes of the data, such as '{strange[0]}', are none of the {len(listed)} classes of "
            f"'{prompts}'. Is it another dataset or version? Measure a folder with other classes as 'folder:PATH'."
        )
    return tuple(listed[name] if listed else name.replace("_", " ") for name in raw)
