"""The columns of a table that are read, and the folder of its image paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from declip.errors import UserError

if TYPE_CHECKING:
    from declip.recipe.schema import Data


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table.

    Attributes:
        image: Column of image paths or bytes.
        caption: Column of captions, or a template of columns such as `"a {color} {kind}"`; or several of these, whose
            texts are captions of one pair. None does not read them.
        group: Column whose equal cells mark pairs that show the same thing; None for no groups.
        root: Folder that image paths are relative to; None: the folder of the table.

    Examples:
        >>> declip.Columns(image="file", caption="title")
        Columns(image='file', caption='title', group=None, root=None)
    """

    image: str = "image"
    caption: str | Sequence[str] | None = "caption"
    group: str | None = None
    root: str | Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.caption, list):  # of JSON
            object.__setattr__(self, "caption", tuple(self.caption))
        texts = self.caption if isinstance(self.caption, tuple) else (self.caption or "",)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"Columns(caption={self.caption!r}): give a column, a template, or several of these."
            )

    @classmethod
    def of(cls, data: Data) -> Columns:
        """The columns that a recipe names."""
        return cls(**data.columns, root=data.image_root)  # type: ignore[arg-type]  # only captions are several


DEFAULT = Columns()
IN_PYTHON = "Columns({0}=NAME) (in training data.columns.{0}=NAME)"


Missing = dict[str, str]
"""Names of columns that do not exist, each with what it would hold: "image", "caption" or "group"."""


@dataclass(eq=False)
class MissingColumns(UserError):
    """A table lacks columns. `form` is how the caller names one, such as "--{}-column NAME"; empty if it cannot."""

    table: str
    columns: Sequence[str]
    missing: Missing
    form: str = IN_PYTHON

    def __str__(self) -> str:
        # Here, because it loads NumPy and YAML, and commands import this file
        from declip.data.pair import printable

        lacks = " and ".join(
            f"no column '{name}'" + f" for the {what}" * (name != what)
            for name, what in self.missing.items()
        )
        kinds = dict.fromkeys(self.missing.values())
        forms = " ".join(self.form.format(kind) for kind in kinds)
        exist = ", ".join(f"'{printable(name[:40])}'" for name in self.columns[:30]) or "none"
        problem = f"The table '{self.table}' has {lacks}. Its columns: {exist}."
        return f"{problem} Rename columns{', or name them: ' if self.form else ''}{forms}."
