"""The images of a source, whether their captions are usable or not."""

from contextlib import suppress
from pathlib import Path

from declip.data.columns import DEFAULT, Columns
from declip.data.pair import BrokenPair, LazyPair, Origin, Pair, PairSource
from declip.data.sources.open import open_source
from declip.data.sources.table import TableSource


class ImageSource:
    """The images of a source by number, without its captions unless `captioned`."""

    def __init__(self, source: PairSource, captioned: bool = True) -> None:
        self.source, self.captioned = source, captioned
        self.name = source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Pair:
        """Read image `index`, perhaps without captions; raises `BrokenPair` if the image itself cannot be used."""
        if self.captioned:
            with suppress(BrokenPair):
                return self.source[index]
        return Pair(self.source.key(index), self.source.image(index), ())

    def read_lazy(self, index: int) -> LazyPair:
        """As reading image `index`, decoded on demand; `BrokenPair` may be raised then."""
        if self.captioned:
            with suppress(BrokenPair):
                return self.source.read_lazy(index)
        return LazyPair(self.source.key(index), self.source.lazy_image(index), ())

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
