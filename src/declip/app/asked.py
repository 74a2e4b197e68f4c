"""Reading what a request asks for, and saying what is wrong with it."""

from collections.abc import Mapping
from http import HTTPStatus

from starlette.exceptions import HTTPException
from torch import Tensor

from declip.app.gallery import Gallery
from declip.data.pair import is_unicode
from declip.search.store import Over

LONGEST_TEXT = 2_000
"""Characters of a text that is searched for, or of a template."""

LARGEST_ID = 2**62


def wrong(message: str) -> HTTPException:
    """The answer to a request that asks for what cannot be."""
    return HTTPException(HTTPStatus.BAD_REQUEST, message)


def whole(given: Mapping[str, str], name: str, usual: int, low: int, high: int) -> int:
    """A whole number among a request's parameters; raises `HTTPException` where it is none or out of its range."""
    text = given.get(name, str(usual))
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
        raise wrong(f"{name} must be a whole number from {low:,} to {high:,}.")
    return int(text)


def number(given: Mapping[str, str], name: str, usual: float, low: float, high: float) -> float:
    """A number among a request's parameters; raises `HTTPException` where it is none or out of its range."""
    try:
        value = float(given.get(name, usual))
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise wrong(f"{name} must be a number from {low:g} to {high:g}.")
    return value


def choice(given: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    """One of some words, the first where none is given; raises `HTTPException` for another one."""
    value = given.get(name, allowed[0])
    if value not in allowed:
        raise wrong(f"{name} must be one of {', '.join(allowed)}.")
    return value


def over(given: Mapping[str, str]) -> Over:
    """What a request wants to compare with; raises `HTTPException` where it is neither images nor captions."""
    return "captions" if choice(given, "over", ("images", "captions")) == "captions" else "images"


def words(value: object, what: str, longest: int = LONGEST_TEXT) -> str:
    """A text without white space around it, perhaps empty; raises `HTTPException` where it is none or too long."""
    if not isinstance(value, str) or not is_unicode(value):
        raise wrong(f"The {what} must be a text.")
    text = " ".join(value.split())
    if len(text) > longest:
        raise wrong(f"The {what} is too long: at most {longest:,} characters.")
    return text


def template(value: object) -> str | None:
    """A template, None where it is empty; raises `HTTPException` where it has no ``{}`` though it has spaces."""
    text = words(value, "template", 300)
    if text and "{}" not in text and " " in text:
        raise wrong("The template needs {} where the words go, such as: a drawing of {}")
    return text or None


def picture(gallery: Gallery, token: object, id: object) -> Tensor | None:
    """The vector of the picture that is meant, (d,), None where none is.

    Args:
        gallery: Where it is looked for.
        token: Of a picture that was sent.
        id: Of an image of the index.

    Raises:
        HTTPException: It is not held any more.
        UserError: There is no such image.
    """
    if isinstance(token, str) and token:
        vector = gallery.kept.get(token)
        if vector is None:
            raise HTTPException(HTTPStatus.GONE, "The picture is no longer held here. Choose it again.")
        return vector
    if id is None or id == "":
        return None
    return gallery.index.vectors([whole({"id": str(id)}, "id", 0, 0, LARGEST_ID)])[0]
