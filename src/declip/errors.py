"""Errors in the input of a user."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

MAX_NAMES = 30


class UserError(ValueError):
    """Invalid input: the message says what was given, what is allowed and what to do.

    The command line prints the message without a traceback, and exits with status 2.
    """


def unknown(kind: str, given: str, known: Iterable[str]) -> UserError:
    """Build the error for an unknown name, with the nearest match and the known names, or those near it."""
    names = sorted(known)
    near = get_close_matches(given, names, n=5, cutoff=0.6)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    if len(names) > MAX_NAMES:
        shown = (
            f" Near it: {', '.join(near)}; {len(names)} are known."
            if near
            else f" {len(names)} are known."
        )
    else:
        shown = f" Known: {', '.join(names)}."
    return UserError(f"Unknown {kind} '{given}'.{hint}{shown}")


def newer(path: Path) -> UserError:
    """Build the error for a file with a layout that this version does not know."""
    return UserError(
        f"'{path}' was written by a newer version of declip. Install that: pip install -U declip."
    )


def check_installed(package: str, extra: str, what: str) -> None:
    """Raise a `UserError` unless the package that something requires is installed."""
    if find_spec(package) is None:
        raise UserError(f"{what} requires {package}: pip install 'declip[{extra}]'.")


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise a `UserError` unless `low <= value <= high`; NaN and infinity are refused too."""
    if not (math.isfinite(value) and low <= value <= high):
        allowed = f"{low:g} or more" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise UserError(f"{name} is {value}; it must be {allowed}.")
