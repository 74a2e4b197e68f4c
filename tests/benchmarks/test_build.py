"""How the tables of synonyms and of the built-in sets are made."""

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def scripts():
    """The scripts that build the tables of the built-in sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "scripts" / "builtin"))
        import build_emoji
        import build_icons
        import build_synonyms
        import inflection
    return SimpleNamespace(emoji=build_emoji, icons=build_icons, synonyms=build_synonyms, inflection=inflection)


def test_readings_weigh_uses(scripts):
    chosen = {("leaf", "n"): (20, ["foliage"]), ("leave", "n"): (2, ["holiday"]), ("leave", "v"): (137, ["go away"])}
    lexicon = scripts.synonyms.Lexicon(chosen | {("glee", "n"): (0, [])}, [("n", "leaves", "leaf")])
    (noun, verb) = sorted(lexicon.readings("leaves"), key=lambda reading: reading.lemma)
    assert (noun.form, noun.synonyms, noun.likelihood) == ("plural", ["foliage"], 21)
    assert (verb.form, verb.synonyms, verb.likelihood) == ("third", ["go away"], pytest.approx(27.6))
    assert lexicon.readings("gleeful") == []
    assert lexicon.synonyms("leaves") == ["goes away", "foliages"]
    words = set(lexicon.words())
    assert {"leaf", "leaves", "leaving", "glee", "glees"} <= words
    assert not {"going", "gleeing"} & words


def test_detach_is_wordnets_morphy(scripts):
    detach = scripts.inflection.detach
    boxes = {("n", "plural", "boxe"), ("n", "plural", "box"), ("v", "third", "boxe"), ("v", "third", "box")}
    assert set(detach("boxes")) == boxes
    assert ("v", "ing", "ride") in set(detach("riding"))
    assert ("n", "plural", "fireman") in set(detach("firemen"))
    assert list(detach("grass")) == list(detach("is")) == []


IRREGULAR = [
    ("a", "bigger", "big"),
    ("v", "has", "have"),
    ("v", "ran", "run"),
    ("v", "swam", "swim"),
    ("v", "swum", "swim"),
]
INFLECTED = {
    ("lady", "plural"): "ladies", ("church", "plural"): "churches", ("fireman", "plural"): "firemen",
    ("sheep", "plural"): "sheep", ("break of day", "plural"): "breaks of day", ("go after", "third"): "goes after",
    ("have", "third"): "has", ("run away", "past"): "ran away", ("swim", "past"): None, ("carry", "past"): "carried",
    ("run", "ing"): "running", ("bake", "ing"): "baking", ("tie", "ing"): "tying", ("big", "er"): "bigger",
    ("pretty", "est"): "prettiest", ("blood-red", "er"): "more blood-red",
}  # fmt: skip


def test_inflect(scripts):
    irregular = scripts.inflection.Irregular([*IRREGULAR, ("v", "running", "run")])
    found = {(phrase, form): scripts.inflection.inflect(phrase, form, irregular) for phrase, form in INFLECTED}
    assert found == INFLECTED
    assert irregular.lemmas("has") == [("v", "third", "have")]
    assert irregular.lemmas("unknown") == ()


def test_variants_of_an_emoji_share_a_group(scripts):
    emoji = scripts.emoji
    groups = {
        "man running: facing right": "running", "light blue heart": "heart", "four o’clock": "clock",
        "woman: red hair": "person", "family: man, woman, boy": "family", "flag: France": "country flag",
        "white flag": "flag", "waxing crescent moon": "moon", "moon cake": "moon cake", "woman’s boot": "woman’s boot",
    }  # fmt: skip
    assert {name: emoji.group_of(name) for name in groups} == groups
    assert emoji.code_of("❤️") == emoji.code_of("2764-FE0F") == "2764"
    assert emoji.squash("Côte d’Ivoire & more") == emoji.squash("cote-divoire-and-more")
    phrases = filter(emoji.is_phrase, ("smile", "flag fr", ":D", "u6307", "clock10", "couple ww", "+1", "tv"))
    assert [*phrases] == ["smile"]


def test_style_and_number_of_an_icon_are_taken_off(scripts):
    icons = scripts.icons
    names = {"home-2-line", "home-2-fill", "traffic-light", "traffic-light-light", "receipt-refund-16-solid"}
    assert {name: icons.split_style(name, names) for name in sorted(names)} == {
        "home-2-fill": ("home", "fill"),
        "home-2-line": ("home", "line"),
        "receipt-refund-16-solid": ("receipt-refund", "solid"),
        "traffic-light": ("traffic-light", ""),
        "traffic-light-light": ("traffic-light", "light"),
    }
    assert icons.split_style("video-off", {"video-off"}) == ("video-off", "")
    assert icons.words_of("design-color-bucket", ["Design"]) == ["color", "bucket"]
    assert icons.category_words("FoodDrink") == icons.category_words("Food / Drink") == ["food", "drink"]


def test_names_of_emoji_and_restricted_sets_are_left_out(scripts):
    icons = scripts.icons
    rows = [
        {"name": "cat face", "names": "", "held_out": "0", "group": "cat face"},
        {"name": "person running", "names": "jogger", "held_out": "1", "group": "running"},
    ]
    names = icons.EmojiNames(rows)
    assert names.taboo("cat-face")
    assert names.taboo("clock", "woman running")
    assert not names.taboo("clock", "time")
    assert names.holds_out("Jogger")
    assert not names.holds_out("cat face")
    assert icons.reason_to_leave_out("wpf", {"license": {"spdx": "MIT"}}) == "designer of a test set"
    assert icons.reason_to_leave_out("x", {"license": {"spdx": "CC-BY-NC-4.0"}}) == "license CC-BY-NC-4.0"
    assert icons.reason_to_leave_out("x", {"license": {"spdx": "CC-BY-4.0"}}) is None
