"""Pages: self-contained HTML files, rendered from numbers by Jinja templates."""

import datetime
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import markupsafe
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.markup import escape
from rich.table import Table as RichTable

import declip
from declip.io import text

NBSP = "\N{NO-BREAK SPACE}"
NONE = "–"  # a table cell without a number


@dataclass(frozen=True)
class Table:
    """A table of strings for the page and the terminal."""

    caption: str
    columns: tuple[str, ...]  # names; may be empty
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1  # number of leading text columns; the others are numbers


def points(fraction: float) -> str:
    """Format a difference in percentage points with its sign: "−2.1", "+0.35"."""
    value = 100 * fraction
    digits = 2
    if abs(value) >= 1:
        digits = 1
    return f"{value:+.{digits}f}".replace("-", "−")


def code(line: str) -> markupsafe.Markup:
    """Escape a line for HTML, with what stands in backticks as code."""
    escaped = str(markupsafe.escape(line))
    return markupsafe.Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escaped))


def span(low: float, high: float) -> str:
    """Format an interval: "1.10 to 1.80", or with far ends, as from few seeds, "0.0012 to 1.6e+05"."""
    ends = []
    for end in (low, high):
        ends.append(f"{end:.2f}" if 0.1 <= end < 100 else f"{end:.2g}")
    return " to ".join(ends)


@cache
def environment(plain_text: bool = False) -> Environment:
    """The environment of the templates; values are escaped for HTML, or not at all."""
    created = Environment(
        loader=PackageLoader("declip.reports"),
        autoescape=not plain_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    created.filters |= {
        "percent": lambda value: text.percent(value).replace(" ", NBSP),
        "points": points,
        "code": code,
        "count": lambda value: f"{value:,}",
        "plural": text.plural,
        "duration": text.duration,
        "join_words": text.join_words,
        "round_two_digits": text.round_two_digits,
        "sanitize": text.sanitize,
        "words": lambda value: value.replace(" %", f"{NBSP}%"),
    }
    created.globals |= {"span": span}
    return created


def render(template: str, **context: Any) -> str:
    """Render a template with the version, the date and its context."""
    now = datetime.datetime.now().strftime("%d %B %Y, %H:%M")
    templates = environment(template.endswith(".txt"))
    loaded = templates.get_template(template)
    return loaded.render(version=declip.__version__, date=now, **context)


def rich_table(table: Table) -> RichTable:
    """Convert to a table of rich; text of the data is escaped."""
    printed = RichTable(box=None, header_style="dim", show_header=bool(table.columns))
    names = table.columns or ("",) * len(table.rows[0])
    for column, name in enumerate(names):
        side: Literal["left", "right"] = "left" if column < table.texts else "right"
        printed.add_column(escape(name), justify=side, overflow="fold")
    for row in table.rows:
        printed.add_row(*map(escape, row))
    return printed
