"""The data sets that come with the package, as `builtin:NAME`: how each is opened and made."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from declip.data.clipart import open_clipart
from declip.data.clipart_build import prepare_clipart
from declip.data.emoji import open_emoji
from declip.data.emoji_build import prepare_emoji
from declip.data.icons import open_icons
from declip.data.icons_build import prepare_icons
from declip.data.pair import BUILTIN_PREFIX, PairSource
from declip.data.sources.shard_names import names_shards
from declip.data.stamps import open_stamps
from declip.data.stamps_build import prepare_stamps
from declip.errors import UserError, unknown


@dataclass(frozen=True)
class Builtin:
    """A set that is made once and kept in the cache.

    Attributes:
        open: Opens it, given the cache folder or None for the usual one.
        prepare: Makes the cache, given that folder and whether to show progress, and returns where it is.
        about: What it holds, in a line.
    """

    open: Callable[[str | Path | None], PairSource]
    prepare: Callable[[str | Path | None, bool], Path]
    about: str


def _emoji(split: str, about: str) -> Builtin:
    return Builtin(partial(open_emoji, split), prepare_emoji, about)


def _icons(split: str, about: str) -> Builtin:
    return Builtin(partial(open_icons, split), prepare_icons, about)


def _stamps(split: str, about: str) -> Builtin:
    return Builtin(partial(open_stamps, split), prepare_stamps, about)


BUILTINS: dict[str, Builtin] = {
    "emoji": _emoji("emoji", "emoji by five designers, permissive licences: for training"),
    "emoji-share-alike": _emoji("emoji-share-alike", "the same and a sixth designer, CC-BY-SA-4.0: for training"),
    "emoji-validation": _emoji("emoji-validation", "another designer, concepts of the training set: for choosing"),
    "emoji-validation-new": _emoji("emoji-validation-new", "that designer, concepts never trained on"),
    "emoji-test": _emoji("emoji-test", "a third designer, concepts of the training set: for the result alone"),
    "emoji-test-new": _emoji("emoji-test-new", "that designer, concepts never trained on"),
    "icons": _icons("icons", "icons of some 140 sets, permissive licences, no emoji's names: for training"),
    "icons-validation": _icons("icons-validation", "three other designers, names of the training set: for choosing"),
    "icons-test": _icons("icons-test", "four other designers, names of the training set: for the result alone"),
    "clipart": Builtin(partial(open_clipart, "clipart"), prepare_clipart, "public-domain drawings with titles"),
    "stamps": _stamps("stamps", "Tux Paint's stamps that have a name, drawings and photographs, GPL-2"),
    "stamps-photos": _stamps("stamps-photos", "the photographs among them"),
    "stamps-kinds": _stamps("stamps-kinds", "stamps by kind, 13 classes: to measure on"),
    "stamps-kinds-train": _stamps("stamps-kinds-train", "stamps by kind, of other names: for a probe to fit on"),
}

BUILTIN_SPLITS: dict[str, dict[str, str]] = {
    "stamps-kinds": {"train": "stamps-kinds-train", "test": "stamps-kinds"},
}
"""Sets whose parts belong together: the name of the source by the part."""


def open_builtin(name: str, cache: str | Path | None = None) -> PairSource:
    """Open a built-in set by its name, with or without "builtin:".

    Args:
        name: One of `BUILTINS`.
        cache: Cache folder; None for the usual one.

    Raises:
        UserError: There is no such set, or it has not been made yet.
    """
    return _find(name).open(cache)


def prepare(name: str, cache: str | Path | None = None, progress: bool = True) -> Path:
    """Fetch and make a built-in set, unless it is there already.

    Args:
        name: One of `BUILTINS`, with or without "builtin:".
        cache: Cache folder; None for the usual one.
        progress: Show a progress bar.

    Returns:
        The folder that holds it.

    Raises:
        UserError: There is no such set, or it cannot be made; the message says what is missing.
    """
    if name.removeprefix(BUILTIN_PREFIX) not in BUILTINS and (names_shards(name) or Path(name).expanduser().exists()):
        raise UserError(f"'{name}' is no built-in set. To write its pairs as shards, give the folder: --out DIR.")
    return _find(name).prepare(cache, progress)


def _find(name: str) -> Builtin:
    given = name.removeprefix(BUILTIN_PREFIX)
    if given not in BUILTINS:
        raise unknown("built-in set", given, BUILTINS)
    return BUILTINS[given]
