"""How the synonym table is built: English inflection, and the readings of a word."""

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def scripts():
    """The two files of benchmarks/ that build the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        import build_synonyms
        import inflection
    return SimpleNamespace(**vars(inflection), Lexicon=build_synonyms.Lexicon)


@pytest.fixture(scope="module")
def irregular(scripts):
    return scripts.Irregular(IRREGULAR)


def test_readings_weigh_uses(scripts):
    chosen = {("leaf", "n"): (20, ["foliage"]), ("leave", "n"): (2, ["holiday"]), ("leave", "v"): (137, ["go away"])}
    lexicon = scripts.Lexicon(chosen | {("glee", "n"): (0, [])}, [("n", "leaves", "leaf")])
    (noun, verb) = sorted(lexicon.readings("leaves"), key=lambda reading: reading.lemma)
    assert (noun.form, noun.synonyms, noun.likelihood) == ("plural", ["foliage"], 21)
    assert (verb.form, verb.synonyms, verb.likelihood) == ("third", ["go away"], pytest.approx(27.6))
    assert lexicon.readings("gleeful") == []
    assert [reading.synonyms for reading in lexicon.readings("glee")] == [[]]
    assert lexicon.synonyms("leaves") == ["goes away", "foliages"]
    words = set(lexicon.words())
    assert {"leaf", "leaves", "leaving", "glee", "glees"} <= words
    assert not {"going", "gleeing"} & words


def test_detach_is_wordnets_morphy(scripts):
    detach = scripts.detach
    boxes = {("n", "plural", "boxe"), ("n", "plural", "box"), ("v", "third", "boxe"), ("v", "third", "box")}
    assert set(detach("boxes")) == boxes
    assert ("v", "ing", "ride") in set(detach("riding"))
    assert ("n", "plural", "fireman") in set(detach("firemen"))
    assert list(detach("grass")) == list(detach("is")) == []


IRREGULAR = [
    ("a", "bigger", "big"),
    ("a", "biggest", "big"),
    ("n", "geese", "goose"),
    ("v", "has", "have"),
    ("v", "ran", "run"),
    ("v", "running", "run"),
    ("v", "swam", "swim"),
    ("v", "swum", "swim"),
    ("v", "was", "be"),
]


@pytest.mark.parametrize(
    ("phrase", "form", "expected"),
    [
        ("lady", "plural", "ladies"),
        ("church", "plural", "churches"),
        ("fireman", "plural", "firemen"),
        ("sheep", "plural", "sheep"),
        ("break of day", "plural", "breaks of day"),
        ("go after", "third", "goes after"),
        ("have", "third", "has"),
        ("run away", "past", "ran away"),
        ("swim", "past", None),
        ("carry", "past", "carried"),
        ("run", "ing", "running"),
        ("bake", "ing", "baking"),
        ("tie", "ing", "tying"),
        ("big", "er", "bigger"),
        ("pretty", "est", "prettiest"),
        ("blood-red", "er", "more blood-red"),
    ],
)
def test_inflect(scripts, irregular, phrase, form, expected):
    assert scripts.inflect(phrase, form, irregular) == expected


def test_irregular_forms_have_their_lemmas(irregular):
    assert irregular.lemmas("was") == [("v", "past", "be")]
    assert irregular.lemmas("has") == [("v", "third", "have")]
    assert irregular.lemmas("biggest") == [("a", "est", "big")]
    assert irregular.lemmas("unknown") == ()
