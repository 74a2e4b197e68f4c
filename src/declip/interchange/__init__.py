"""Foreign formats, one file each: reading and writing."""

from declip.interchange.declip_authors import read_declip_authors

__all__ = ["read_declip_authors"]
