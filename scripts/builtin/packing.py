"""Writing the texts that the package ships: what `declip.data.asset_files` reads."""

import lzma
from collections.abc import Iterable

_FILTER = {
    "id": lzma.FILTER_LZMA2,
    "preset": 9 | lzma.PRESET_EXTREME,
    "lc": 4,
    "pb": 0,
}  # settings for text


def pack(lines: Iterable[str]) -> bytes:
    """Compress lines."""
    return lzma.compress("\n".join(lines).encode(), filters=[_FILTER])
