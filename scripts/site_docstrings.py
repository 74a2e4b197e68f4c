"""griffe extension: show the indented loop of a docstring as code."""

import re
from typing import Any

import griffe

LOOP = re.compile(r"^((?!\s*(?:Args|Returns|Raises|Attributes|Yields):$)\S[^\n]*)\n((?:    [^\n]+\n?)+)", re.MULTILINE)


class Loops(griffe.Extension):
    """Put an empty line around lines that are indented below a sentence, so that Markdown sees code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change a docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = LOOP.sub(_separate, obj.docstring.value)


def _separate(match: re.Match[str]) -> str:
    if match[1].rstrip().endswith(":"):
        return match[0]
    return f"{match[1]}\n\n{match[2].rstrip()}\n\n"
