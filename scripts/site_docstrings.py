"""griffe extension: show the indented loop of a docstring as code, and parameters that share a description each."""

import re
from typing import Any

import griffe

LOOP = re.compile(
    r"^((?!\s*(?:Args|Returns|Raises|Attributes|Yields):$)\S[^\n]*)\n((?:    [^\n]+\n?)+)",
    re.MULTILINE,
)
# In a section Args
SHARED = re.compile(r"^( +)(\w+), (\w+): ([^\n]+(?:\n\1 +[^\n]+)*)", re.MULTILINE)


class Loops(griffe.Extension):
    """Put an empty line around lines that are indented below a sentence, so that Markdown sees code.

    Griffe also wants a line for each parameter: two that share a description get one each.
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change a docstring before it is parsed."""
        if obj.docstring is not None:
            value = SHARED.sub(r"\1\2: \4\n\1\3: \4", obj.docstring.value)
            obj.docstring.value = LOOP.sub(_separate, value)


def _separate(match: re.Match[str]) -> str:
    if match[1].rstrip().endswith(":"):
        return match[0]
    return f"{match[1]}\n\n{match[2].rstrip()}\n\n"
