"""Expansion of names of shards such as `data/{00000..00331}.tar`."""

import glob
import os
import re
from pathlib import Path

from declip.data.images.decode import EXTENSIONS
from declip.errors import UserError

SEPARATOR = "::"  # joins several words into one, as in open_clip's options
MOST_SHARDS = 1_000_000

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d{1,15})\.\.(\d{1,15})")


def names_shards(word: str) -> bool:
    """Whether a word can only mean shards: a tar file, a URL, a pattern, or several joined by `::`."""
    if is_url(word) or SEPARATOR in word or word.lower().endswith((".tar", ".tgz", ".tar.gz")):
        return True
    return any(sign in word for sign in "*?[{") and not Path(word).expanduser().exists()


def is_url(word: str) -> bool:
    """Whether a word is a URL rather than a path."""
    return "://" in word


def absolute(spec: str | Path) -> str:
    """The name of a source, a model or a folder that means the same in another working directory."""
    path = Path(spec).expanduser()
    if path.exists():
        return str(path.resolve())
    if names_shards(str(spec)):
        return SEPARATOR.join(
            part if is_url(part) else os.path.abspath(os.path.expanduser(part)) for part in str(spec).split(SEPARATOR)
        )
    return str(spec)


def holds(folder: Path, ending: str) -> bool:
    """Whether a folder has files with this ending and, directly in it, no image."""
    endings = {path.suffix.lower() for path in folder.iterdir() if not path.name.startswith(".")}
    return ending in endings and not endings & set(EXTENSIONS)


def files_in(folder: Path, ending: str) -> list[str]:
    """List the files of a folder with this ending; hidden ones, such as macOS's, are none."""
    return sorted(str(file) for file in folder.glob("[!.]*") if file.suffix.lower() == ending)


def expand(word: str) -> list[str]:
    """List the paths and URLs of the shards that a word names, those of a folder or a pattern sorted.

    A word is files, folders, patterns (`*`, `?`, `[…]`), brace ranges or lists, joined by `::`. Only the braces of URLs
    are expanded.
    """
    shards: list[str] = []
    for part in filter(None, map(str.strip, word.split(SEPARATOR))):
        for name in [part] if not is_url(part) and Path(part).expanduser().exists() else _braces(part):
            files = _files(name)
            if not files:
                raise UserError(f"There is no file '{name}'. Fetch it, or name those that are there.")
            shards += files
    if not shards:
        raise UserError(f"'{word}' names no shard. Give a .tar file, a folder of them, a pattern or a URL.")
    return shards


def _files(name: str) -> list[str]:
    """A URL, or the files of a path, a folder or a pattern; none where nothing is there."""
    path = Path(name).expanduser()
    if is_url(name) or path.is_file():
        return [name if is_url(name) else str(path)]
    if path.is_dir():
        return files_in(path, ".tar")
    return sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())


def _braces(word: str) -> list[str]:
    """Expand `{000..331}` (padded like its first number) and `{a,b}` as a shell does."""
    braces = BRACES.search(word)
    if braces is None:
        return [word]
    choices = braces[1].split(",")
    if ends := RANGE.fullmatch(braces[1]):
        first, last = int(ends[1]), int(ends[2])
        if abs(last - first) >= MOST_SHARDS:
            raise UserError(f"'{word}' names more than {MOST_SHARDS:,} shards. Shorten its range.")
        step = 1 if first <= last else -1
        choices = [str(number).zfill(len(ends[1])) for number in range(first, last + step, step)]
    before, after = word[: braces.start()], word[braces.end() :]
    return [name for choice in choices for name in _braces(before + choice + after)]
