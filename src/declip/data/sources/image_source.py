"""A source seen from its images: one without a caption, or with a caption that cannot be used, is an image still."""

from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.open import open_source
from declip.data.sources.origin import Origin
from declip.data.sources.table import TableSource


class CaptionedImage(NamedTuple):
    """An image with the captions that it has.

    Attributes:
        key: As a `Pair` has it.
        image: As a `Pair` has it.
        captions: As a `Pair` has them, but there may be none.
        uncaptioned: Why there are none.
    """

    key: str
    image: Image.Image
    captions: tuple[str, ...]
    uncaptioned: BrokenPair | None = None


class ImageSource:
    """The images of a source by number. It can be pickled, and read from several processes, as the source can.

    Args:
        source: Any source; one with the methods `image`, `key` and `origin` gives images without captions too, and
            its keys without decoding.
        captioned: Whether the source's captions are read.
    """

    def __init__(self, source: PairSource, captioned: bool = True) -> None:
        self.source, self.captioned = source, captioned
        self.name = source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> CaptionedImage:
        """Read image `index`; raises `BrokenPair` where the image itself cannot be used."""
        source: Any = self.source
        if not (hasattr(source, "image") and hasattr(source, "key")):
            pair = source[index]
            return CaptionedImage(pair.key, pair.image, pair.captions if self.captioned else ())
        image, key = source.image(index), source.key(index)
        if not self.captioned:
            return CaptionedImage(key, image, ())
        try:
            return CaptionedImage(key, image, source.captions(index))
        except BrokenPair as broken:
            return CaptionedImage(key, image, (), broken)

    def key(self, index: int) -> str:
        """The key of image `index`, which more than one may have; what is not Unicode in it is "?"."""
        try:
            key = self.source.key(index) if hasattr(self.source, "key") else self.source[index].key
        except BrokenPair as broken:
            key = broken.key
        return key.encode(errors="replace").decode()

    def origin(self, index: int) -> Origin:
        """Where image `index` lies; empty where the source does not tell."""
        try:
            found = self.source.origin(index) if hasattr(self.source, "origin") else Origin()
        except BrokenPair:
            return Origin()
        return found._replace(path=found.path.encode(errors="replace").decode())


def open_images(
    spec: str | Path,
    *,
    image_column: str = "image",
    caption_column: str | None = "caption",
    image_root: str | Path | None = None,
) -> ImageSource:
    """Open the images of what `open_source` opens; in a folder none needs a text file beside it.

    Args:
        spec: As `open_source` has it.
        image_column: Likewise.
        caption_column: Likewise; None or empty for a table without captions.
        image_root: Likewise.

    Raises:
        UserError: As `open_source` does.
    """
    # The same column twice: the table then has all that it needs, and nobody asks for captions.
    column = caption_column or image_column
    source = open_source(spec, image_column=image_column, caption_column=column, image_root=image_root)
    return ImageSource(source, captioned=bool(caption_column) or not isinstance(source, TableSource))
