"""Contact sheets: pairs of an inspection, or what a search found, in one image."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from declip.errors import UserError
from declip.inspection.result import Inspection
from declip.io.atomic import atomic_write
from declip.io.text import shown
from declip.search.index import Hit, Index

COLUMNS = 8
SIDE, GAP, MARGIN, HEAD = 148, 16, 28, 60
"""Pixels: of an image, between two, around all, from the margin to the first row."""

LETTER, LINE, LINES = 13, 17, 3
"""Pixels: of letters, from line to line; lines of a caption."""

CELL = SIDE + LINES * LINE + GAP
WIDTH = 2 * MARGIN + COLUMNS * SIDE + (COLUMNS - 1) * GAP
BETWEEN = 44
"""Pixels of the heading between the two parts of an inspection's sheet."""

INK, QUIET, PAPER, FRAME = "#1c2127", "#5b6470", "#fbfaf7", "#d9d5cc"

Cells = Sequence[tuple[Image.Image | None, str]]


def inspection_sheet(inspection: Inspection, extent: str) -> Image.Image:
    """Draw the examples of an inspection with their captions, then rows of images that look alike.

    DejaVu Sans lacks the scripts of East and South Asia; the page has them.
    """
    rows, near = _rows([(each.image, each.caption) for each in inspection.examples]), inspection.near_examples
    height = (len(rows) + len(near)) * CELL + (BETWEEN if near else 0)
    said = extent if rows else "No pair can be used."
    paper, pen = _paper(inspection.name, said, height - 8)
    top = _draw_rows(paper, pen, rows, MARGIN + HEAD)
    if near:
        pen.text((MARGIN, top + 10), "Images that look alike, one group per row", INK, font(16))
        _draw_rows(paper, pen, [[(each.image, each.caption) for each in row] for row in near], top + BETWEEN)
    return paper


def search_sheet(index: Index, hits: Sequence[Hit], title: str, image: Image.Image | None = None) -> Image.Image:
    """Draw the hits of a search, the best first, each with its score and its caption, or its key.

    Args:
        title: The query in words.
        image: The query image, if any.
    """
    rows = _rows([(_indexed(index, hit), f"{hit.score:.3f}  {hit.caption or hit.key}") for hit in hits])
    said = (
        f"{len(hits):,} of {len(index):,} images of {index.manifest.source.name}, the most similar first, with cosines"
    )
    paper, pen = _paper(title, said, len(rows) * CELL - GAP, image)
    _draw_rows(paper, pen, rows, MARGIN + HEAD)
    return paper


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image as PNG; raises `UserError` where that cannot be done."""
    with atomic_write(path.expanduser(), "choose another place") as beside:
        image.save(beside, "PNG")


def _paper(
    title: str, said: str, height: int, image: Image.Image | None = None
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    paper = Image.new("RGB", (WIDTH, 2 * MARGIN + HEAD + height), PAPER)
    pen, left = ImageDraw.Draw(paper), MARGIN
    if image is not None:
        small = image.copy()
        small.thumbnail((HEAD - GAP, HEAD - GAP), Image.Resampling.LANCZOS)
        paper.paste(small, (MARGIN, MARGIN))
        pen.rectangle((MARGIN - 1, MARGIN - 1, MARGIN + small.width, MARGIN + small.height), outline=FRAME)
        left += small.width + GAP
    pen.text((left, MARGIN - 1), fit(shown(title), font(22), WIDTH - left - MARGIN)[0], INK, font(22))
    pen.text((left, MARGIN + 27), fit(shown(said), font(LETTER), WIDTH - left - MARGIN)[0], QUIET, font(LETTER))
    return paper, pen


def _rows(cells: Cells) -> list[Cells]:
    return [cells[at : at + COLUMNS] for at in range(0, len(cells), COLUMNS)]


def _draw_rows(paper: Image.Image, pen: ImageDraw.ImageDraw, rows: Sequence[Cells], top: int) -> int:
    """Draw rows of images with captions below; a frame is left empty where there is no image. Returns the end."""
    for number, row in enumerate(rows):
        y = top + number * CELL
        for place, (image, caption) in enumerate(row):
            left = MARGIN + place * (SIDE + GAP)
            pen.rectangle((left - 1, y - 1, left + SIDE, y + SIDE), fill="white", outline=FRAME)
            if image is not None:
                small = image.copy()
                small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                paper.paste(small, (left + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))
            for line, words in enumerate(fit(shown(caption), font(LETTER), SIDE, LINES)):
                pen.text((left, y + SIDE + 5 + line * LINE), words, INK, font(LETTER))
    return top + len(rows) * CELL


def fit(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int = 1) -> list[str]:
    """Break a text into lines of a width; a word that is too long is broken, the rest is cut off."""
    broken = [""]
    for word in text.split():
        while word:
            joined = f"{broken[-1]} {word}".lstrip()
            if font.getlength(joined) <= width:
                broken[-1], word = joined, ""
            elif broken[-1]:
                broken.append("")
            else:
                fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                broken[-1], word = word[:fits], word[fits:]
                broken.append("")
    broken = [line for line in broken if line]
    if len(broken) > lines:
        last = broken[lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        broken = [*broken[: lines - 1], last.rstrip() + "…"]
    return broken or [""]


@lru_cache(maxsize=4)
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans in a size; matplotlib ships it, so that the sheet looks the same everywhere."""
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def _indexed(index: Index, hit: Hit) -> Image.Image | None:
    try:
        return index.image(hit.id)
    except UserError:
        return None
