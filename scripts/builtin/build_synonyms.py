"""Build the synonym table of text augmentation from WordNet's files, with all forms of each word.

    python scripts/builtin/build_synonyms.py /usr/share/wordnet

The folder is WordNet 3.0's "dict" (data.*, index.*, *.exc, cntlist.rev); Debian's package wordnet-base
has it. The same files give the same bytes. Formats: WordNet's manual pages wndb(5), cntlist(5), morphy(7).
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from inflection import DETACHMENTS, Form, Irregular, detach, inflect
from packing import pack

ASSETS = Path(__file__).resolve().parents[2] / "src" / "declip" / "data" / "assets"
PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
SENSES = 3  # senses of a lemma that may give synonyms, at most
SHARE = 0.25  # ... and each at least this often used as the lemma's most used sense
NOUN_ANIMAL, NOUN_PLANT = 5, 20  # numbers of WordNet's lexicographer files

# Usage domains (pointer ;u). Nobody should be called by the first kind; the second is no everyday English.
OFFENSIVE_USAGE = {"disparagement", "ethnic_slur", "obscenity"}
ODD_USAGE = {"slang", "archaism", "combining_form", "street_name", "Yiddish", "euphemism", "irony"}
BRAND_USAGE = {"trade_name", "trademark"}
# Definitions say it more often than pointers do.
OFFENSIVE_GLOSS = re.compile(
    r"offensive (name|term|word|nick)|ethnic slur|disparag|derogat|obscen|vulgar|pejorat|insulting"
    r"|contemptible"
)
# Senses that no caption needs a second word for.
SKIPPED_GLOSS = re.compile(
    r"\bslang\b|\barchaic\b|\bobsolete\b|\bdialect|sexual|prostitut|intercourse|copulat|genital|masturbat"
    r"|\bsemen\b|\bfec(es|al)\b|defecat|eliminate urine|buttocks"
)
# Words that show nothing, or that WordNet knows in another sense ("who", "it", "in", "us", "as").
_STOP_WORDS = """
a about above across after again against all along also although always am amid among an and another any
anyone anything are around as at away be because been before behind being below beneath beside besides between
beyond both but by can cannot could did do does doing done down during each either else every everyone
everything for from had has have having he her here hers herself him himself his how however i if in inside
into is it its itself just let like many may me might mine more most much must my myself near neither never no
nobody none nor not nothing now of off on once one only onto or other others our ours ourselves out outside
over own per quite rather same shall she should since so some somebody someone something still such than that
the their theirs them themselves then there these they this those though through thus to together too toward
towards under until up upon us very via was we were what when where whether which while who whom whose why
will with within without would yes yet you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
# Crude, dated or belittling words: most are not marked in WordNet, and none may be a word of a phrase either.
_CRUDE_WORDS = """
arse ass asshole barbarian bitch bollock boob bugger cock colored coloured coon crap crapper cretin crone cunt
eskimo fart fuck gipsy goy gyp hag heathen hottentot hussy idiot imbecile infidel loony lunatic midget mongol
moron negro nutcase piss prat rape ravish retard savage shit shitter shitting shrew slut strumpet tit titty
trollop vixen wench whore wino
"""
CRUDE = frozenset(_CRUDE_WORDS.split())

SPELLING = re.compile(r"[A-Za-z]{2}[A-Za-z'_-]*")
UNPRONOUNCEABLE = re.compile(r"[b-df-hj-np-tv-xz]+")  # "ft", but "TV" is a word

# A reading of a word counts only when it is more than a third as likely as the likeliest one.
LEAST_SHARE = 1 / 3
# Captions name things, the tagged prose that the counts come from tells stories. So "leaves" is rather a noun
# than a verb, and "glasses", with an entry of its own, rather what one wears than more than one glass.
FINITE_VERB = 0.2
OWN_PLURAL = 2.0


Chosen = dict[tuple[str, str], tuple[int, list[str]]]  # (lemma, part of speech) -> (uses, synonyms)


class Synset(NamedTuple):
    words: list[str]
    lexicographer_file: int
    usage: list[tuple[int, str]]  # (word it is about, 0 for all; name of the usage domain)
    instance: bool
    definition: str


def read_synsets(folder: Path) -> dict[tuple[str, str], Synset]:
    """Read data.*: (part of speech, offset) -> synset."""
    raw = {}
    for part, name in PARTS.items():
        for line in _lines(folder / f"data.{name}"):
            head, _, gloss = line.partition("|")
            fields = head.split()
            end = 4 + 2 * int(fields[3], 16)
            words = [re.sub(r"\((a|p|ip)\)$", "", word) for word in fields[4:end:2]]
            pointers = fields[end + 1 : end + 1 + 4 * int(fields[end])]
            raw[part, fields[0]] = words, int(fields[1]), pointers, gloss.split('; "')[0].strip()
    synsets = {}
    for key, (words, number, pointers, definition) in raw.items():
        usage, instance = [], False
        for kind, offset, part, ends in zip(*[iter(pointers)] * 4, strict=True):
            instance |= kind == "@i"
            if kind == ";u":
                usage.append((int(ends[:2], 16), raw[part, offset][0][0]))
        synsets[key] = Synset(words, number, usage, instance, definition)
    return synsets


def read_senses(folder: Path) -> dict[tuple[str, str], list[tuple[str, int]]]:
    """Read index.* and cntlist.rev: (lemma, part of speech) -> (offset, uses in tagged texts) by sense."""
    counts = {}
    for line in _lines(folder / "cntlist.rev"):
        key, number, count = line.split()
        lemma, _, sense = key.partition("%")
        counts[lemma, "nvara"[int(sense[0]) - 1], int(number)] = int(count)
    senses = {}
    for part, name in PARTS.items():
        for entry in _lines(folder / f"index.{name}"):
            lemma, _, number, *rest = entry.split()
            offsets = enumerate(rest[-int(number) :], 1)
            senses[lemma, part] = [
                (offset, counts.get((lemma, part, n), 0)) for n, offset in offsets
            ]
    return senses


def read_exceptions(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Read *.exc: (part of speech, irregular form, lemma), single words only."""
    for part in "nva":
        for line in _lines(folder / f"{PARTS[part]}.exc"):
            surface, *lemmas = line.split()
            if "_" not in surface:
                yield from ((part, surface, lemma) for lemma in lemmas if lemma != surface)


def _lines(path: Path) -> Iterator[str]:
    """Return the lines of a WordNet file without the license, whose lines start with two spaces."""
    with path.open(encoding="latin-1") as file:
        yield from (line for line in file if not line.startswith("  "))


class Chooser:
    """Chooses the synonyms of a lemma.

    Args:
        synsets: As `read_synsets` gives them.
        senses: As `read_senses` gives them.
    """

    def __init__(
        self,
        synsets: dict[tuple[str, str], Synset],
        senses: dict[tuple[str, str], list[tuple[str, int]]],
    ) -> None:
        self.synsets = synsets
        self.senses = senses
        self.unwanted = set()  # words with an offensive sense, or brands: never put into a caption
        for synset in synsets.values():
            offensive = OFFENSIVE_GLOSS.search(synset.definition) is not None
            for number, word in enumerate(synset.words, 1):
                domains = {name for about, name in synset.usage if about in (0, number)}
                if offensive or domains & (OFFENSIVE_USAGE | BRAND_USAGE):
                    self.unwanted.add(word.lower())

    def frequent(self, lemma: str, part: str) -> tuple[int, list[str]]:
        """Return how often the lemma's most used sense occurs, and the offsets of its frequent senses."""
        senses = self.senses[lemma, part]
        # "turkey" is the bird, not the country, but "Christmas" has no other form.
        common = [
            sense for sense in senses if lemma in self.synsets[part, sense[0]].words
        ] or senses
        most = max(count for _, count in common)
        first = enumerate(common[:SENSES])
        return most, [o for n, (o, count) in first if (count >= SHARE * most if most else n == 0)]

    def choose(self, lemma: str, part: str) -> tuple[int, list[str]]:
        """Return how often the lemma's most used sense occurs, and its synonyms.

        A sense must be frequent for both words: a "can" may be a toilet, but one doesn't think of it.
        """
        most, offsets = self.frequent(lemma, part)
        found: dict[str, None] = {}
        for offset in offsets:
            synset = self.synsets[part, offset]
            if self._usable(synset):
                for word in self._words(synset, lemma):
                    if offset in self.frequent(word.lower(), part)[1]:
                        found[word.replace("_", " ")] = None
        return most, list(found)

    def only_a_name(self, lemma: str, part: str) -> bool:
        """Return whether a lemma is only a proper name, as "Fields" of two comedians."""
        return all(self.synsets[part, offset].instance for offset, _ in self.senses[lemma, part])

    def _usable(self, synset: Synset) -> bool:
        """Return whether a sense is everyday English: not offensive, a number, or a proper name."""
        domains = {name for about, name in synset.usage if about == 0}
        return not (
            synset.instance
            or domains & (OFFENSIVE_USAGE | ODD_USAGE)
            or OFFENSIVE_GLOSS.search(synset.definition)
            or SKIPPED_GLOSS.search(synset.definition)
            or any(re.search(r"\d", word) for word in synset.words)
        )

    def _words(self, synset: Synset, lemma: str) -> Iterator[str]:
        """Return the other words of a sense, without Latin names of animals and plants."""
        living = synset.lexicographer_file in (NOUN_ANIMAL, NOUN_PLANT)
        latin = living and any(word.islower() for word in synset.words)
        for number, word in enumerate(synset.words, 1):
            domains = {name for about, name in synset.usage if about == number}
            if (
                word.lower() != lemma
                and SPELLING.fullmatch(word)
                and not UNPRONOUNCEABLE.fullmatch(word)
                and word.count("_") < 3
                and not (latin and not word.islower())
                and word.lower() not in self.unwanted
                and CRUDE.isdisjoint(word.lower().split("_"))
                and not domains & ODD_USAGE
            ):
                yield word


class Reading(NamedTuple):
    """One reading of a word: a form of a lemma, with the lemma's synonyms."""

    form: Form
    lemma: str
    synonyms: list[str]
    likelihood: float


class Lexicon:
    """Readings of words, and their synonyms in the same form.

    Args:
        chosen: The lemmas.
        exceptions: (part of speech, irregular form, lemma).
    """

    def __init__(self, chosen: Chosen, exceptions: list[tuple[str, str, str]]) -> None:
        self.irregular = Irregular(exceptions)
        self._parts: defaultdict[str, dict[str, tuple[int, list[str]]]] = defaultdict(dict)
        for (lemma, part), entry in sorted(chosen.items()):
            self._parts[lemma][part] = entry

    def words(self) -> Iterator[str]:
        """Return all words that may have a reading: lemmas and their forms; some twice."""
        yield from self._parts
        yield from self.irregular.words()
        for lemma, parts in self._parts.items():
            for part in parts:
                for ending, instead, _ in DETACHMENTS.get(part, ()):
                    if lemma.endswith(instead):
                        yield lemma[: len(lemma) - len(instead)] + ending

    def readings(self, word: str) -> list[Reading]:
        """List the likely readings of a lowercase word.

        A verb or adjective that is a lemma, or an irregular form, is not also taken apart by rule: "seed" is
        not the past of "see". A noun is: "clocks" is a plant, but rather more than one clock.
        """
        found = [
            Reading(form, lemma, synonyms, (count + 1) * weight)
            for form, lemma, (count, synonyms), weight in self._forms(word)
        ]
        least = LEAST_SHARE * max((reading.likelihood for reading in found), default=0)
        return [reading for reading in found if reading.likelihood > least]

    def _forms(self, word: str) -> Iterator[tuple[Form, str, tuple[int, list[str]], float]]:
        own = self._parts.get(word, {})
        for part, entry in own.items():
            weight = OWN_PLURAL if part == "n" and word.endswith("s") else 1.0
            yield "base", word, entry, FINITE_VERB if part == "v" else weight
        irregular = self.irregular.lemmas(word)
        settled = {*(part for part in own if part != "n"), *(part for part, _, _ in irregular)}
        regular = dict.fromkeys(row for row in detach(word) if row[0] not in settled)
        for part, form, lemma in (*irregular, *regular):
            if entry := self._parts.get(lemma, {}).get(part):
                yield form, lemma, entry, FINITE_VERB if form == "third" else 1.0

    def synonyms(self, word: str) -> list[str]:
        """List the synonyms of a word in the same form, most frequent sense first."""
        found: dict[str, None] = {}
        for reading in sorted(self.readings(word), key=lambda reading: -reading.likelihood):
            for synonym in reading.synonyms:
                inflected = inflect(synonym, reading.form, self.irregular)
                if inflected is not None and word not in (synonym.lower(), inflected.lower()):
                    found[inflected] = None
        return list(found)


def build(folder: Path) -> str:
    """Format the table: one word per line, an empty line, then the synonyms of each, joined by "|"."""
    chooser = Chooser(read_synsets(folder), read_senses(folder))
    chosen: Chosen = {}
    for lemma, part in chooser.senses:
        if SPELLING.fullmatch(lemma) and "_" not in lemma and not chooser.only_a_name(lemma, part):
            chosen[lemma, part] = chooser.choose(lemma, part)
    # A lemma without synonyms is kept where it keeps another reading of the same word away.
    exceptions = sorted(set(read_exceptions(folder)))
    full = Lexicon({key: entry for key, entry in chosen.items() if entry[1]}, exceptions)
    kept = {
        key: entry for key, entry in chosen.items() if entry[1] or entry[0] or full.readings(key[0])
    }
    heads = {
        word.lower()
        for _, words in chosen.values()
        for phrase in words
        for word in phrase.split(" ")
    }
    lexicon = Lexicon(
        kept, [row for row in exceptions if (row[2], row[0]) in kept or row[2] in heads]
    )
    words = sorted({word for word in lexicon.words() if lexicon.readings(word)})
    synonyms = ("" if word in STOP_WORDS else "|".join(lexicon.synonyms(word)) for word in words)
    return "\n".join([*words, "", *synonyms])


def read_license(folder: Path) -> str:
    """Read the license from the head of a data file, whose lines are numbered."""
    with (folder / "data.noun").open(encoding="latin-1") as file:
        lines = [re.sub(r"^ +\d+ ", "", line).rstrip() for line in file if line.startswith("  ")]
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    """Write the table and WordNet's license into the package."""
    parser = argparse.ArgumentParser(
        description="Build the synonym table from WordNet's own files."
    )
    parser.add_argument("wordnet", type=Path, help="folder with WordNet 3.0's dict files")
    folder = parser.parse_args().wordnet
    text = build(folder)
    packed = pack(text.split("\n"))
    (ASSETS / "synonyms.txt.xz").write_bytes(packed)
    (ASSETS / "LICENSE.wordnet.txt").write_text(read_license(folder), encoding="utf-8")
    print(f"{len(text.splitlines()):,} lines, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
