"""Write docs/keys.md, the page of all recipe keys, from the recipe's schema: `python scripts/site_keys.py`."""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from declip.recipe.schema import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "keys.md"

BEGINNING = """# All recipe keys

Every key with its default. In a file keys are nested (`train: {steps: 500}`); on the command line and in Python they
are dotted (`train.steps=500`). `declip recipes show NAME` prints a recipe with all of them. This page is written by
`python scripts/site_keys.py`."""


def keys_page() -> str:
    """Render the page as Markdown."""
    parts, top = [BEGINNING], []
    for name, field in Recipe.model_fields.items():
        if isinstance(field.default, BaseModel):
            about = (inspect.getdoc(type(field.default)) or "").replace("\n", " ")
            parts.append(f"## {name}\n\n{about}\n\n{_table(_rows(f'{name}.', field.default))}")
        else:
            top.append((name, getattr(Recipe(), name), field.description or ""))
    parts.insert(1, f"## At the top\n\n{_table(top)}")
    return "\n\n".join(parts) + "\n"


def _rows(prefix: str, section: BaseModel) -> Iterator[tuple[str, Any, str]]:
    """Dotted key, default and description of each key of a section and its subsections."""
    for name, field in type(section).model_fields.items():
        default = getattr(section, name)
        if isinstance(default, BaseModel):
            yield from _rows(f"{prefix}{name}.", default)
        else:
            yield f"{prefix}{name}", default, field.description or ""


def _table(rows: Iterable[tuple[str, Any, str]]) -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key, default, meaning in rows:
        shown = (
            yaml.safe_dump(_plain(default), default_flow_style=True, width=1000)
            .removesuffix("...\n")
            .strip()
        )
        lines.append(f"| `{key}` | `{shown}` | {meaning.replace('|', '&#124;')} |")
    return "\n".join(lines)


def _plain(default: Any) -> Any:
    """Replace tuples by lists and long fractions by four digits."""
    if isinstance(default, tuple):
        return [_plain(value) for value in default]
    return round(default, 4) if isinstance(default, float) and default > 0.01 else default


if __name__ == "__main__":
    PAGE.write_text(keys_page(), encoding="utf-8")
