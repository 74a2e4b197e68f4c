"""Names and places of the files in a tar archive, from its headers alone; nothing is extracted.

`tarfile` takes five times as long, reads extended headers into memory whatever size they claim, and recurses into each.
The format: POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar".
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

from declip.io.open_file import OpenFile

BLOCK = 512
FILES = b"\0" + b"07"
"""Types of plain files; all others (links, devices, folders) are only a name."""

WITHOUT_CONTENT = b"123456"
"""Links, devices, folders and pipes: no content follows, whatever their size is."""

LARGEST_EXTENSION = 1 << 20
"""Bytes of an extended header (a long name, pax records) that are read."""

LONGEST_NAME = 4096
"""Bytes; Linux's own limit for a path."""

ADLER_PRIME = 65_521

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
"""First bytes of compressed files."""


class Member(NamedTuple):
    """A file in the archive: any bytes as its name, the start of its content, and its size, both in bytes.

    The content may reach beyond the end of a truncated archive.
    """

    name: bytes
    at: int
    size: int


class DamagedTar(Exception):
    """The archive cannot be read beyond the members yielded so far; the message names the fault and its place."""


def members(file: OpenFile) -> Iterator[Member]:
    """Walk through the headers of an archive, which ends with a block of zeros or the file, and yield plain files.

    Raises:
        DamagedTar: A header is invalid; the members yielded before can be used.
    """
    end, at = file.size, 0
    long_name: bytes | None = None
    long_size: int | None = None
    sparse = False
    while at < end:
        header = file.read(BLOCK, at)
        if not header.strip(b"\0"):
            return
        size = _checked_size(header, at)
        kind = header[156]
        at += BLOCK
        if kind in b"xL":
            content = _extension(file, size, at, end)
            if kind == ord("L"):
                long_name = content.rstrip(b"\0")
            else:
                records = _records(content, at)
                long_name = records.get(b"path", long_name)
                sparse = any(key.startswith(b"GNU.sparse") for key in records)
                if b"size" in records:
                    long_size = _decimal(records[b"size"], at)
            at += _padded(size)
            continue
        if kind in b"gK":
            at += _padded(size)
            continue
        if kind == ord("S"):
            raise DamagedTar(f"a sparse file at byte {at - BLOCK:,}, which is not supported")
        size = size if long_size is None else long_size
        name = _name(header) if long_name is None else long_name
        if len(name) > LONGEST_NAME:
            raise DamagedTar(f"a name of {len(name):,} bytes at byte {at - BLOCK:,}")
        if kind in FILES and not sparse and not name.endswith(b"/"):
            yield Member(name, at, size)
        if kind not in WITHOUT_CONTENT:
            at += _padded(size)
        long_name, long_size, sparse = None, None, False
    if at > end:
        raise DamagedTar(f"cut short: {end:,} bytes of at least {at:,}")


def _checked_size(header: bytes, at: int) -> int:
    """The size in a header, after its checksum was compared."""
    if len(header) < BLOCK:
        raise DamagedTar(f"cut short in the header at byte {at:,}")
    for start, kind in COMPRESSED.items() if at == 0 else ():
        if header.startswith(start):
            raise DamagedTar(f"compressed with {kind}")
    # The checksum is the sum of the header's bytes, with eight spaces in its own place. Adler-32 begins with that sum
    # plus 1, modulo its prime; `sum` over the bytes would take half of the time of the whole walk.
    checksum = zlib.adler32(header[:148] + b" " * 8 + header[156:]) % 65536 - 1
    try:
        if (checksum - _number(header[148:156])) % ADLER_PRIME:
            raise DamagedTar(f"the header at byte {at:,} has a wrong checksum")
        size = _number(header[124:136])
    except ValueError as error:
        raise DamagedTar(f"the header at byte {at:,} holds no numbers") from error
    if size < 0:
        raise DamagedTar(f"the header at byte {at:,} gives a negative size")
    return size


def _number(field: bytes) -> int:
    """A header's number: octal digits or, where the first byte is 128 or 255, a binary number."""
    if field[0] in (0o200, 0o377):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0o377 else 0)
    digits = field.split(b"\0", 1)[0].strip()
    if b"_" in digits or digits[:1] in (b"+", b"-"):
        raise ValueError("no octal number")
    return int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # Only POSIX's own magic says that a prefix is there; GNU's keeps times in the same place.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _extension(file: OpenFile, size: int, at: int, end: int) -> bytes:
    if size > min(LARGEST_EXTENSION, end - at):
        raise DamagedTar(f"an extended header of {size:,} bytes at byte {at - BLOCK:,}")
    return file.read(size, at)


def _records(content: bytes, at: int) -> dict[bytes, bytes]:
    """Read pax records: "LENGTH KEY=VALUE\\n", the length counting itself."""
    records: dict[bytes, bytes] = {}
    place = 0
    while place < len(content) and content[place]:
        length, _, _ = content[place : place + 20].partition(b" ")
        after = place + _decimal(length, at)
        key, sign, value = content[place + len(length) + 1 : after].partition(b"=")
        if after <= place or after > len(content) or not sign or not value.endswith(b"\n"):
            raise DamagedTar(f"the extended header at byte {at - BLOCK:,} is not one")
        records[key] = value[:-1]
        place = after
    return records


def _decimal(digits: bytes, at: int) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise DamagedTar(f"the extended header at byte {at - BLOCK:,} is not one")
    return int(digits)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
