"""The built-in image-text sets, as `builtin:NAME`: open one, or download and render it."""

from pathlib import Path

from declip.data.builtin.clipart import CLIPART
from declip.data.builtin.emoji import EMOJI
from declip.data.builtin.icons import ICONS
from declip.data.builtin.pictures import BuiltinSet, BuiltinSource
from declip.data.builtin.stamps import STAMPS
from declip.data.pair import BUILTIN_PREFIX
from declip.data.sources.shard_names import names_shards
from declip.errors import UserError, unknown

BUILTINS: dict[str, BuiltinSet] = {split: each for each in (EMOJI, ICONS, CLIPART, STAMPS) for split in each.splits}
"""The set that each name is a part of."""

BUILTIN_SPLITS: dict[str, dict[str, str]] = {
    "stamps-kinds": {"train": "stamps-kinds-train", "test": "stamps-kinds"},
}
"""Sets whose parts belong together: the name of the source by the part."""


def open_builtin(name: str, cache: str | Path | None = None) -> BuiltinSource:
    """Open one of `BUILTINS`, its name with or without "builtin:", in a cache folder or the default one.

    Raises:
        UserError: There is no such set, or it has not been made yet.
    """
    name = name.removeprefix(BUILTIN_PREFIX)
    return _find(name).open(name, cache)


def prepare(name: str, cache: str | Path | None = None, progress: bool = True) -> Path:
    """Download and render the set of one of `BUILTINS`, unless that is done, and return its folder.

    Raises:
        UserError: There is no such set, or it cannot be made; the message says what is missing.
    """
    given = name.removeprefix(BUILTIN_PREFIX)
    if given not in BUILTINS and (names_shards(name) or Path(name).expanduser().exists()):
        raise UserError(f"'{name}' is no built-in set. To write its pairs as shards, give the folder: --out DIR.")
    return _find(given).prepare(cache, progress)


def _find(name: str) -> BuiltinSet:
    if name not in BUILTINS:
        raise unknown("built-in set", name, BUILTINS)
    return BUILTINS[name]
