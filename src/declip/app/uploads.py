"""What a browser sends: a picture or some JSON, bounded before it is read, and never written to the disk."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request

from declip.data.images.decode import decode
from declip.data.pair import BrokenPair

LARGEST_PICTURE = 20 << 20
"""Bytes of a picture that is sent."""

MOST_PIXELS = 50_000_000
"""Of a picture that is sent: what cameras and phones make."""

LARGEST_JSON = 2 << 20
"""Bytes: the ids of 200,000 pairs."""

SECONDS = 60
"""What a body may take to arrive."""

WRONG = {
    "unreadable image": "This is no picture that can be read. JPEG, PNG, WebP, BMP, GIF and TIFF can.",
    "truncated image": "The picture ends too early: the file is cut short or empty.",
    "image too large": f"The picture has too many pixels: at most {MOST_PIXELS // 1_000_000} million.",
}


async def read_body(request: Request, most: int) -> bytes:
    """Read a body of at most `most` bytes.

    Raises:
        HTTPException: 413 where it is longer, as far as its header says before a byte is read; 408 where it is slow.
    """
    told = request.headers.get("content-length", "0")
    if not (told.isdecimal() and len(told) < 20) or int(told) > most:
        raise _too_long(most)
    content = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > most:
                    raise _too_long(most)
    except TimeoutError:
        raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, "The file took too long to arrive.") from None
    return bytes(content)


async def read_json(request: Request) -> dict[str, Any]:
    """Read a JSON object; raises `HTTPException` where it is none, or too long."""
    content = await read_body(request, LARGEST_JSON)
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise HTTPException(HTTPStatus.BAD_REQUEST, "A JSON object was expected.")
    return tree


def read_picture(content: bytes) -> Image.Image:
    """Decode a picture that was sent, RGB and upright, its pixels counted first.

    Raises:
        HTTPException: 422 with what is wrong.
    """
    try:
        return decode(content, "the picture", MOST_PIXELS)
    except BrokenPair as broken:
        said = WRONG.get(broken.reason, WRONG["unreadable image"])
        raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, said) from broken


def _too_long(most: int) -> HTTPException:
    return HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The file is too large: at most {most >> 20} MB.")
