"""The folder of things made once, and writing there so that nothing half made is ever found."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from declip.errors import UserError

CACHE_VARIABLE = "DECLIP_CACHE"


def cache_folder() -> Path:
    """The cache: the environment's DECLIP_CACHE, else `declip` in the platform's cache folder.

    That is $XDG_CACHE_HOME or ~/.cache, ~/Library/Caches on macOS, and %LOCALAPPDATA% on Windows.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "declip"
    if os.uname().sysname == "Darwin":
        return Path.home() / "Library/Caches/declip"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "declip"


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write to, a file or a folder, and rename it to `target` when all went well.

    Args:
        target: What is to exist. What was there before stays until the new one is whole.

    Yields:
        The path to write to; nothing is there yet.

    Raises:
        UserError: The folder cannot be written to, or the disk is full.
    """
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(beside)
        yield beside
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        if target.is_dir():
            target.rename(old)
        beside.replace(target)
        remove(old)
    except OSError as error:
        raise _explained(error, target) from error
    finally:
        remove(beside)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _explained(error: OSError, target: Path) -> OSError | UserError:
    move = f"Make room or set {CACHE_VARIABLE} to another folder."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"No room left on the disk to write '{target}'. {move}")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"'{target}' cannot be written: {error.strerror}. Set {CACHE_VARIABLE} to another folder.")
    return error
