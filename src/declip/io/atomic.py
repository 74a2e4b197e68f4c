"""Atomic writing of files and folders, locks, and the path of the cache."""

import errno
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, SoftFileLock, Timeout

from declip.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CACHE_VARIABLE = "DECLIP_CACHE"
HINT = "choose another folder with --out"
# Seconds after which a temporary file must be left over from a process that was killed
DAY = 86_400
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
)
# Of flock, as on NFS without lockd and some of FUSE
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def cache_folder() -> Path:
    """Path of the cache: $DECLIP_CACHE, else `declip` in $XDG_CACHE_HOME or ~/.cache."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "declip")
    return Path(os.environ.get(CACHE_VARIABLE) or usual).expanduser()


def csv_path(given: str | Path, option: str = "--out") -> Path:
    """Return the path of a table to write; raises `UserError` if it is not a .csv file."""
    path = Path(given).expanduser()
    if path.suffix.lower() != ".csv" or path.is_dir():
        raise UserError(
            f"A table is written to a .csv file, not to '{given}'. Choose another path with {option}."
        )
    return path


@contextmanager
def atomic_write(
    target: Path, hint: str = f"set {CACHE_VARIABLE} to another folder", durable: bool = False
) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder, and rename it to `target` when the block succeeds.

    A file that is replaced keeps its permissions, and one behind a symbolic link is replaced, not the link. `hint`
    says how to choose another path. `durable` files survive a power failure, with the old or new content.
    """
    # Such as /dev/null
    if not target.name or (target.exists() and not (target.is_file() or target.is_dir())):
        raise UserError(
            f"'{target}' cannot be replaced. Give the path of a file or folder; {hint}."
        )
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    partial, old = (
        target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("partial", "old")
    )
    try:
        with _user_errors(target, hint):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Left by killed processes: old ones, and those of an earlier process of the same number.
            for path in target.parent.glob(f".{escape(target.name)}.*"):
                left = (
                    path.suffix in (".partial", ".old") and time.time() - path.stat().st_mtime > DAY
                )
                if left or path in (partial, old):
                    remove(path)
            yield partial
            if target.is_file():
                _set_mode(partial, target.stat().st_mode)
            if durable:
                flush(partial)
            # A folder cannot be replaced in one step: for a moment there is none.
            if target.is_dir():
                target.rename(old)
            partial.replace(target)
            remove(old)
            if durable:
                flush(target.parent)
    finally:
        with suppress(OSError):  # of a read-only file system, which would replace the error above
            remove(partial)


def put_back(target: Path) -> None:
    """Wait while another process replaces a folder; undo the first half if that process was killed.

    `atomic_write` renames the old folder, then the new one: between the two there is none.
    """
    for aside in target.parent.glob(f".{escape(target.name)}.*.old"):
        process = aside.suffixes[-2].removeprefix(".")
        for _ in range(20):
            if target.exists() or not _runs(process):
                break
            time.sleep(0.05)
        with suppress(OSError):
            if not target.exists():
                aside.rename(target)


def _runs(process: str) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True


@contextmanager
def locked_for(target: Path, lock: Path, hint: str, timeout: float = 0) -> Iterator[None]:
    """Hold a lock while `target` is written; raises `UserError` if another process holds it after `timeout` seconds."""
    with ExitStack() as stack:
        try:
            with _user_errors(target, hint):
                lock.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(lock, timeout))
        except Timeout as error:
            raise UserError(
                f"Another process is writing to '{target}'. Wait for it, or {hint}."
            ) from error
        yield


@contextmanager
def file_lock(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock on a file; raises `filelock.Timeout` if another process holds it after `timeout` seconds (-1: waits).

    Where the file system has no locks, the lock is a second file, which exists while it is held.
    """
    lock: FileLock | SoftFileLock = FileLock(path, timeout)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter is filelock's for ENOSYS
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        lock = SoftFileLock(f"{path}.held", timeout)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def save_tensors(
    tensors: "Mapping[str, Tensor]", path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, of tensors on any device, with the usual permissions of a new file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # imports torch, which takes seconds

    path.touch()  # reading the umask would change it, for all threads
    mode = path.stat().st_mode
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            path,
            metadata,
        )
    except SafetensorError as error:  # of a full disk too
        match = re.search(r"os error (\d+)", str(error))
        if match:
            number = int(match[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    _set_mode(path, mode)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str, hint: str = HINT, durable: bool = False) -> Path:
    """Write a text file atomically, see `atomic_write`."""
    with atomic_write(path, hint, durable) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file or a folder to the disk, and drop it from the page cache, so that the next read is from the disk."""
    if os.name == "nt":  # Windows cannot open a folder, or flush a file that is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _set_mode(path: Path, mode: int) -> None:
    # Some file systems refuse any change
    if stat.S_IMODE(path.stat().st_mode) != stat.S_IMODE(mode):
        path.chmod(stat.S_IMODE(mode))


@contextmanager
def _user_errors(target: Path, hint: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"No room left on the disk to write '{target}'. Make room or {hint}."
            ) from error
        if error.errno in FORBIDDEN:
            raise UserError(
                f"'{target}' cannot be written: {error.strerror}. Fix that or {hint}."
            ) from error
        raise
