"""The page of all recipe keys, made from the recipe's own types, so that it cannot be out of date."""

import inspect
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from declip.recipe.schema import Recipe

BEGINNING = """# All recipe keys

Every key with its default, as `declip.recipe.schema.Recipe` has them. In a file they are nested
(`train: {steps: 500}`), on
the command line and in Python they are dotted (`train.steps=500`). The shipped recipes set what differs: `declip
recipes` lists them, and a run's `recipe.yaml` has every key with the value that it was trained with.
[Recipes](recipes.md), [Fine-tuning](finetuning.md), [Speed](speed.md) and [Scaling](scaling.md) say more of many.
"""


def keys_page() -> str:
    """The page as Markdown."""
    parts = [BEGINNING]
    alone = [name for name, field in Recipe.model_fields.items() if not isinstance(field.default, BaseModel)]
    parts.append("## At the top\n\n" + _table(row for row in _rows("", Recipe()) if row[0] in alone))
    for name, field in Recipe.model_fields.items():
        if isinstance(field.default, BaseModel):
            about = (inspect.getdoc(type(field.default)) or "").replace("\n", " ")
            parts.append(f"## {name}\n\n{about}\n\n" + _table(_rows(f"{name}.", field.default)))
    return "\n\n".join(parts) + "\n"


def _rows(prefix: str, section: BaseModel) -> Iterator[tuple[str, Any, str]]:
    """Dotted key, default and description of each key of a section and of those below it."""
    for name, field in type(section).model_fields.items():
        default = getattr(section, name)
        if isinstance(default, BaseModel):
            yield from _rows(f"{prefix}{name}.", default)
        else:
            yield f"{prefix}{name}", default, field.description or ""


def _table(rows: Iterator[tuple[str, Any, str]]) -> str:
    lines = ["| key | default | what |", "|---|---|---|"]
    for key, default, what in rows:
        shown = yaml.safe_dump(_plain(default), default_flow_style=True, width=1000).removesuffix("...\n").strip()
        lines.append(f"| `{key}` | `{shown}` | {what.replace('|', '&#124;')} |")
    return "\n".join(lines)


def _plain(default: Any) -> Any:
    """A tuple as a list, a long fraction in four digits."""
    if isinstance(default, tuple):
        return [_plain(each) for each in default]
    return round(default, 4) if isinstance(default, float) and default > 0.01 else default
