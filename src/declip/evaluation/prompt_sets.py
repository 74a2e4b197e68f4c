"""The prompts that the package ships: one file a set of images in `prompts/`, each with its source in its head."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from declip.errors import UserError, unknown
from declip.recipe.load import read_yaml

FOLDER = resources.files("declip.evaluation") / "prompts"


@dataclass(frozen=True)
class PromptSet:
    """What a set of images is asked with.

    Attributes:
        name: Name of its file.
        source: Where templates and class names were published.
        templates: Sentences with ``{}`` for the class name.
        classes: The set's own name of a class, as its files write it, to the name that goes into the templates, in
            the order of the labels; empty where a rule gives the names, see `class_names`.
    """

    name: str
    source: str
    templates: tuple[str, ...]
    classes: Mapping[str, str] = field(default_factory=dict)


def prompt_names() -> list[str]:
    """Names of the prompt sets that the package ships."""
    return sorted(entry.name.removesuffix(".yaml") for entry in FOLDER.iterdir() if entry.name.endswith(".yaml"))


@cache
def read_prompts(name: str) -> PromptSet:
    """Read a shipped prompt set.

    Raises:
        UserError: there is none of that name.
    """
    if name not in prompt_names():
        raise unknown("template set", name, prompt_names())
    tree = read_yaml((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    classes = {str(raw): str(shown) for raw, shown in tree.get("classes", {}).items()}
    return PromptSet(name, tree["source"], tuple(tree["templates"]), classes)


def class_names(prompts: str, raw: Iterable[str]) -> tuple[str, ...]:
    """The names that go into the templates, in the order of the classes given.

    Where the set's file lists classes, each is looked up by its own name, never by its place; otherwise underscores
    become spaces, as CLIP's published names have it.

    Args:
        prompts: A shipped prompt set.
        raw: What the data set's files call its classes.

    Raises:
        UserError: the file lists classes, and one of these is not among them.
    """
    listed = read_prompts(prompts).classes
    raw = list(raw)
    if strange := [name for name in raw if listed and name not in listed]:
        raise UserError(
            f"The data have the class '{strange[0]}', which is none of the {len(listed)} classes of '{prompts}'"
            f"{f', and {len(strange) - 1} more such' if len(strange) > 1 else ''}. Is it another set or version of it? "
            "A folder with other classes can be measured as 'folder:PATH'."
        )
    return tuple(listed[name] if listed else name.replace("_", " ") for name in raw)
