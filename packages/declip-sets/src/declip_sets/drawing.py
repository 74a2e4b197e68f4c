"""SVG drawings rendered to square images that they fill, over white."""

from collections.abc import Callable
from functools import lru_cache, reduce
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from declip.errors import UserError
from declip_sets.fetch import read_json

OVERSIZE = 2  # drawn larger by this factor, so that cutting off the margins costs no sharpness
INVISIBLE = 250  # a drawing whose darkest value is above this is invisible on white
# The inch of editors of the 2000s; pages in millimeters come from them.
DOTS_PER_INCH = 90
# In pixels; a drawing that takes less than a twentieth of its page stays a little blurred.
LONGEST_SIDE = 4096

NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
VIEW_BOX = ("left", "top", "width", "height")
DEFAULT_VIEW_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


def renderer() -> Callable[..., bytes]:
    """The SVG renderer, resvg."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        problem = "resvg-py is needed once, to render the images"
        raise UserError(f"{problem}: `pip install resvg-py`.") from error
    return svg_to_bytes


def draw(svg: str, side: int = 0) -> Image.Image:
    """Render an SVG over white, at its own size or scaled to fit a square of `side` pixels."""
    options: dict[str, Any] = {"background": "#ffffff"}
    # Few drawings hold text, and reading the system's fonts takes ten times as long as drawing.
    options["skip_system_fonts"] = True
    if side:
        options |= {"width": side, "height": side, "dpi": DOTS_PER_INCH}
    png = renderer()(svg_string=svg, **options)
    with Image.open(BytesIO(bytes(png)), formats=["PNG"]) as image:
        return image.convert("RGB")


def rasterize_page(svg: str, side: int) -> np.ndarray:
    """Render a drawing that takes a part of its page: again and larger where it is small."""
    page = draw(svg, OVERSIZE * side)
    left, top, right, bottom = inked_box(page)
    longest = max(right - left, bottom - top)
    if longest < side:
        larger = max(page.size) * OVERSIZE * side // longest
        page = draw(svg, min(LONGEST_SIDE, larger))
    return fill_square(page, side)


def fill_square(image: Image.Image, side: int) -> np.ndarray:
    """Cut off white margins (1 to 35 %) and scale the rest to a square: uint8 (side, side, 3)."""
    part = image.crop(inked_box(image))
    longest = max(part.size)
    square = Image.new("RGB", (longest, longest), "white")
    left = (longest - part.width) // 2
    top = (longest - part.height) // 2
    square.paste(part, (left, top))
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def inked_box(image: Image.Image) -> tuple[int, int, int, int]:
    """The box of all that is visible, as (left, top, right, bottom); the image if nothing is."""
    darkest = reduce(ImageChops.darker, image.split())
    ink = darkest.point(lambda value: value <= INVISIBLE)
    return ink.getbbox() or (0, 0, *image.size)


# Caches the set that was read last: drawings are rendered set by set.
read_icons = lru_cache(maxsize=1)(read_json)


def draw_icon(file: Path, name: str, side: int) -> np.ndarray:
    """Render an icon of a set's file to fill the square, its shape kept: uint8 (side, side, 3)."""
    icons = read_icons(file)
    icon = DEFAULT_VIEW_BOX | icons | icons["icons"][name]
    box = " ".join(str(icon[key]) for key in VIEW_BOX)
    page = OVERSIZE * side
    head = f'<svg {NAMESPACES} width="{page}" height="{page}" viewBox="{box}">'
    image = draw(head + icon["body"] + "</svg>")
    return fill_square(image, side)
