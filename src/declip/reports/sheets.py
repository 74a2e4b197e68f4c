"""The contact sheet of a search: what was found, in one image."""

from collections.abc import Sequence
from functools import lru_cache
from textwrap import wrap

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from declip.errors import UserError
from declip.io.text import shown
from declip.search.index import Hit, Index

COLUMNS = 8
SIDE, GAP, MARGIN, HEAD = 148, 16, 28, 60
"""Pixels: of an image, between two, around all, from the margin to the first row."""

LETTER, LINE, LINES, LETTERS = 13, 17, 3, 19
"""Pixels of letters and from line to line; lines of a caption, and letters that fit into one."""

CELL = SIDE + LINES * LINE + GAP
WIDTH = 2 * MARGIN + COLUMNS * SIDE + (COLUMNS - 1) * GAP

INK, QUIET, PAPER, FRAME = "#1c2127", "#5b6470", "#fbfaf7", "#d9d5cc"


def search_sheet(index: Index, hits: Sequence[Hit], title: str, image: Image.Image | None = None) -> Image.Image:
    """Draw the hits of a search, the best first, each with its score and its caption, or its key.

    DejaVu Sans lacks the scripts of East and South Asia.

    Args:
        title: The query in words.
        image: The query image, if any.
    """
    height = -(-len(hits) // COLUMNS) * CELL - GAP
    paper = Image.new("RGB", (WIDTH, 2 * MARGIN + HEAD + height), PAPER)
    pen, left = ImageDraw.Draw(paper), MARGIN
    if image is not None:
        _paste(paper, pen, image, MARGIN, MARGIN, HEAD - GAP)
        left += HEAD
    name = index.manifest.source.name
    text = f"{len(hits):,} of {len(index):,} images of {name}, the most similar first, with cosines"
    pen.text((left, MARGIN - 1), shown(title, 80), INK, font(22))
    pen.text((left, MARGIN + 27), shown(text), QUIET, font(LETTER))
    for place, hit in enumerate(hits):
        row, column = divmod(place, COLUMNS)
        left, top = MARGIN + column * (SIDE + GAP), MARGIN + HEAD + row * CELL
        _paste(paper, pen, _indexed(index, hit), left, top, SIDE)
        caption = shown(f"{hit.score:.3f}  {hit.caption or hit.key}")
        lines = wrap(caption, LETTERS, max_lines=LINES, placeholder="…")
        pen.text((left, top + SIDE + 5), "\n".join(lines), INK, font(LETTER), spacing=2)
    return paper


def _paste(
    paper: Image.Image, pen: ImageDraw.ImageDraw, image: Image.Image | None, left: int, top: int, side: int
) -> None:
    """Paste an image into a frame, which is left empty where there is none."""
    pen.rectangle((left - 1, top - 1, left + side, top + side), fill="white", outline=FRAME)
    if image is not None:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        paper.paste(small, (left + (side - small.width) // 2, top + (side - small.height) // 2))


@lru_cache(maxsize=4)
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans in a size; matplotlib ships it, so that the sheet looks the same everywhere."""
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def _indexed(index: Index, hit: Hit) -> Image.Image | None:
    try:
        return index.image(hit.id)
    except UserError:
        return None
