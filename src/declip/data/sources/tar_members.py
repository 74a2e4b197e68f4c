"""Names and places of the files in a tar archive, from its headers alone; nothing is extracted.

`tarfile` takes two to five times as long, reads extended headers into memory whatever size they claim, and recurses
into each. The format: POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar".
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

from declip.io.open_file import OpenFile

BLOCK = 512
FILES, WITHOUT_CONTENT = b"\0" + b"07", b"123456"
"""Types of plain files, and of links, devices, folders and pipes, which no content follows whatever their size is."""

LARGEST_EXTENSION, LONGEST_NAME = 1 << 20, 4096
"""Bytes of an extended header (a long name, pax records) that are read, and of a name: Linux's own limit for a path."""

ADLER_PRIME = 65_521


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
    extended: dict[bytes, bytes] = {}  # records for the next member
    while at < end:
        header, start = file.read(BLOCK, at), at
        if not header.strip(b"\0"):
            return
        kind, size = header[156:157], _checked_size(header, at)
        at += BLOCK
        if kind in (b"x", b"L"):
            if size > min(LARGEST_EXTENSION, end - at):
                raise DamagedTar(f"an extended header of {size:,} bytes at byte {start:,}")
            content = file.read(size, at)
            try:
                extended |= {b"path": content.rstrip(b"\0")} if kind == b"L" else _records(content)
                member_size = int(extended.get(b"size", b"0"))
            except ValueError as error:
                raise DamagedTar(f"the extended header at byte {start:,} is not one") from error
        elif kind not in (b"g", b"K"):
            if kind == b"S":
                raise DamagedTar(f"a sparse file at byte {start:,}, which is not supported")
            size = member_size if b"size" in extended else size
            name = extended.get(b"path") or _name(header)
            if len(name) > LONGEST_NAME:
                raise DamagedTar(f"a name of {len(name):,} bytes at byte {start:,}")
            sparse = any(key.startswith(b"GNU.sparse") for key in extended)
            if kind in FILES and not sparse and not name.endswith(b"/"):
                yield Member(name, at, size)
            extended = {}
            size = 0 if kind in WITHOUT_CONTENT else size
        at += -(-size // BLOCK) * BLOCK
    if at > end:
        raise DamagedTar(f"cut short: {end:,} bytes of at least {at:,}")


def _checked_size(header: bytes, at: int) -> int:
    """The size in a header, after its checksum was compared."""
    if len(header) < BLOCK:
        raise DamagedTar(f"cut short in the header at byte {at:,}")
    # The checksum is the sum of the header's bytes, with eight spaces in its own place. Adler-32 begins with that sum
    # plus 1, modulo its prime; `sum` over the bytes would take half of the time of the whole walk.
    checksum = zlib.adler32(header[:148] + b" " * 8 + header[156:]) % 65536 - 1
    try:
        if (checksum - _number(header[148:156])) % ADLER_PRIME:
            raise DamagedTar(f"the header at byte {at:,} has a wrong checksum")
        return _number(header[124:136])
    except ValueError as error:
        raise DamagedTar(f"the header at byte {at:,} holds no numbers") from error


def _number(field: bytes) -> int:
    """A header's number: octal digits or, where the first byte is 128, a binary number."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not digits.isdigit():
        raise ValueError("no octal number")
    return int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # Only POSIX's own magic says that a prefix is there; GNU's keeps times in the same place.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _records(content: bytes) -> dict[bytes, bytes]:
    """Read pax records: "LENGTH KEY=VALUE\\n", the length counting itself; raises `ValueError`."""
    records: dict[bytes, bytes] = {}
    place = 0
    while place < len(content) and content[place]:
        length, _, _ = content[place : place + 20].partition(b" ")
        after = place + _decimal(length)
        key, sign, value = content[place + len(length) + 1 : after].partition(b"=")
        if after <= place or after > len(content) or not sign or not value.endswith(b"\n"):
            raise ValueError("no pax record")
        records[key] = value[:-1]
        place = after
    _decimal(records.get(b"size", b"0"))
    return records


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise ValueError("no decimal number")
    return int(digits)
