"""Drawings as pixels: from an SVG document to a square that the drawing fills, over white."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image

from declip.errors import UserError

OVERSIZE = 2
"""Drawn larger by this factor, so that cutting off the margins costs no sharpness."""

INVISIBLE = 250
"""A drawing whose darkest value is above this shows nothing on white, and is left out."""

Draw = Callable[[str], bytes]
"""From an SVG document to a PNG file."""

DrawWithin = Callable[[str, int], bytes]
"""The same, scaled to fit into a square of so many pixels."""

DOTS_PER_INCH = 90
"""What the editors of the 2000s took an inch for; pages in millimetres come from them."""

LONGEST_SIDE = 4096
"""Pixels. A drawing that takes less than a twentieth of its page stays a little blurred."""


def drawer() -> Draw:
    """The renderer of SVG drawings, resvg, at the size that the document tells.

    Raises:
        UserError: resvg-py is not installed.
    """
    render = _resvg()
    # Few drawings hold text, and looking through the system's fonts would take ten times as long as drawing.
    return lambda svg: bytes(render(svg_string=svg, background="#ffffff", skip_system_fonts=True))


def page_drawer() -> DrawWithin:
    """The renderer for documents of any size.

    Raises:
        UserError: resvg-py is not installed.
    """
    render = _resvg()

    def draw(svg: str, side: int) -> bytes:
        size = {"width": side, "height": side, "dpi": DOTS_PER_INCH}
        return bytes(render(svg_string=svg, background="#ffffff", skip_system_fonts=True, **size))

    return draw


def _resvg() -> Callable[..., bytes]:
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise UserError("resvg-py is needed once, to draw the pictures: `pip install resvg-py`.") from error
    return svg_to_bytes


def rasterise(svg: str, draw: Draw, side: int) -> np.ndarray:
    """Draw an SVG document over white and let the drawing fill the square: uint8 (side, side, 3)."""
    return fill_square(_decoded(draw(svg)), side)


def rasterise_page(svg: str, draw: DrawWithin, side: int) -> np.ndarray:
    """The same for a drawing that takes a part of its page only: drawn again, larger, when it comes out small.

    Raises:
        ValueError: The document cannot be drawn.
    """
    page = _decoded(draw(svg, OVERSIZE * side))
    if (box := _inked_box(page)) is None:
        return fill_square(page, side)
    longest = max(box[2] - box[0], box[3] - box[1])
    if longest < side:
        page = _decoded(draw(svg, min(LONGEST_SIDE, max(page.size) * OVERSIZE * side // longest)))
    return fill_square(page, side)


def _decoded(png: bytes) -> Image.Image:
    with Image.open(BytesIO(png), formats=["PNG"]) as image:
        return image.convert("RGB")


def fill_square(picture: Image.Image, side: int) -> np.ndarray:
    """Cut off the white margins and let what is left fill the square: uint8 (side, side, 3).

    Designers leave margins of 1 to 35 % around their drawings. A model would be measured on these as much as on the
    drawings, so all get the same: none.
    """
    if (box := _inked_box(picture)) is None:
        return np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS))
    part = picture.crop(box)
    longest = max(part.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(part, ((longest - part.width) // 2, (longest - part.height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def _inked_box(picture: Image.Image) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of what is not white; None where nothing is."""
    inked = np.asarray(picture).min(axis=2) <= INVISIBLE
    if not inked.any():
        return None
    rows, columns = (np.flatnonzero(inked.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
