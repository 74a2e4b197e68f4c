"""Synonyms of a word as it stands in a caption, from a table derived from WordNet 3.0.

The table (assets/synonyms.txt.xz, made by benchmarks/build_synonyms.py) holds every form of every word that it knows,
with the synonyms in the same form.
"""

import lzma
from functools import cache, lru_cache
from importlib.resources import files


@cache
def table() -> dict[str, str]:
    """The shipped table, read once per process: synonyms joined by "|" by word; empty for a word without any."""
    packed = files("declip.data").joinpath("assets", "synonyms.txt.xz").read_bytes()
    words, _, lists = lzma.decompress(packed).decode("utf-8").partition("\n\n")
    return dict(zip(words.split("\n"), lists.split("\n"), strict=True))


@lru_cache(maxsize=2**16)
def synonyms(word: str) -> tuple[str, ...]:
    """Other words or phrases for a lower-case word in its form: plurals for "sofas", "-ing" for "jumping"."""
    joined = table().get(word)
    return tuple(joined.split("|")) if joined else ()
