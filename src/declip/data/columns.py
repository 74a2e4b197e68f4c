"""The columns of a table that are read, and the folder of its image paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from declip.recipe.schema import Data


@dataclass(frozen=True)
class Columns:
    """Columns of a table by their names.

    Attributes:
        image: Image paths or bytes.
        caption: Captions; None does not read them.
        group: Cells that are equal for pairs that mean the same; None for no groups.
        root: Folder of the image paths; None is the table's folder.
    """

    image: str = "image"
    caption: str | None = "caption"
    group: str | None = None
    root: str | Path | None = None

    @classmethod
    def of(cls, data: Data) -> Columns:
        """The columns that a recipe names."""
        return cls(**data.columns, root=data.image_root)


DEFAULT = Columns()
