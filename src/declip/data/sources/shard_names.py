"""Expansion of names of shards such as `data/{00000..00331}.tar`."""

import glob
import re
from pathlib import Path

from declip.data.images.decode import EXTENSIONS
from declip.errors import UserError

SEPARATOR = "::"
"""Joins several words into one, as in open_clip's options."""

MOST_SHARDS = 1_000_000
NAMES_SHOWN = 5

BRACES = re.compile(r"\{([^}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def names_shards(word: str) -> bool:
    """Whether a word can only mean shards: a tar file, a URL, a pattern, or several joined by `::`."""
    if is_url(word) or SEPARATOR in word:
        return True
    exists = Path(word).expanduser().exists()
    is_pattern = any(sign in word for sign in "*?[{") and not exists
    return is_pattern or word.lower().endswith((".tar", ".tgz", ".tar.gz"))


def is_url(word: str) -> bool:
    """Whether a word is a URL rather than a path."""
    return "://" in word


def path_of(url: str) -> str:
    """A path or URL without a query, which may be a signature."""
    return url.partition("?")[0] if is_url(url) else url


def holds_shards(folder: Path) -> bool:
    """Whether a folder has tar files and, directly in it, no image."""
    endings = {path.suffix.lower() for path in folder.iterdir() if not path.name.startswith(".")}
    return ".tar" in endings and not endings & set(EXTENSIONS)


def expand(word: str) -> list[str]:
    """List the paths and URLs of the shards that a word names, those of a folder or a pattern sorted.

    Args:
        word: Files, folders, patterns (`*`, `?`, `[…]`), brace ranges or lists, joined by `::`. Only the braces of URLs
            are expanded.

    Raises:
        UserError: One does not exist, nothing matches a pattern, or there are more than a million.
    """
    shards: list[str] = []
    for part in filter(None, map(str.strip, word.split(SEPARATOR))):
        if not is_url(part) and Path(part).expanduser().exists():
            shards += _of_path(Path(part).expanduser())
            continue
        names = _braces(part)
        missing: list[str] = []
        for name in names:
            if is_url(name):
                shards.append(name)
            elif glob.has_magic(name):
                shards += _of_pattern(name)
            elif Path(name).expanduser().is_file():
                shards.append(str(Path(name).expanduser()))
            else:
                missing.append(name)
        if missing and len(names) == 1:
            raise UserError(f"There is no shard '{part}'.")
        if missing:
            shown = ", ".join(missing[:NAMES_SHOWN]) + (", …" if len(missing) > NAMES_SHOWN else "")
            raise UserError(
                f"{len(missing)} of the {len(names)} shards of '{part}' are not there: {shown}. Fetch them, or name "
                "those that are."
            )
    if not shards:
        raise UserError(f"'{word}' names no shard. Give a .tar file, a folder of them, a pattern or a URL.")
    return shards


def _of_path(path: Path) -> list[str]:
    if not path.is_dir():
        return [str(path)]
    shards = sorted(str(file) for file in path.iterdir() if file.suffix.lower() == ".tar")
    if not shards:
        raise UserError(f"The folder '{path}' holds no .tar file.")
    return shards


def _of_pattern(pattern: str) -> list[str]:
    files = sorted(name for name in glob.glob(str(Path(pattern).expanduser()), recursive=True) if Path(name).is_file())
    if not files:
        raise UserError(f"No file fits the pattern '{pattern}'.")
    return files


def _braces(word: str) -> list[str]:
    """Expand `{000..331}` (padded like its first number) and `{a,b}` as a shell does."""
    waiting, names = [word], list[str]()
    while waiting:
        name = waiting.pop()
        if braces := BRACES.search(name):
            inner = reversed(_choices(braces[1]))
            waiting += [name[: braces.start()] + choice + name[braces.end() :] for choice in inner]
        else:
            names.append(name)
        if len(names) > MOST_SHARDS:
            raise UserError(f"'{word}' names more than {MOST_SHARDS:,} shards. Shorten its ranges.")
    return names


def _choices(inner: str) -> list[str]:
    ends = RANGE.fullmatch(inner)
    if "{" in inner:
        raise UserError(f"'{{{inner}}}' has braces inside braces. Write it as several words, joined by '{SEPARATOR}'.")
    if ends is None:
        return inner.split(",")
    first, last = (int(end[:18]) for end in ends.groups())
    if abs(last - first) >= MOST_SHARDS:
        raise UserError(f"'{{{inner}}}' names more than {MOST_SHARDS:,} shards. Shorten its ranges.")
    step = 1 if first <= last else -1
    return [str(number).zfill(len(ends[1])) for number in range(first, last + step, step)]
