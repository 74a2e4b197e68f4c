"""The shipped prompt sets, one file per dataset in `prompts/`."""

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
    classes: Mapping[str, str]  # name in the files → name in prompts, by label; empty: see `class_names`


def prompt_names() -> list[str]:
    """Names of the shipped prompt sets."""
    return sorted(entry.name.removesuffix(".yaml") for entry in FOLDER.iterdir() if entry.name.endswith(".yaml"))


@cache
def read_prompts(name: str) -> PromptSet:
    """Read a shipped prompt set; raises `UserError` for an unknown name."""
    if name not in prompt_names():
        raise UserError(
            f"{unknown('template set', name, prompt_names())} A template of your own contains {{}} for the class name."
        )
    tree = read_yaml((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    classes = {str(raw): str(shown) for raw, shown in tree.get("classes", {}).items()}
    return PromptSet(tree["source"], tuple(tree["templates"]), classes)


def class_names(prompts: str, raw: Iterable[str]) -> tuple[str, ...]:
    """Convert the class names of a dataset's files to those for the templates, in the same order.

    A prompt set with classes maps each name; otherwise underscores become spaces, as in CLIP.
    """
    listed, raw = read_prompts(prompts).classes, list(raw)
    if listed and (strange := [name for name in raw if name not in listed]):
        raise UserError(
            f"{len(strange)} classes of the data, such as '{strange[0]}', are not among the {len(listed)} classes of "
            f"'{prompts}'. Is it another dataset or version? Evaluate a folder with other classes as 'folder:PATH'."
        )
    return tuple(listed[name] if listed else name.replace("_", " ") for name in raw)
