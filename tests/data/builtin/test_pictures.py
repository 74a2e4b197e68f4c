"""What all built-in sets share: how one is written, checked, made again, opened and pickled."""

import os
import pickle
import shutil
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np
import pytest

from conftest import refuses
from declip.data.builtin.fetch import Package
from declip.data.builtin.pictures import COLOR, GRAY, MANIFEST, NOTICE, TABLE, BuiltinSet, BuiltinSource, Selection
from declip.data.builtin.sets import BUILTIN_SPLITS, BUILTINS, download, open_builtin
from declip.data.pair import PairSource
from declip.data.sources.open import open_source
from declip.errors import UserError

SIDE = 8
VALUES = {"gray": (9, 9, 9), "red": (200, 0, 0), "copy": (9, 9, 9), "white": (255, 255, 255), "blue": (0, 0, 200)}


class FromFolder:
    """A package that is there already; counts how often it is asked for."""

    def __init__(self):
        self.notice, self.asked = None, 0

    @contextmanager
    def fetched(self):
        self.asked += 1
        yield {"@some/package": Package(self.notice.parent, "1.2", (self.notice,))}


class Plain(BuiltinSet):
    """Squares of one color each, and one that is broken."""

    name, layout, effort, side = "plain", 7, "no time", SIDE
    packages = FromFolder()
    splits = ("plain", "plain-classes")
    interrupted = False

    def choose(self, packages):
        return [{"key": key, "kind": key[0], "captions": [key]} for key in (*VALUES, "broken")]

    def pixels(self, row, packages):
        if self.interrupted and row["key"] == "blue":
            raise KeyboardInterrupt
        return None if row["key"] == "broken" else np.full((SIDE, SIDE, 3), VALUES[row["key"]], np.uint8)

    def credit(self, row):
        return "by nobody"

    def select(self, split, table):
        return Selection(table, "kind" if split == "plain-classes" else None)


PLAIN = Plain()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    (tmp_path / "LICENSE").write_text("free")
    monkeypatch.setattr(PLAIN.packages, "notice", tmp_path / "LICENSE")
    monkeypatch.setattr(PLAIN.packages, "asked", 0)
    PLAIN.download(tmp_path / "cache", progress=False)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("repeated", "kept"), [(False, ["gray", "red", "blue"]), (True, ["gray", "red", "copy", "blue"])]
)
def test_what_is_written(cache, repeated, kept, monkeypatch):
    monkeypatch.setattr(PLAIN, "keeps_repeated", repeated, raising=False)
    folder = PLAIN.folder(cache)
    shutil.rmtree(folder)
    PLAIN.download(cache, progress=False)
    source = BuiltinSource(PLAIN, "plain", cache)
    assert isinstance(source, PairSource)
    assert [source.key(i) for i in range(len(source))] == kept
    assert [source[i].image.getpixel((3, 3)) for i in range(len(source))] == [VALUES[key] for key in kept]
    assert (folder / COLOR).stat().st_size == 2 * SIDE * SIDE * 3
    assert (folder / GRAY).stat().st_size == (len(kept) - 2) * SIDE * SIDE, "a third of the room"
    notice = f"\nby nobody: {len(kept)} drawings\n\n\n@some/package 1.2\nDrawn by resvg-py {version('resvg-py')}\n"
    assert notice in (folder / NOTICE).read_text()
    assert (folder / "licenses/@some-package/LICENSE").read_text() == "free"


def test_a_split_with_classes_is_pickled_without_its_images(cache):
    source = BuiltinSource(PLAIN, "plain-classes", cache)
    content = pickle.dumps(source)
    again = pickle.loads(content)
    assert len(content) < 500
    assert again[2].image.tobytes() == source[2].image.tobytes()
    for one in (source, again):
        assert (one.name, one.credit) == ("builtin:plain-classes", "by nobody")
        assert (one.class_names, one.labels.tolist()) == (("b", "g", "r"), [1, 2, 0])
    assert source.labels.dtype == np.int64
    assert BuiltinSource(PLAIN, "plain", cache).labels is None


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda f: (f / TABLE).write_bytes(b"x"), "Parquet"),
        (lambda f: os.truncate(f / COLOR, 3), "cannot reshape"),
        (lambda f: os.truncate(f / COLOR, 3 * SIDE * SIDE), "images are missing"),
        (lambda f: (f / COLOR).unlink(), "No such file"),
        (lambda f: (f / MANIFEST).write_text('{"layout": 0}'), "another version of declip"),
        (shutil.rmtree, "not there yet"),
    ],
)
def test_damage_is_found_on_opening_and_repaired(cache, harm, reason):
    harm(PLAIN.folder(cache))
    with pytest.raises(UserError) as caught:
        BuiltinSource(PLAIN, "plain", cache)
    assert reason in str(caught.value)
    assert "Run `declip data download builtin:plain` (no time)" in str(caught.value)
    PLAIN.download(cache, progress=False)
    assert len(BuiltinSource(PLAIN, "plain", cache)) == 3


def test_an_interrupted_build_leaves_what_was_there(cache, monkeypatch):
    folder = PLAIN.folder(cache)
    before = (folder / MANIFEST).read_text()
    monkeypatch.setattr(PLAIN, "interrupted", True, raising=False)
    with PLAIN.packages.fetched() as packages, pytest.raises(KeyboardInterrupt):
        PLAIN.build(packages, folder)
    PLAIN.read(folder)
    assert (folder / MANIFEST).read_text() == before
    shutil.rmtree(folder)
    with PLAIN.packages.fetched() as packages, pytest.raises(KeyboardInterrupt):
        PLAIN.build(packages, folder)
    assert list(cache.iterdir()) == []


def test_names_are_looked_up(cache, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(cache))
    assert len(BUILTINS) == 14
    for name in {*BUILTINS, *BUILTIN_SPLITS["stamps-kinds"].values()}:
        refuses(f"Run `declip data download builtin:{name.split('-')[0]}`", open_source, f"builtin:{name}")
    monkeypatch.setitem(BUILTINS, "plain", PLAIN)
    assert isinstance(open_builtin("builtin:plain"), BuiltinSource)
    assert len(open_source("builtin:plain")) == 3
    assert download("builtin:plain") == download("plain", cache) == cache / "plain"
