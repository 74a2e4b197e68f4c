"""The entries of the cache: their sizes, what is removed, and the commands."""

import os

import pytest
from filelock import FileLock

from conftest import refuses
from declip.io.cache import LOCK, cache_entries, clear_cache, trim_cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Four folders of features of 1,000 bytes, the later ones used later, and a shard and a built-in set."""
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path))
    for number, name in enumerate(("features/a", "features/b", "features/c", "features/d", "shards/e", "emoji/f")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "rows").write_bytes(bytes(1_000))
        for path in (tmp_path / name / "rows", tmp_path / name):
            os.utime(path, (number + 1, number + 1))
    return tmp_path


def names(cache):
    return {str(entry.path.relative_to(cache)) for entry in cache_entries()}


def test_features_longest_unused_go_first(cache, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE_GB", "2.5e-6")
    with FileLock(cache / "features/b" / LOCK):  # of another process
        os.utime(cache / "features/b", (2, 2))
        trim_cache(keep=[cache / "features/a"])
    assert names(cache) == {"features/a", "features/b", "shards/e", "emoji/f"}
    monkeypatch.setenv("DECLIP_CACHE_GB", "much")
    refuses("DECLIP_CACHE_GB is 'much'", trim_cache, keep=())


def test_clear_keeps_what_cannot_be_computed(cache):
    refuses("'nothing'", clear_cache, "nothing")
    assert clear_cache("shards") == 1_000
    with FileLock(cache / "features/b" / LOCK):  # of another process
        assert clear_cache() == 3_000
    assert names(cache) == {"features/b", "emoji/f"}


def test_the_commands(cache, command):
    shown = command("cache", "show").out
    assert all(part in shown for part in (str(cache), "features", "shards"))
    assert command("cache", "clear", "features").out.split()[:2] == ["0.0", "MB"]
    assert names(cache) == {"shards/e", "emoji/f"}
    wrong = command("cache", "clear", "nothing")
    assert (wrong.status, "'nothing'" in wrong.err) == (2, True)
