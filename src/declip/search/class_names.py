"""Names of classes as the user gives them; torch is not imported."""

import os
from collections.abc import Sequence
from pathlib import Path

from declip.errors import UserError


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
    names = list(dict.fromkeys(filter(None, (" ".join(str(name).split()) for name in names))))
    if len(names) < 2:
        raise UserError(f"Give two classes or more, not {len(names)}{f': {names[0]!r}' if names else ''}.")
    return names


def read_options(classes: str | Path | Sequence[str] | None, examples: object, head: object) -> list[str] | None:
    """Read the names of classes, if any; refuse options that cannot be combined."""
    if head is not None and (classes is not None or examples is not None):
        raise UserError("A head (--head) has its own classes. Leave out --classes and --examples.")
    if head is None and classes is None and examples is None:
        raise UserError("Name the classes with --classes, or give examples of them with --examples or --head.")
    if isinstance(head, str | Path) and not Path(head).expanduser().is_file():
        raise UserError(f"There is no head '{head}'. Make one: declip classify IMAGES --examples … --save {head}.")
    return None if classes is None else read_classes(classes)
