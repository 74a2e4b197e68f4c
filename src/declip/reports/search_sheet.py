"""The contact sheet of a search: what was asked for, and what was found, to look at in one picture."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from declip.errors import UserError
from declip.io.text import shown
from declip.reports.contact_sheet import (
    COLUMNS,
    FRAME,
    GAP,
    INK,
    LETTER,
    LINE,
    LINES,
    MARGIN,
    PAPER,
    QUIET,
    SIDE,
    draw_row,
    fit,
    font,
)
from declip.search.index import Hit, Index

HEAD = 60
"""Pixels from the margin to the first row; a picture that was asked with stands beside it, as high."""


def sheet(index: Index, hits: Sequence[Hit], title: str, image: Image.Image | None = None) -> Image.Image:
    """Draw what was found, the best first, each with its score and its caption, or its key where it has none.

    Args:
        index: Where it was found.
        hits: What was found.
        title: What was asked for, in words.
        image: The picture that was asked with, if any.

    Returns:
        An RGB picture. DejaVu Sans writes it, which lacks the scripts of East and South Asia.
    """
    cells = [(_picture(index, hit), f"{hit.score:.3f}  {hit.caption or hit.key}") for hit in hits]
    rows = [cells[at : at + COLUMNS] for at in range(0, len(cells), COLUMNS)]
    cell = SIDE + LINES * LINE + GAP
    width = 2 * MARGIN + COLUMNS * SIDE + (COLUMNS - 1) * GAP
    paper = Image.new("RGB", (width, 2 * MARGIN + HEAD + len(rows) * cell - GAP), PAPER)
    pen = ImageDraw.Draw(paper)
    left = MARGIN
    if image is not None:
        small = image.copy()
        small.thumbnail((HEAD - GAP, HEAD - GAP), Image.Resampling.LANCZOS)
        paper.paste(small, (MARGIN, MARGIN))
        pen.rectangle((MARGIN - 1, MARGIN - 1, MARGIN + small.width, MARGIN + small.height), outline=FRAME)
        left += small.width + GAP
    pen.text((left, MARGIN - 2), fit(shown(title), font(22), width - left - MARGIN)[0], INK, font(22))
    said = f"{len(hits):,} of {len(index):,} images of {index.manifest.source.name}, the most alike first, with cosines"
    pen.text((left, MARGIN + 27), fit(shown(said), font(LETTER), width - left - MARGIN)[0], QUIET, font(LETTER))
    for number, row in enumerate(rows):
        draw_row(paper, pen, row, MARGIN + HEAD + number * cell)
    return paper


def _picture(index: Index, hit: Hit) -> Image.Image | None:
    try:
        return index.picture(hit.id)
    except UserError:
        return None
