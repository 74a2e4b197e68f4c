"""Queries in a language that the built-in text encoder does not read."""

from types import SimpleNamespace

import pytest

import declip
from declip.interchange import starter
from declip.search.language import language_note, seems_english

ENGLISH = [
    "a red apple",
    "mushrooms",
    "a giraffe",
    "Norwegian Elkhound",
    "chanterelle",
    "a dog on the beach",
    "NGC 224, 1.5 m",
    "",
]
OTHERS = [
    "ein roter Apfel",
    "Zwiebel",
    "une pomme rouge",
    "una manzana roja",
    "kobieta z psem",
    "stół",
    "りんご",
    "красное яблоко",
]


@pytest.fixture(scope="module")
def model():
    if not starter.installed("builtin:lite0-minilm"):
        pytest.skip("the built-in start is not installed")
    return declip.load("builtin:lite0-minilm")


def test_english_passes_and_other_languages_do_not(model):
    assert [text for text in ENGLISH if not seems_english(text, model.tokenizer)] == []
    assert [text for text in OTHERS if seems_english(text, model.tokenizer)] == []


def test_a_search_says_what_to_do(model, tmp_path, folder, caplog):
    index = declip.embed(model, folder, out=tmp_path / "index", workers=0)
    index.search("a red circle")
    assert caplog.text == ""
    index.search("ein roter Kreis")
    assert "open_clip:" in caplog.text


def test_other_models_may_read_other_languages():
    recipe = SimpleNamespace(text=SimpleNamespace(hf_model=None))
    assert language_note("ein roter Apfel", SimpleNamespace(recipe=recipe)) == ""
    assert language_note("ein roter Apfel", SimpleNamespace(recipe=None)) == ""
