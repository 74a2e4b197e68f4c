"""The folder of things made once, and writing there so that nothing half made is ever found."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from declip.errors import UserError

CACHE_VARIABLE = "DECLIP_CACHE"
ENDINGS = ("partial", "old")
DAY = 86_400
"""Seconds. Nothing takes that long to write, so what is older was left by a process that was killed."""

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


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
def atomic_write(
    target: Path, elsewhere: str = f"set {CACHE_VARIABLE} to another folder", durable: bool = False
) -> Iterator[Path]:
    """Give a path beside `target` to write to, a file or a folder, and rename it to `target` when all went well.

    What a killed process left behind is removed a day later.

    Args:
        target: What is to exist. What was there before stays until the new one is whole.
        elsewhere: How the user chooses another place, for the error.
        durable: Wait until a file is on the disk before it takes its name, so that a power cut leaves the old one or
            the new one.

    Yields:
        The path to write to; nothing is there yet.

    Raises:
        UserError: The folder cannot be written to, or the disk is full.
    """
    beside, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ENDINGS)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in (beside, old, *_leftovers(target)):
            remove(path)
        yield beside
        if durable:
            _sync(beside)
        if target.is_dir():
            target.rename(old)
        beside.replace(target)
        remove(old)
        if durable:
            _sync(target.parent)
    except OSError as error:
        raise _explained(error, target, elsewhere) from error
    finally:
        if target.parent.is_dir():
            remove(beside)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any other new file, where safetensors gives its owner's alone.

    Raises:
        SafetensorError, OSError: It cannot be written.
    """
    path.touch()  # the umask cannot be asked for without changing it, for all threads
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _leftovers(target: Path) -> Iterator[Path]:
    for ending in ENDINGS:
        for path in target.parent.glob(f".{target.name}.*.{ending}"):
            if time.time() - path.stat().st_mtime > DAY:
                yield path


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _explained(error: OSError, target: Path, elsewhere: str) -> OSError | UserError:
    """The user's error where the disk or its rights are at fault, else the error itself."""
    if error.errno in FULL:
        return UserError(f"No room left on the disk to write '{target}'. Make room or {elsewhere}.")
    if error.errno in FORBIDDEN:
        return UserError(f"'{target}' cannot be written: {error.strerror}. Mend that or {elsewhere}.")
    return error
