"""The built-in image-text sets, as `builtin:NAME`: open one, or download and render it."""

from pathlib import Path

from declip.data.builtin.debian import CLIPART, STAMPS
from declip.data.builtin.iconify import EMOJI, ICONS
from declip.data.builtin.pictures import BuiltinSet, BuiltinSource
from declip.data.pair import BUILTIN_PREFIX
from declip.errors import UserError, unknown

# The set of each source's name.
BUILTINS: dict[str, BuiltinSet] = {split: item for item in (EMOJI, ICONS, CLIPART, STAMPS) for split in item.splits}

# Source names of sets with splits, by split.
BUILTIN_SPLITS: dict[str, dict[str, str]] = {"stamps-kinds": {"train": "stamps-kinds-train", "test": "stamps-kinds"}}


def open_builtin(name: str) -> BuiltinSource:
    """Open one of `BUILTINS`, with or without "builtin:"."""
    name = name.removeprefix(BUILTIN_PREFIX)
    return BuiltinSource(_find(name), name)


def download(name: str, cache: str | Path | None = None, progress: bool = True) -> Path:
    """Download and render the set of one of `BUILTINS`, unless it is there already, and return its folder."""
    split = name.removeprefix(BUILTIN_PREFIX)
    if split not in BUILTINS and Path(name).expanduser().exists():
        raise UserError(f"'{name}' is not a built-in set. To shard its pairs: declip data shard {name} --out DIR")
    return _find(split).download(cache, progress)


def _find(name: str) -> BuiltinSet:
    if name not in BUILTINS:
        raise unknown("built-in set", name, BUILTINS)
    return BUILTINS[name]
