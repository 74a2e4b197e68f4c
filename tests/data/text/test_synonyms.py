"""The shipped synonym table: the one that was reviewed, its forms, and words against WordNet's."""

import hashlib
import re
from importlib.resources import files

import pytest

from declip.data.text.augment import synonyms, table
from golden_cases import read_json

ASSETS = files("declip.data").joinpath("assets")
OFFICIAL = read_json("eda_cases.json").get("synonyms", {})


def test_the_table_is_the_one_that_was_reviewed_and_has_its_license():
    """Without names, numbers, rare senses and offensive words; a new table by scripts/builtin is to be read again."""
    content = "\n".join([*table(), "", *table().values()])
    assert (
        hashlib.sha256(content.encode()).hexdigest()
        == "fd10997d4c702d15824eb61124182fec4c8b44d853800cc1d8c2207c05607ff6"
    )
    assert "WordNet 3.0" in ASSETS.joinpath("LICENSE.wordnet.txt").read_text(encoding="utf-8")


INFLECTED = {
    "dog": "domestic dog", "dogs": "domestic dogs", "sofas": "couches", "cities": "metropolises", "ran": "ran away",
    "women": "adult females", "jumping": "leaping", "jumps": "leaps", "stopped": "halted", "bigger": "larger",
}  # fmt: skip


def test_words_have_synonyms_in_their_form():
    assert all(expected in synonyms(word) for word, expected in INFLECTED.items())
    assert synonyms("bed") == synonyms("two") == synonyms("fields of") == synonyms("") == ()


def as_the_authors_write(synonym):
    """Lower case, hyphens as spaces, no other signs."""
    return re.sub(r"[^a-z ]", "", synonym.lower().replace("-", " "))


def is_form_of(synonym, lemma):
    """WordNet's synonyms are lemmas, ours follow the caption's word: "hightails it" is a form of "hightail it"."""
    ours, theirs = synonym.split(), lemma.split()
    stems = [{a, *(a[:-cut] + ending for cut in range(1, 5) for ending in ("", "e", "y"))} for a in ours]
    return len(ours) == len(theirs) and all(b in stem for b, stem in zip(theirs, stems, strict=True))


@pytest.mark.golden
@pytest.mark.parametrize("word", [word for word in OFFICIAL if len(word) > 1])
def test_synonyms_are_some_of_wordnets(word):
    """Lemmas of the most frequent senses only: for "dog" the animal, not the andiron."""
    ours, theirs = synonyms(word.lower()), set(OFFICIAL[word])
    assert all(any(is_form_of(as_the_authors_write(synonym), lemma) for lemma in theirs) for synonym in ours)
