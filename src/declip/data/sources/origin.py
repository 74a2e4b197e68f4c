"""The place of an image, and a stamp that changes when the image does."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Origin(NamedTuple):
    """The place of an image; numbers are bytes."""

    path: str = ""  # of the file or the shard, or a shard's URL; empty where the image is in no file of its own
    offset: int = 0
    size: int = 0  # 0 where it is unknown
    stamp: str = ""  # changes when the image does, as far as that shows without decoding it


def file_origin(path: Path) -> Origin:
    """The place of an image file; its size and time of change are the stamp, which is empty for a missing file."""
    with suppress(OSError, ValueError):
        status = path.stat()
        return Origin(str(path.absolute()), 0, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")
    return Origin(str(path))


def bytes_origin(content: bytes) -> Origin:
    """The place of bytes in a table's cell; their hash is the stamp."""
    return Origin("", 0, len(content), hashlib.blake2b(content, digest_size=16).hexdigest())
