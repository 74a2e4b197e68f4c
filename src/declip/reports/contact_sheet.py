"""The contact sheet: pairs to look at in one picture."""

from collections.abc import Sequence
from functools import lru_cache

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from declip.inspection.result import Inspection
from declip.io.text import shown
from declip.reports.inspection_tables import extent

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
    pen.text((MARGIN, MARGIN), fit(shown(inspection.name), font(22), width - 2 * MARGIN)[0], INK, font(22))
    said = extent(inspection) if rows else "No pair can be used."
    pen.text((MARGIN, MARGIN + 28), said, QUIET, font(LETTER))
    top = MARGIN + 60
    for row in rows:
        draw_row(paper, pen, [(example.image, example.caption) for example in row], top)
        top += cell
    if near:
        pen.text((MARGIN, top + 10), "Images that look alike, a group a row", INK, font(16))
        top += 44
    for row in near:
        draw_row(paper, pen, [(example.image, example.caption) for example in row], top)
        top += cell
    return paper


def draw_row(
    paper: Image.Image, pen: ImageDraw.ImageDraw, row: Sequence[tuple[Image.Image | None, str]], top: int
) -> None:
    """Draw pictures side by side with their captions below; a frame is left empty where there is no picture."""
    for place, (image, caption) in enumerate(row):
        left = MARGIN + place * (SIDE + GAP)
        pen.rectangle((left - 1, top - 1, left + SIDE, top + SIDE), fill="white", outline=FRAME)
        if image is not None:
            small = image.copy()
            small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            paper.paste(small, (left + (SIDE - small.width) // 2, top + (SIDE - small.height) // 2))
        for number, line in enumerate(fit(shown(caption), font(LETTER), SIDE, LINES)):
            pen.text((left, top + SIDE + 5 + number * LINE), line, INK, font(LETTER))


def fit(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int = 1) -> list[str]:
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
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans in a size."""
    # Matplotlib brings this font with it, so that the sheet looks the same everywhere.
    return ImageFont.truetype(findfont("DejaVu Sans"), size)
