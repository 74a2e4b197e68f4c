"""Synonyms of a word as it stands in a caption, from a table derived from WordNet 3.0.

The table (assets/synonyms.txt.gz, made by benchmarks/build_synonyms.py) holds, for each lemma and part of
speech, how often WordNet's tagged texts use it and the other words of its most frequent senses. It is read at
the first look-up, in some 50 ms. Its licence lies beside it in assets/LICENSE.wordnet.txt.
"""

import gzip
from collections.abc import Iterator
from functools import cache, lru_cache
from importlib.resources import files
from typing import NamedTuple

from declip.data.text.inflection import Form, Irregular, detach, inflect

# A reading of a word counts only when it is more than a third as likely as the likeliest one.
_LEAST_SHARE = 1 / 3
# Captions name things, the tagged prose that the counts come from tells stories. So "leaves" is rather a noun
# than a verb, and "glasses", with an entry of its own, rather what one wears than more than one glass.
_FINITE_VERB = 0.2
_OWN_PLURAL = 2.0


class Reading(NamedTuple):
    """What a written word may be: a form of a lemma, with that lemma's synonyms."""

    form: Form
    lemma: str
    synonyms: tuple[str, ...]
    likelihood: float


class Table:
    """The synonym table.

    Args:
        text: Lines of lemma, then for each part of speech a field such as "n36 scene|vista" (letter, count,
            synonyms), all separated by tabs; after an empty line, irregular forms: part of speech, form,
            lemma. A first line that starts with # is a comment.
    """

    def __init__(self, text: str) -> None:
        lemmas, _, irregular = text.partition("\n\n")
        self._entries = dict(line.split("\t", 1) for line in lemmas.splitlines() if line[0] != "#")
        rows = (line.split("\t") for line in irregular.splitlines())
        self.irregular = Irregular([(part, surface, lemma) for part, surface, lemma in rows])

    def __len__(self) -> int:
        return len(self._entries)

    def parts(self, lemma: str) -> dict[str, tuple[int, tuple[str, ...]]]:
        """Look a lemma up: part of speech (n, v, a, r) -> (count, synonyms); empty when it is unknown."""
        fields = self._entries.get(lemma, "").split("\t")
        parts = {}
        for field in filter(None, fields):
            count, _, synonyms = field[1:].partition(" ")
            parts[field[0]] = int(count), tuple(synonyms.split("|")) if synonyms else ()
        return parts

    def readings(self, word: str) -> list[Reading]:
        """List what a word in lower case may be, without the unlikely.

        A verb or adjective that is a lemma, or an irregular form, is not also taken apart by rule: "seed" is
        not the past of "see". A noun is: "clocks" is a plant, but rather more than one clock.
        """
        found = [
            Reading(form, lemma, synonyms, (count + 1) * weight)
            for form, lemma, count, synonyms, weight in self._forms(word)
        ]
        least = _LEAST_SHARE * max((reading.likelihood for reading in found), default=0)
        return [reading for reading in found if reading.likelihood > least]

    def _forms(self, word: str) -> Iterator[tuple[Form, str, int, tuple[str, ...], float]]:
        own = self.parts(word)
        for part, (count, synonyms) in own.items():
            weight = _OWN_PLURAL if part == "n" and word.endswith("s") else 1.0
            yield "base", word, count, synonyms, _FINITE_VERB if part == "v" else weight
        irregular = self.irregular.lemmas(word)
        settled = {*(part for part in own if part != "n"), *(part for part, _, _ in irregular)}
        regular = dict.fromkeys(row for row in detach(word) if row[0] not in settled)
        for part, form, lemma in (*irregular, *regular):
            entry = self.parts(lemma).get(part)
            if entry is not None:
                yield form, lemma, *entry, _FINITE_VERB if form == "third" else 1.0


@cache
def table() -> Table:
    """Read the shipped table, once a process."""
    packed = files("declip.data").joinpath("assets", "synonyms.txt.gz").read_bytes()
    return Table(gzip.decompress(packed).decode("utf-8"))


@lru_cache(maxsize=2**16)
def synonyms(word: str) -> tuple[str, ...]:
    """List what may stand in a word's place, in the word's form: plurals for "sofas", "-ing" for "jumping".

    Args:
        word: One word in lower case, without punctuation around it.

    Returns:
        Words or phrases, the most frequent sense's first; empty when none is known. Never the word itself,
        never an empty string.
    """
    lexicon = table()
    found: dict[str, None] = {}
    for reading in sorted(lexicon.readings(word), key=lambda reading: -reading.likelihood):
        for synonym in reading.synonyms:
            inflected = inflect(synonym, reading.form, lexicon.irregular)
            if inflected is not None and word not in (synonym.lower(), inflected.lower()):
                found[inflected] = None
    return tuple(found)
