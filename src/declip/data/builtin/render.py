"""Render an SVG document to a square image that the drawing fills, over white."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image

from declip.errors import UserError

OVERSIZE = 2  # drawn larger by this factor, so that cutting off the margins costs no sharpness
INVISIBLE = 250  # a drawing whose darkest value is above this is invisible on white, and is left out
DOTS_PER_INCH = 90  # the inch of editors of the 2000s; pages in millimeters come from them
LONGEST_SIDE = 4096  # pixels; a drawing that takes less than a twentieth of its page stays a little blurred


def renderer() -> Callable[..., bytes]:
    """The SVG renderer, resvg."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise UserError("resvg-py is needed once, to render the images: `pip install resvg-py`.") from error
    return svg_to_bytes


def draw(svg: str, side: int = 0) -> Image.Image:
    """Render an SVG document over white, at its own size or scaled to fit a square of `side` pixels."""
    size = {"width": side, "height": side, "dpi": DOTS_PER_INCH} if side else {}
    # Few drawings hold text, and looking through the system's fonts would take ten times as long as drawing.
    png = renderer()(svg_string=svg, background="#ffffff", skip_system_fonts=True, **size)
    with Image.open(BytesIO(bytes(png)), formats=["PNG"]) as image:
        return image.convert("RGB")


def rasterize_page(svg: str, side: int) -> np.ndarray:
    """Render a drawing that takes a part of its page only: drawn again, larger, when it comes out small."""
    page = draw(svg, OVERSIZE * side)
    left, top, right, bottom = _inked_box(page)
    longest = max(right - left, bottom - top)
    if longest < side:
        page = draw(svg, min(LONGEST_SIDE, max(page.size) * OVERSIZE * side // longest))
    return fill_square(page, side)


def fill_square(image: Image.Image, side: int) -> np.ndarray:
    """Cut off the white margins, of 1 to 35 %, and let the rest fill the square: uint8 (side, side, 3)."""
    part = image.crop(_inked_box(image))
    longest = max(part.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(part, ((longest - part.width) // 2, (longest - part.height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def _inked_box(image: Image.Image) -> tuple[int, int, int, int]:
    inked = np.asarray(image).min(axis=2) <= INVISIBLE
    return Image.fromarray(inked).getbbox() or (0, 0, *image.size)
