"""Names and places of the files in a tar archive, from its headers alone; nothing is extracted."""

import tarfile
from collections.abc import Iterator

from declip.data.sources.open_file import OpenFile

LARGEST_HEADER = 1 << 18
"""Bytes that are read of a member's headers: `tarfile` would read extended ones whatever size they claim."""

LARGEST_SIZE = 1 << 62
MOST_PADDING = 1 << 20  # bytes behind the end of an archive; tar's own blocks have 10 KiB


def members(file: OpenFile) -> Iterator[tuple[str, int, int]]:
    """Walk through an archive, and yield the name of each plain file, the start of its content and its size in bytes.

    The last content may reach beyond the end of the file. `tarfile.TarFile.next` takes most damage for the end of the
    archive, so headers are read one by one here.

    Raises:
        tarfile.TarError: A header is invalid; the members yielded before can be used.
    """
    headers = _Headers(file)
    at = 0
    try:
        tar = tarfile.TarFile(fileobj=headers, encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
        while at < file.size:
            headers.seek(at)
            info = tarfile.TarInfo.fromtarfile(tar)
            if tar.offset <= at or info.size < 0:
                raise tarfile.HeaderError("negative size")
            at = tar.offset
            if info.isreg() and not info.issparse():
                yield info.name, info.offset_data, min(info.size, LARGEST_SIZE)
    except tarfile.EOFHeaderError as error:  # type: ignore[attr-defined]
        if file.size - at > MOST_PADDING:
            raise tarfile.TarError(f"empty from byte {at:,} on, as an unfinished download is") from error
        return
    except OSError:
        raise
    except Exception as error:  # of any kind, where a header lies
        raise tarfile.TarError(f"{error or type(error).__name__} at byte {at:,}") from error
    if at > file.size:
        raise tarfile.TarError(f"cut short: {file.size:,} bytes of at least {at:,}")


class _Headers:
    """A file as `tarfile` reads it, which gives no more than `LARGEST_HEADER` bytes between two seeks."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self.seek(0)

    def seek(self, at: int) -> None:
        self._at, self._left = at, LARGEST_HEADER

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise tarfile.HeaderError(f"an extended header of {size:,} bytes")
        content = self._file.read(size, self._at)
        self._at, self._left = self._at + len(content), self._left - size
        return content
