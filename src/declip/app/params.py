"""Parameters and bodies of requests: bounded before they are read, never written to the disk, refused with a reason."""

import asyncio
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from torch import Tensor

from declip.app.state import AppState
from declip.data.images.decode import decode
from declip.data.pair import BrokenPair, is_unicode
from declip.search.manifest import Over

LONGEST_TEXT, LONGEST_TEMPLATE = 2_000, 300  # characters
LARGEST_ID = 2**62

LARGEST_UPLOAD, LARGEST_JSON = 20 << 20, 2 << 20  # bytes of an uploaded image, and of JSON: the ids of 200,000 pairs
MOST_PIXELS = 50_000_000  # pixels of an uploaded image: larger than those of cameras and phones
SECONDS = 60  # time in which a body must arrive
UNREADABLE = "This is no image that can be read. JPEG, PNG, WebP, BMP, GIF and TIFF can."
REASONS = {
    "truncated image": "The image ends too early: the file is truncated or empty.",
    "image too large": f"The image has too many pixels: at most {MOST_PIXELS // 1_000_000} million.",
}


def bad_request(message: str) -> HTTPException:
    """The error for a request with a wrong parameter."""
    return HTTPException(HTTPStatus.BAD_REQUEST, message)


def whole(given: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """A whole number in its range."""
    text = str(given.get(name, default))
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
        raise bad_request(f"{name} must be a whole number from {low:,} to {high:,}.")
    return int(text)


def image_id(given: Mapping[str, Any]) -> int:
    """The id of an image of the index, which need not exist."""
    return whole(given, "id", 0, 0, LARGEST_ID)


def number(given: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    """A number in its range."""
    try:
        value = float(given.get(name, default))
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise bad_request(f"{name} must be a number from {low:g} to {high:g}.")
    return value


def choice(given: Mapping[str, str], name: str, *allowed: str) -> str:
    """One of some words; the first is the default."""
    value = given.get(name, allowed[0])
    if value not in allowed:
        raise bad_request(f"{name} must be one of {', '.join(allowed)}.")
    return value


def over(given: Mapping[str, str]) -> Over:
    """The vectors to compare with."""
    return "captions" if choice(given, "over", "images", "captions") == "captions" else "images"


def text(value: object, name: str, longest: int = LONGEST_TEXT) -> str:
    """A text without surrounding white space, perhaps empty."""
    if not isinstance(value, str) or not is_unicode(value):
        raise bad_request(f"The {name} must be a text.")
    words = " ".join(value.split())
    if len(words) > longest:
        raise bad_request(f"The {name} is too long: at most {longest:,} characters.")
    return words


def template(value: object) -> str | None:
    """A prompt template or the name of a set; None where it is empty."""
    words = text(value, "template", LONGEST_TEMPLATE)
    if "{}" not in words and " " in words:
        raise bad_request("The template needs {} where the words go, such as: a drawing of {}")
    return words or None


def image_vector(state: AppState, given: Mapping[str, Any]) -> Tensor | None:
    """(d,), the vector of the uploaded image ("image", a token) or of the index's image ("id"); None without either."""
    if token := given.get("image"):
        if str(token) not in state.uploads:
            raise HTTPException(HTTPStatus.GONE, "The image is no longer held here. Choose it again.")
        return state.uploads[str(token)]
    if given.get("id") in (None, ""):
        return None
    return state.index.vectors([image_id(given)])[0]


async def read_body(request: Request, most: int) -> bytes:
    """Read a body of at most `most` bytes; starlette's forms would write a large one to the disk."""
    too_long = HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The file is too large: at most {most >> 20} MB.")
    if int(request.headers.get("content-length", 0)) > most:  # the server has checked that it is a number
        raise too_long
    content = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > most:
                    raise too_long
    except TimeoutError:
        raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, "The file took too long to arrive.") from None
    return bytes(content)


async def read_json(request: Request) -> dict[str, Any]:
    """Read a JSON object."""
    content = await read_body(request, LARGEST_JSON)
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise bad_request("A JSON object was expected.")
    return tree


def read_image(content: bytes) -> Image.Image:
    """Decode an uploaded image, RGB and upright; its pixels are counted before they are decoded."""
    try:
        return decode(content, "the image", MOST_PIXELS)
    except BrokenPair as broken:
        message = REASONS.get(broken.reason, UNREADABLE)
        raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, message) from broken
