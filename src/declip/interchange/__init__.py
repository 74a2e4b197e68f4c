"""Foreign formats, one file each: reading and writing."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from declip.interchange.declip_authors import read_declip_authors

__all__ = ["read_declip_authors"]


def __getattr__(name: str) -> Any:
    """Import it when it is first used: the command's `--help` needs no torch."""
    if name == "read_declip_authors":
        from declip.interchange import declip_authors

        return declip_authors.read_declip_authors
    raise AttributeError(f"module 'declip.interchange' has no attribute '{name}'")
