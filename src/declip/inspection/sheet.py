"""The contact sheet: pairs to look at in one picture."""

from functools import lru_cache

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from declip.inspection.result import Example, Inspection
from declip.inspection.wording import extent, shown

COLUMNS = 8
SIDE, GAP, MARGIN = 148, 16, 28
"""Pixels: of an image, between two, around all."""

LETTER, LINE, LINES = 13, 17, 3
"""Pixels: of letters, from line to line; lines of a caption."""

INK, QUIET, PAPER, FRAME = "#1c2127", "#5b6470", "#fbfaf7", "#d9d5cc"


def sheet(inspection: Inspection) -> Image.Image:
    """Draw the pairs of an inspection with their captions, then rows of images that look alike.

    Args:
        inspection: What was found.

    Returns:
        An RGB picture. DejaVu Sans writes it, which lacks the scripts of East and South Asia; the page has them.
    """
    rows = [inspection.examples[at : at + COLUMNS] for at in range(0, len(inspection.examples), COLUMNS)]
    near = inspection.near_examples
    cell = SIDE + LINES * LINE + GAP
    width = 2 * MARGIN + COLUMNS * SIDE + (COLUMNS - 1) * GAP
    height = 2 * MARGIN + 52 + (len(rows) + len(near)) * cell + (44 if near else 0)
    paper = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(paper)
    pen.text((MARGIN, MARGIN), _fit(shown(inspection.name), _font(22), width - 2 * MARGIN)[0], INK, _font(22))
    said = extent(inspection) if rows else "No pair can be used."
    pen.text((MARGIN, MARGIN + 28), said, QUIET, _font(LETTER))
    top = MARGIN + 60
    for row in rows:
        _row(paper, pen, row, top)
        top += cell
    if near:
        pen.text((MARGIN, top + 10), "Images that look alike, a group a row", INK, _font(16))
        top += 44
    for row in near:
        _row(paper, pen, row, top)
        top += cell
    return paper


def _row(paper: Image.Image, pen: ImageDraw.ImageDraw, row: tuple[Example, ...], top: int) -> None:
    for place, example in enumerate(row):
        left = MARGIN + place * (SIDE + GAP)
        small = example.image.copy()
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        pen.rectangle((left - 1, top - 1, left + SIDE, top + SIDE), fill="white", outline=FRAME)
        paper.paste(small, (left + (SIDE - small.width) // 2, top + (SIDE - small.height) // 2))
        for number, line in enumerate(_fit(shown(example.caption), _font(LETTER), SIDE, LINES)):
            pen.text((left, top + SIDE + 5 + number * LINE), line, INK, _font(LETTER))


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int = 1) -> list[str]:
    """Break a text into lines of a width; a word that is too long is broken, what is left over is cut off."""
    found = [""]
    for word in text.split():
        while word:
            joined = f"{found[-1]} {word}".lstrip()
            if font.getlength(joined) <= width:
                found[-1], word = joined, ""
            elif found[-1]:
                found.append("")
            else:
                fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                found[-1], word = word[:fits], word[fits:]
                found.append("")
    found = [line for line in found if line]
    if len(found) > lines:
        last = found[lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        found = [*found[: lines - 1], last.rstrip() + "…"]
    return found or [""]


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Matplotlib brings this font with it, so that the sheet looks the same everywhere.
    return ImageFont.truetype(findfont("DejaVu Sans"), size)
