"""Synonyms of a word as it stands in a caption, from a table derived from WordNet 3.0.

The table (assets/synonyms.txt.xz, made by benchmarks/build_synonyms.py) holds every form of every word that it knows,
with the synonyms in the same form. Its license lies next to it in assets/LICENSE.wordnet.txt.
"""

import lzma
from functools import cache, lru_cache
from importlib.resources import files


@cache
def table() -> dict[str, str]:
    """Read the shipped table, once a process: synonyms, joined by "|", by word; empty for a word without any."""
    packed = files("declip.data").joinpath("assets", "synonyms.txt.xz").read_bytes()
    words, _, found = lzma.decompress(packed).decode("utf-8").partition("\n\n")
    return dict(zip(words.split("\n"), found.split("\n"), strict=True))


@lru_cache(maxsize=2**16)
def synonyms(word: str) -> tuple[str, ...]:
    """List replacements of a word in the word's form: plurals for "sofas", "-ing" for "jumping".

    Args:
        word: One word in lower case, without punctuation around it.

    Returns:
        Words or phrases, the most frequent sense's first; empty when none is known. Never the word itself,
        never an empty string.
    """
    found = table().get(word)
    return tuple(found.split("|")) if found else ()


def is_word(word: str) -> bool:
    """Whether WordNet has a word in lower case, or what it is a form of."""
    return word in table()
