"""Compression of tables: what `declip_sets.tables` reads."""

import lzma
from collections.abc import Iterable

FILTER = {  # settings for text
    "id": lzma.FILTER_LZMA2,
    "preset": 9 | lzma.PRESET_EXTREME,
    "lc": 4,
    "pb": 0,
}


def pack(lines: Iterable[str]) -> bytes:
    """Compress lines."""
    return lzma.compress("\n".join(lines).encode(), filters=[FILTER])
