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
        import inflection
    return SimpleNamespace(emoji=build_emoji, icons=build_icons, inflection=inflection)


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
    detach = scripts.inflection.detach
    boxes = {("n", "plural", "boxe"), ("n", "plural", "box"), ("v", "third", "boxe"), ("v", "third", "box")}
    assert set(detach("boxes")) == boxes
    assert list(detach("grass")) == list(detach("is")) == []
    irregular = scripts.inflection.Irregular([*IRREGULAR, ("v", "running", "run")])
    found = {(phrase, form): scripts.inflection.inflect(phrase, form, irregular) for phrase, form in INFLECTED}
    assert found == INFLECTED
    assert irregular.lemmas("has") == [("v", "third", "have")]
    assert irregular.lemmas("unknown") == ()


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
    assert icons.split_style("home-2-line", {"home-2-line", "home-2-fill"}) == ("home", "line")
    assert scripts.emoji.group_of("man running: facing right") == "running"
    assert icons.reason_to_leave_out("wpf", {"license": {"spdx": "MIT"}}) == "designer of a test set"
    assert icons.reason_to_leave_out("x", {"license": {"spdx": "CC-BY-NC-4.0"}}) == "license CC-BY-NC-4.0"
    assert icons.reason_to_leave_out("x", {"license": {"spdx": "CC-BY-4.0"}}) is None
