"""Where a picture lies, and what tells its present state from a later one."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Origin(NamedTuple):
    """Where a picture lies.

    Attributes:
        path: Of the file or the shard, or a shard's URL; empty where the picture is in no file of its own.
        offset: Where it begins in that file, bytes.
        size: How many bytes it has; 0 where that is not known.
        stamp: Changes when the picture does, as far as can be told without decoding it.
    """

    path: str = ""
    offset: int = 0
    size: int = 0
    stamp: str = ""


def file_origin(path: Path) -> Origin:
    """Of a file of its own: its size and its time of change are its stamp, empty where it is not there."""
    with suppress(OSError, ValueError):
        status = path.stat()
        return Origin(str(path.absolute()), 0, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")
    return Origin(str(path))


def bytes_origin(content: bytes) -> Origin:
    """Of bytes in a table's cell: their hash is their stamp."""
    return Origin("", 0, len(content), hashlib.blake2b(content, digest_size=16).hexdigest())
