"""Names of sources: patterns of shards, URLs and folders, and paths that stay valid when a project moves."""

import glob
import os
import re
from pathlib import Path

from declip.data.images.decode import EXTENSIONS
from declip.errors import UserError

MOST_SHARDS = 1_000_000
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d{1,15})\.\.(\d{1,15})")


def names_shards(word: str) -> bool:
    """Whether a word can only mean shards: a tar file, a URL or a pattern."""
    if is_url(word) or word.lower().endswith((".tar", ".tgz", ".tar.gz")):
        return True
    is_pattern = any(sign in word for sign in "*?[{")
    return is_pattern and not Path(word).expanduser().exists()


def is_url(word: str) -> bool:
    """Whether a word is a URL rather than a path."""
    return "://" in word


def absolute(spec: str | Path) -> str:
    """The name of a source, model or folder that is valid in any working directory."""
    name = str(spec)
    path = Path(spec).expanduser()
    if path.exists():
        return str(path.resolve())
    is_pattern = names_shards(name) and not is_url(name)
    if is_pattern:
        return os.path.abspath(path)
    return name


def holds(folder: Path, ending: str) -> bool:
    """Whether a folder has files with this ending and, directly in it, no image."""
    endings = {path.suffix.lower() for path in folder.glob("[!.]*")}
    return ending in endings and endings.isdisjoint(EXTENSIONS)


def files_in(folder: Path, ending: str) -> list[str]:
    """List the files of a folder with this ending, without hidden ones such as macOS's."""
    files = folder.glob("[!.]*")
    return sorted(str(file) for file in files if file.suffix.lower() == ending)


def expand(word: str) -> list[str]:
    """List the paths and URLs of the shards that a word names; of a URL, only braces are expanded here."""
    if is_url(word):
        return _braces(word)
    shards: list[str] = []
    names = [word]
    if not Path(word).expanduser().exists():
        names = _braces(word)
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            files = files_in(path, ".tar")
        else:
            matches = [str(path)]
            if not path.exists():
                matches = glob.glob(str(path), recursive=True)
            files = sorted(filter(os.path.isfile, matches))
        if not files:
            raise UserError(f"'{name}' does not exist. Fetch it, or name existing files.")
        shards += files
    return shards


def _braces(word: str) -> list[str]:
    """Expand `{000..331}` (padded like its first number) and `{a,b}` as a shell does."""
    braces = BRACES.search(word)
    if braces is None:
        return [word]
    choices = braces[1].split(",")
    ends = RANGE.fullmatch(braces[1])
    if ends:
        first = int(ends[1])
        last = int(ends[2])
        if abs(last - first) >= MOST_SHARDS:
            raise UserError(f"'{word}' names more than {MOST_SHARDS:,} shards. Shorten its range.")
        step = 1 if first <= last else -1
        numbers = range(first, last + step, step)
        choices = [str(number).zfill(len(ends[1])) for number in numbers]
    names = list[str]()
    for choice in choices:
        names += _braces(word.replace(braces[0], choice, 1))
    return names


def stored_path(given: object, folder: Path) -> str:
    """Path as a file in `folder` stores it: relative if both are in the working directory; "" for a Python object."""
    if not isinstance(given, str | Path) or not str(given):
        return ""
    return relative(absolute(given), folder)


def relative(path: str, folder: Path) -> str:
    """A path as `stored_path` stores it, without resolving links; anything but an absolute path stays."""
    if not os.path.isabs(path):
        return path
    project = os.getcwd()
    target = str(folder.resolve())
    common = os.path.commonpath([path, target, project])
    if common != project or path.startswith(target + os.sep):
        return path
    return os.path.relpath(path, target)


def resolve(path: str, folder: Path) -> str:
    """The absolute path of what `stored_path` stored; URLs and names such as builtin:emoji stay."""
    if path in (os.curdir, os.pardir) or path.startswith(os.pardir + os.sep):
        return os.path.normpath(folder.resolve() / path)
    return path


def is_missing(path: str) -> bool:
    """Whether this is an absolute path that does not exist, unlike a name such as open_clip:MODEL/TAG."""
    return os.path.isabs(path) and not names_shards(path) and not os.path.exists(path)
