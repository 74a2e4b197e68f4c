"""Contact sheets of a search."""

from collections.abc import Sequence
from math import ceil
from textwrap import wrap

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont, ImageOps

from declip.data.pair import printable
from declip.errors import UserError
from declip.io.text import sanitize
from declip.search.index import Hit, Index

COLUMNS = 8
# In pixels
SIDE = 148  # of an image
GAP = 16  # between images
MARGIN = 28  # around the sheet
HEAD = 60  # from the margin to the first row
LINE = 17  # of a caption

LETTERS = 19  # in a line of a caption
LINES = 3  # of a caption
CELL = SIDE + LINES * LINE + GAP
INK = "#1c2127"
QUIET = "#5b6470"
PAPER = "#fbfaf7"
FRAME = "#d9d5cc"


def search_sheet(
    index: Index,
    hits: Sequence[Hit],
    title: str,
    image: Image.Image | None = None,
    order: str = "the most similar first",
) -> Image.Image:
    """Draw the hits of a search, each with its score and its caption or key.

    DejaVu Sans, which matplotlib ships, lacks the scripts of East and South Asia. `image` is that of the query, if any.
    """
    rows = ceil(len(hits) / COLUMNS)
    width = 2 * MARGIN + COLUMNS * (SIDE + GAP) - GAP
    height = 2 * MARGIN + HEAD + rows * CELL - GAP
    paper = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(paper)
    left = MARGIN
    path = findfont("DejaVu Sans")
    large = ImageFont.truetype(path, 22)
    small = ImageFont.truetype(path, 13)
    if image is not None:
        _paste(paper, pen, image, MARGIN, MARGIN, HEAD - GAP)
        left += HEAD
    text = f"{len(hits):,} of {len(index):,} images of {index.info.source.name}, {order}"
    pen.text((left, MARGIN - 1), sanitize(title, 80), INK, large)
    pen.text((left, MARGIN + 27), sanitize(text), QUIET, small)
    for number, hit in enumerate(hits):
        row, column = divmod(number, COLUMNS)
        left = MARGIN + column * (SIDE + GAP)
        top = MARGIN + HEAD + row * CELL
        shown = _read(index, hit)
        _paste(paper, pen, shown, left, top, SIDE)
        caption = sanitize(f"{hit.score:.3f}  {hit.caption or hit.key}")
        most = LINES - bool(hit.copies)
        lines = wrap(caption, LETTERS, max_lines=most, placeholder="…")
        if hit.copies:
            lines.append(f"and {len(hit.copies):,} more")
        below = (left, top + SIDE + 5)
        pen.text(below, "\n".join(lines), INK, small, spacing=2)
    return paper


def _read(index: Index, hit: Hit) -> Image.Image:
    """Read the image of a hit; raises `UserError` with what to do if the source no longer has it."""
    try:
        return index.image(hit.id)
    except UserError as error:
        remedy = f"Give the new path of the images, or update the index: declip embed MODEL SOURCE --out {index.folder}"
        raise UserError(
            f"The contact sheet needs the image '{printable(hit.key)}'. {error} {remedy}."
        ) from error


def _paste(
    paper: Image.Image,
    pen: ImageDraw.ImageDraw,
    image: Image.Image,
    left: int,
    top: int,
    side: int,
) -> None:
    """Draw an image into the middle of a framed square."""
    frame = (left - 1, top - 1, left + side, top + side)
    pen.rectangle(frame, fill="white", outline=FRAME)
    small = ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS)
    across = (side - small.width) // 2
    down = (side - small.height) // 2
    paper.paste(small, (left + across, top + down))
