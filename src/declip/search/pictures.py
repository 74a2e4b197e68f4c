"""The pictures behind an index, read from its source when they are asked for."""

from functools import cached_property
from pathlib import Path

from PIL import Image

from declip.data.pair import BrokenPair, PairSource, printable
from declip.data.sources.image_source import ImageSource
from declip.errors import UserError
from declip.search.manifest import Source
from declip.search.parts import Row


class Pictures:
    """Reads pictures of rows.

    Only what the source itself lists is read: a row's key and place say which of its images is meant, and no path in
    the index is ever opened.

    Args:
        source: What the manifest says of it.
        given: Where it is now, if elsewhere: what `open_images` opens, or a source.
    """

    def __init__(self, source: Source, given: str | Path | PairSource | None = None) -> None:
        self._source, self._given = source, given

    def open(self, row: Row) -> Image.Image:
        """The picture of a row, RGB and upright.

        Raises:
            UserError: The source can't be opened, has this image no longer, or it cannot be read any more.
        """
        try:
            return self._opened[self._place(row)].image
        except BrokenPair as broken:
            raise UserError(f"The picture of '{printable(row.key)}' cannot be read any more: {broken}.") from broken

    @cached_property
    def _opened(self) -> ImageSource:
        source = self._source
        if self._given is not None and not isinstance(self._given, str | Path):
            return ImageSource(self._given)
        if self._given is None and not source.spec:
            raise UserError(
                f"The index was made of '{source.name}', an object of Python's. To see its pictures, open the index "
                "with source=, that object or what it was opened from."
            )
        return source.open(self._given)

    @cached_property
    def _places(self) -> dict[str, int]:
        """The first place of each key: needed once the source is not what it was."""
        found: dict[str, int] = {}
        for place in range(len(self._opened)):
            found.setdefault(self._opened.key(place), place)
        return found

    def _place(self, row: Row) -> int:
        if row.place < len(self._opened) and self._opened.key(row.place) == row.key:
            return row.place
        if row.key not in self._places:
            raise UserError(f"'{printable(row.key)}' is no longer in '{self._opened.name}'.")
        return self._places[row.key]
