"""The shipped prompts: one file per dataset in `prompts/`, with its source in its head."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from declip.errors import UserError, unknown
from declip.recipe.load import read_yaml

FOLDER = resources.files("declip.evaluation") / "prompts"


@dataclass(frozen=True)
class PromptSet:
    """Templates and class names of a dataset.

    Attributes:
        source: Where templates and class names were published.
        templates: Sentences with ``{}`` for the class name.
        classes: Name of a class in the dataset's files → name for the templates, in the order of the labels; empty
            where a rule gives the names, see `class_names`.
    """

    name: str
    source: str
    templates: tuple[str, ...]
    classes: Mapping[str, str] = field(default_factory=dict)


def prompt_names() -> list[str]:
    """Names of the shipped prompt sets."""
    return sorted(entry.name.removesuffix(".yaml") for entry in FOLDER.iterdir() if entry.name.endswith(".yaml"))


@cache
def read_prompts(name: str) -> PromptSet:
    """Read a shipped prompt set; raises `UserError` for an unknown name."""
    if name not in prompt_names():
        raise unknown("template set", name, prompt_names())
    tree = read_yaml((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    classes = {str(raw): str(shown) for raw, shown in tree.get("classes", {}).items()}
    return PromptSet(name, tree["source"], tuple(tree["templates"]), classes)


def class_names(prompts: str, raw: Iterable[str]) -> tuple[str, ...]:
    """Convert the class names of a dataset's files to those that go into the templates, in the same order.

    Where the prompt set lists classes, each is looked up by its name in the files, never by its position; otherwise
    underscores become spaces, as in CLIP's published names.
    """
    listed = read_prompts(prompts).classes
    raw = list(raw)
    if listed and (strange := [name for name in raw if name not in listed]):
        raise UserError(
            f"The data have the class '{strange[0]}', which is none of the {len(listed)} classes of '{prompts}'"
            f"{f', and {len(strange) - 1} more such' if len(strange) > 1 else ''}. Is it another dataset or version? "
            "A folder with other classes can be measured as 'folder:PATH'."
        )
    return tuple(listed[name] if listed else name.replace("_", " ") for name in raw)
