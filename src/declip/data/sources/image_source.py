"""The images of a source, whether their captions are usable or not."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from declip.data.columns import DEFAULT, Columns
from declip.data.pair import BrokenPair, Origin, PairSource
from declip.data.sources.open import open_source
from declip.data.sources.table import TableSource


class CaptionedImage(NamedTuple):
    """An image with its captions, if there are any; `uncaptioned` is the reason if they cannot be used."""

    key: str
    image: Image.Image
    captions: tuple[str, ...]
    uncaptioned: BrokenPair | None = None


class ImageSource:
    """The images of a source by number, without its captions unless `captioned`."""

    def __init__(self, source: PairSource, captioned: bool = True) -> None:
        self.source, self.captioned = source, captioned
        self.name = source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> CaptionedImage:
        """Read image `index`; raises `BrokenPair` if the image itself cannot be used."""
        uncaptioned = None
        if self.captioned:
            try:
                pair = self.source[index]
                return CaptionedImage(pair.key, pair.image, pair.captions)
            except BrokenPair as broken:
                uncaptioned = broken  # read again without the captions: if that fails too, the image is broken
        return CaptionedImage(self.source.key(index), self.source.image(index), (), uncaptioned)

    def key(self, index: int) -> str:
        """The key of image `index`, which may not be unique; characters that are not Unicode become "?"."""
        try:
            key = self.source.key(index)
        except BrokenPair as broken:
            key = broken.key
        return key.encode(errors="replace").decode()

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of image `index`; none if they cannot be used."""
        with suppress(BrokenPair):
            return self.source.captions(index) if self.captioned else ()
        return ()

    def origin(self, index: int) -> Origin:
        origin = Origin()
        with suppress(BrokenPair):
            origin = self.source.origin(index)
        return origin._replace(path=origin.path.encode(errors="replace").decode())


def open_images(spec: str | Path, columns: Columns = DEFAULT) -> ImageSource:
    """Open the images of a source as `open_source` does; `columns.caption` is None for a table without captions."""
    source = open_source(spec, columns)
    return ImageSource(source, captioned=columns.caption is not None or not isinstance(source, TableSource))
