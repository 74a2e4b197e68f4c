"""Checks of what a user gives to classify and search."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from declip.data.images.decode import Picture, read_picture
from declip.errors import UserError
from declip.io.atomic import csv_path
from declip.io.outputs import check_outputs


def read_classes(given: str | Path | Sequence[str]) -> list[str]:
    """Read class names from a list, a text with commas, or the lines of a file; at least two different ones."""
    if not isinstance(given, str | Path):
        names = list(given)
    elif not str(given).strip():
        names = []
    elif "," in str(given) and not os.path.isfile(os.path.expanduser(given)):
        names = str(given).split(",")
    else:
        try:
            names = Path(given).expanduser().read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"The classes '{given}' cannot be read: {error}. Give a text file with one class per line, or names "
                "separated by commas."
            ) from error
    spaced = (" ".join(str(name).split()) for name in names)
    distinct = [name for name in dict.fromkeys(spaced) if name]
    if len(distinct) < 2:
        only = ""
        if distinct:
            only = f": {distinct[0]!r}"
        raise UserError(f"Give two classes or more, not {len(distinct)}{only}.")
    return distinct


def check_classes(
    classes: str | Path | Sequence[str] | None,
    examples: object,
    head: object,
    out: str | Path | None,
    overwrite: bool = False,
) -> list[str] | None:
    """Read the names of classes, if any; refuse options that cannot be combined, and outputs that cannot be written."""
    if head is not None and (classes is not None or examples is not None):
        raise UserError("A head (--head) has its own classes. Leave out --classes and --examples.")
    if head is None and classes is None and examples is None:
        raise UserError(
            "Name the classes with --classes, or give examples of them with --examples or --head."
        )
    if isinstance(head, str | Path) and not Path(head).expanduser().is_file():
        raise UserError(
            f"There is no head '{head}'. Make one: declip classify MODEL IMAGES --examples … --save {head}."
        )
    names = None
    if classes is not None:
        names = read_classes(classes)
    table = None
    if out is not None:
        table = csv_path(out)
    check_outputs((table,), overwrite)
    return names


def read_query(
    text: str | Picture | None, image: Picture | None, weights: tuple[float, float]
) -> tuple[str, Image.Image | None]:
    """Read the text and image of a query; an image may be given as the text. Refuse an empty one and other weights."""
    if not isinstance(text, str | None):
        if image is not None or isinstance(text, list | tuple):
            several = "encode several by the model, and call `nearest`"
            raise UserError(
                f"search takes one text and one image, not a {type(text).__name__}; {several}."
            )
        image = text
        text = None
    text = (text or "").strip()
    if not text and image is None:
        raise UserError("Nothing to search for. Give a text, an image (--image FILE), or both.")
    if len(weights) != 2 or not all(map(math.isfinite, weights)):
        raise UserError(
            f"weights is {weights}; give two numbers, of text and image, such as 0.7,0.3."
        )
    picture = None
    if image is not None:
        picture = read_picture(image)
    return text, picture


def parse_where(given: Sequence[str]) -> dict[str, list[str]]:
    """Read texts COLUMN=VALUE: the values that are accepted, by column."""
    wanted: dict[str, list[str]] = {}
    for text in given:
        column, sign, value = text.partition("=")
        if not column.strip() or not sign:
            raise UserError(f"'{text}' is not a condition. Give COLUMN=VALUE, such as color=red.")
        wanted.setdefault(column.strip(), []).append(value)
    return wanted
