import pickle

import numpy as np
import pytest
from PIL import Image

from declip.data.pair import (
    EXAMPLES_KEPT,
    LONGEST_CAPTION,
    BrokenPair,
    Pair,
    PairSource,
    SkipCounter,
    clean_captions,
)
from declip.data.sources.folder import FolderSource
from declip.data.sources.open import open_source
from declip.data.sources.table import TableSource
from declip.errors import UserError


def test_captions_are_stripped_joined_and_distinct():
    assert clean_captions(["  a \n cat", "", None, "a cat", "dog"], "k") == ("a cat", "dog")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ([], "empty caption"),
        (["", " \t\n", None], "empty caption"),
        (["ok", "x" * 100_000], "caption too long"),
        (["x" * (LONGEST_CAPTION + 1)], "caption too long"),
        (["half \ud800 a letter"], "invalid text"),
    ],
)
def test_captions_that_cannot_be_used(raw, reason):
    with pytest.raises(BrokenPair) as caught:
        clean_captions(raw, "the key")
    assert caught.value.reason == reason
    assert caught.value.key == "the key"


def test_the_longest_caption_is_kept():
    assert len(clean_captions(["x" * LONGEST_CAPTION], "k")[0]) == LONGEST_CAPTION


def test_broken_pair_survives_pickling():
    again = pickle.loads(pickle.dumps(BrokenPair("missing image", "a.jpg", "no such file")))
    assert (again.reason, again.key, again.detail) == ("missing image", "a.jpg", "no such file")
    assert str(again) == "missing image: a.jpg (no such file)"


def test_skip_counter_counts_all_and_keeps_few_examples():
    counter = SkipCounter()
    for number in range(9):
        counter.add(BrokenPair("missing image", f"{number}.jpg"))
    counter.add(BrokenPair("empty caption", "x"))
    counter.add(BrokenPair("empty caption", "x"))
    state = counter.to_dict()["reasons"]
    assert list(state) == ["empty caption", "missing image"]
    assert state["missing image"] == {"count": 9, "examples": [f"{n}.jpg" for n in range(EXAMPLES_KEPT)]}
    assert state["empty caption"] == {"count": 2, "examples": ["x"]}
    assert counter.total == 11
    assert counter.share(22) == 0.5
    assert SkipCounter().share(0) == 0.0
    again = SkipCounter.from_dict(counter.to_dict())
    again.add(BrokenPair("empty caption", "y"))
    assert again.total == 12
    assert counter.total == 11


def test_open_source_tells_tables_from_folders(tmp_path):
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("black\n")
    (tmp_path / "t.jsonl").write_text('{"picture": "a.png", "words": "black"}\n')
    folder = open_source(tmp_path)
    table = open_source(f"{tmp_path}/t.jsonl", image_column="picture", caption_column="words")
    assert isinstance(folder, FolderSource)
    assert isinstance(table, TableSource)
    for source in (folder, table):
        assert isinstance(source, PairSource)
        assert len(source) == 1
        pair = source[0]
        assert isinstance(pair, Pair)
        assert (pair.key, pair.captions, pair.keywords) == ("a.png", ("black",), ())
        assert (pair.image.mode, pair.image.size) == ("RGB", (2, 2))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("nowhere.csv", "no file or folder 'nowhere.csv'"),
        ("builtin:emojy", "Did you mean 'emoji'?"),
        ("builtin:", "emoji-validation"),
    ],
)
def test_open_source_says_what_is_wrong(spec, told):
    with pytest.raises(UserError, match=None) as caught:
        open_source(spec)
    assert told in str(caught.value)


def test_open_source_refuses_other_files(tmp_path):
    (tmp_path / "pairs.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError) as caught:
        open_source(tmp_path / "pairs.xlsx")
    assert "'pairs.xlsx' is not a table" in str(caught.value)
    assert ".jsonl, .json, .csv, .tsv, .parquet" in str(caught.value)
