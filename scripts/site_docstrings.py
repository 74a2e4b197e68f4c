"""How docstrings become pages: the indented loop that a function equals is shown as code."""

import re
from typing import Any

import griffe

LOOP = re.compile(r"^((?!\s*(?:Args|Returns|Raises|Attributes|Yields):$)\S[^\n]*)\n((?:    [^\n]+\n?)+)", re.MULTILINE)


class Loops(griffe.Extension):
    """Puts an empty line before and after lines that are indented below a sentence, so that Markdown sees code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of a function or class, before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = LOOP.sub(_apart, obj.docstring.value)


def _apart(found: re.Match[str]) -> str:
    if found[1].rstrip().endswith(":"):
        return found[0]
    return f"{found[1]}\n\n{found[2].rstrip()}\n\n"
