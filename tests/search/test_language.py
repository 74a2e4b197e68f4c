"""Queries in a language that the built-in text encoder does not read."""

from types import SimpleNamespace

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


def test_english_passes_and_other_languages_do_not(built_in):
    assert [text for text in ENGLISH if not seems_english(text, built_in.tokenizer)] == []
    assert [text for text in OTHERS if seems_english(text, built_in.tokenizer)] == []


def test_a_search_says_what_to_do(explained, caplog):
    explained.search("a red circle")
    assert caplog.text == ""
    explained.search("ein roter Kreis")
    assert "open_clip:" in caplog.text


def test_other_models_may_read_other_languages():
    recipe = SimpleNamespace(text=SimpleNamespace(hf_model=None))
    assert language_note("ein roter Apfel", SimpleNamespace(recipe=recipe)) == ""
    assert language_note("ein roter Apfel", SimpleNamespace(recipe=None)) == ""
