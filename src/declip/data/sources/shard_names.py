"""Expansion of names of shards such as `data/{00000..00331}.tar`."""

import glob
import re
from pathlib import Path

from declip.data.images.decode import EXTENSIONS
from declip.errors import UserError

SEPARATOR = "::"  # joins several words into one, as in open_clip's options

MOST_SHARDS = 1_000_000
NAMES_SHOWN = 5

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def names_shards(word: str) -> bool:
    """Whether a word can only mean shards: a tar file, a URL, a pattern, or several joined by `::`."""
    if is_url(word) or SEPARATOR in word or word.lower().endswith((".tar", ".tgz", ".tar.gz")):
        return True
    return any(sign in word for sign in "*?[{") and not Path(word).expanduser().exists()


def is_url(word: str) -> bool:
    """Whether a word is a URL rather than a path."""
    return "://" in word


def path_of(url: str) -> str:
    """A path or URL without a query, which may be a signature."""
    return url.partition("?")[0] if is_url(url) else url


def holds(folder: Path, ending: str) -> bool:
    """Whether a folder has files with this ending and, directly in it, no image."""
    endings = {path.suffix.lower() for path in folder.iterdir() if not path.name.startswith(".")}
    return ending in endings and not endings & set(EXTENSIONS)


def expand(word: str) -> list[str]:
    """List the paths and URLs of the shards that a word names, those of a folder or a pattern sorted.

    A word is files, folders, patterns (`*`, `?`, `[…]`), brace ranges or lists, joined by `::`. Only the braces of URLs
    are expanded.
    """
    shards: list[str] = []
    for part in filter(None, map(str.strip, word.split(SEPARATOR))):
        names = [part] if not is_url(part) and Path(part).expanduser().exists() else _braces(part)
        files = [_files(name) for name in names]
        missing = [name for name, some in zip(names, files, strict=True) if not some]
        if missing:
            shown = ", ".join(missing[:NAMES_SHOWN]) + (", …" if len(missing) > NAMES_SHOWN else "")
            raise UserError(
                f"There is no shard '{shown}'."
                if len(names) == 1
                else f"{len(missing)} of the {len(names)} shards of '{part}' are not there: {shown}. Fetch them, or "
                "name those that are."
            )
        shards += [file for some in files for file in some]
    if not shards:
        raise UserError(f"'{word}' names no shard. Give a .tar file, a folder of them, a pattern or a URL.")
    return shards


def _files(name: str) -> list[str]:
    """A URL, or the files of a path, a folder or a pattern; none where nothing is there."""
    path = Path(name).expanduser()
    if is_url(name) or path.is_file():
        return [name if is_url(name) else str(path)]
    if path.is_dir():
        return sorted(str(file) for file in path.iterdir() if file.suffix.lower() == ".tar")
    return sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())


def _braces(word: str) -> list[str]:
    """Expand `{000..331}` (padded like its first number) and `{a,b}` as a shell does."""
    waiting, names = [word], list[str]()
    while waiting:
        name = waiting.pop()
        if braces := BRACES.search(name):
            choices = _choices(braces[1])
            waiting += [name[: braces.start()] + choice + name[braces.end() :] for choice in reversed(choices)]
        else:
            names.append(name)
        if len(waiting) + len(names) > MOST_SHARDS:
            raise UserError(f"'{word}' names more than {MOST_SHARDS:,} shards. Shorten its ranges.")
    return names


def _choices(inner: str) -> list[str]:
    ends = RANGE.fullmatch(inner)
    if ends is None:
        return inner.split(",")
    first, last = (int(end[:18]) for end in ends.groups())
    step = 1 if first <= last else -1
    some = range(first, last + step, step)[: MOST_SHARDS + 1]
    return [str(number).zfill(len(ends[1])) for number in some]
