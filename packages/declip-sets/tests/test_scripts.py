"""The choice of drawings and names that the scripts make."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def emoji(name, group, held_out, names=""):
    return {"name": name, "names": names, "held_out": held_out, "group": group}


def test_no_icon_has_the_name_of_an_emoji(scripts):
    from build_icons import EmojiNames

    cat = emoji("cat face", "cat face", "0")
    runner = emoji("person running", "running", "1", "jogger")
    names = EmojiNames([cat, runner])
    assert names.taboo("cat-face")
    assert names.taboo("clock", "woman running")
    assert not names.taboo("clock", "time")
    assert names.holds_out("Jogger")
    assert not names.holds_out("cat face")


def test_variants_of_an_emoji_are_one_group(scripts):
    from build_emoji import group_of

    assert group_of("man running: facing right") == "running"
    assert group_of("green heart") == "heart"
    assert group_of("flag: Chad") == "country flag"


def test_a_style_is_a_word_that_siblings_have_in_another_form(scripts):
    from build_icons import split_style

    names = {"home-2-line", "home-2-fill"}
    assert split_style("home-2-line", names) == ("home", "line")
    assert split_style("traffic-light", names) == ("traffic-light", "")


def test_restricted_sets_are_left_out(scripts):
    from build_icons import reason_to_leave_out

    def reason(prefix, license):
        return reason_to_leave_out(prefix, {"license": {"spdx": license}})

    assert reason("wpf", "MIT") == "designer of a test set"
    assert reason("x", "CC-BY-NC-4.0") == "license CC-BY-NC-4.0"
    assert reason("x", "CC-BY-4.0") is None
