"""The rules by which the tables of the built-in sets are made."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
        import build_emoji
        import build_icons
    return build_emoji, build_icons


def test_variants_of_an_emoji_share_a_group(scripts):
    emoji, _ = scripts
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


@pytest.mark.parametrize(("name", "others", "shown", "style"), [
    ("home-2-line", ["home-2-fill"], "home", "line"),
    ("traffic-light", ["traffic-cone"], "traffic-light", ""),
    ("traffic-light-light", ["traffic-light"], "traffic-light", "light"),
    ("receipt-refund-16-solid", [], "receipt-refund", "solid"),
    ("video-off", [], "video-off", ""),
])  # fmt: skip
def test_style_and_number_of_an_icon_are_taken_off(scripts, name, others, shown, style):
    _, icons = scripts
    assert icons.split_style(name, {name, *others}) == (shown, style)
    assert icons.words_of("design-color-bucket", ["Design"]) == ["color", "bucket"]
    assert icons.category_words("FoodDrink") == icons.category_words("Food / Drink") == ["food", "drink"]


def test_names_of_emoji_and_restricted_sets_are_left_out(scripts):
    _, icons = scripts
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
    assert icons.reason_to_leave_out("x", {"license": {"spdx": "CC-BY-NC-4.0"}}) == "licence CC-BY-NC-4.0"
    assert icons.reason_to_leave_out("x", {"license": {"spdx": "CC-BY-4.0"}}) is None
