"""Remote shards through fsspec: fetched when needed, kept within a limit, and what happens when they cannot be."""

import itertools
import json
import os
import pickle
import shutil
import sys
import time

import pytest

from conftest import refuses
from data.fakes import SIZES, message, reason_of, write_shards
from declip.data.pair import BrokenPair
from declip.data.sources import shard_files
from declip.data.sources.open import open_source
from declip.data.sources.shards import ShardSource

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def copies(cache, monkeypatch):
    monkeypatch.setattr(shard_files, "PAUSE", 0.0)
    return cache / "shards/copies"


@pytest.fixture
def memory(tmp_path, copies):
    """The shards in fsspec's memory; without the rest of what may be there."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in sorted(write_shards(tmp_path / "origin", SIZES).iterdir()):
        system.pipe_file(f"/set/{path.name}", path.read_bytes())
    yield system
    system.store.clear()


def kept(copies):
    return sorted(copies.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns)


def numbers(source):
    """The numbers of the pictures, which their captions tell."""
    return [int(source[i].captions()[0].removeprefix("picture ")) for i in range(len(source))]


ALL = list(range(21))


def test_urls_are_read_as_files_are_and_fetched_once(memory, copies, monkeypatch):
    fetched, fetch = [], shard_files.fetch
    monkeypatch.setattr(
        shard_files, "fetch", lambda *given: fetched.append(given[0]) or fetch(*given)
    )
    for word in ("memory://set/{00000..00003}.tar", "memory://set", "memory://set/*.tar"):
        source = open_source(word)
        assert numbers(source) == numbers(pickle.loads(pickle.dumps(source))) == ALL
        assert source.remote
    assert source[7].open().decoded().getpixel((0, 0)) == (7, 0, 7)
    assert sorted(fetched[4:]) == [f"memory:///set/{n:05d}.tar" for n in range(4)]
    assert {path.name for path in copies.iterdir()} == {path.name for path in kept(copies)}


def test_signed_urls(memory, copies, monkeypatch):
    count, info = itertools.count(), type(memory).info

    def led_to(*given, **options):
        return {**info(*given, **options), "url": f"https://x/?X-Amz-Signature={next(count)}"}

    monkeypatch.setattr(type(memory), "info", led_to)
    signed = "set/00002.tar?X-Amz-Credential=a/b&X-Amz-Signature=c"
    memory.pipe_file(f"/{signed}", memory.cat_file("/set/00002.tar"))
    for _ in range(2):
        source = open_source(f"memory://{signed}")
        assert (numbers(source), source[0].key) == (ALL[6:15], "00002.tar/000000006")
    assert len(kept(copies)) == 1


def test_what_was_not_used_for_longest_goes_when_there_is_no_room(memory, copies, monkeypatch):
    sizes = [memory.info(f"/set/{number:05d}.tar")["size"] for number in range(4)]
    monkeypatch.setenv("DECLIP_CACHE_GB", str((sizes[0] + sizes[2]) / 1e9))
    source = ShardSource("memory://set")
    shutil.rmtree(copies)
    for index in (
        0,
        5,
        15,
        1,
        6,
    ):  # of shards 0, 1 and 3, which fit, 0 again, so 1 is the oldest, and 2
        source[index].captions()
        time.sleep(0.01)
    assert [path.stat().st_size for path in kept(copies)] == [sizes[0], sizes[2]]
    assert numbers(source) == ALL


def test_a_copy_that_others_remove_at_once_is_read_all_the_same(memory, copies, monkeypatch):
    monkeypatch.setattr(shard_files, "trim_cache", lambda folder, keep: keep[0].unlink())
    source = ShardSource("memory://set")
    assert numbers(source) == ALL
    assert not kept(copies)


def test_counts_next_to_the_shards_save_reading_them_first(memory, copies):
    memory.pipe_file(
        "/set/sizes.json",
        json.dumps({f"{n:05d}.tar": size for n, size in enumerate(SIZES)}).encode(),
    )
    source = ShardSource("memory://set")
    assert source.shards().tolist() == list(SIZES)
    assert not kept(copies)
    assert (source[7].captions(), len(kept(copies))) == (("picture 7",), 1)
    memory.pipe_file("/set/sizes.json", b'{"00001.tar": 3, "00002.tar": 2}')
    source = ShardSource("memory://set")
    assert source.shards().tolist() == [5, 3, 2, 6]
    assert reason_of(source, 6) == "missing in shard"
    memory.pipe_file("/set/sizes.json", b'{"00001.tar": "3"}')
    refuses(r"sizes\.json: ValueError: not a number", ShardSource, "memory://set")


def test_a_shard_that_cannot_be_fetched_breaks_its_pairs_and_is_not_asked_for_each_time(
    memory, copies, monkeypatch
):
    source = ShardSource("memory://set")
    shutil.rmtree(copies)
    asked = []

    def fail(self, path, *_, **__):
        asked.append(path)
        raise TimeoutError("no answer\nafter a while")

    monkeypatch.setattr(type(memory), "get_file", fail)
    for index in (6, 7, 8):
        with pytest.raises(
            BrokenPair, match=r"unreadable shard: 00002.tar/.*tar: TimeoutError: no answer\)"
        ):
            source[index].open()
    assert len(asked) == shard_files.TRIES
    monkeypatch.undo()
    monkeypatch.setenv("DECLIP_CACHE", str(copies.parents[1]))
    monkeypatch.setattr(shard_files, "RESTING", 0.0)
    assert source[6].captions() == ("picture 6",)


def test_a_download_that_comes_short_is_tried_again(memory, monkeypatch):
    tries, get_file = [], type(memory).get_file

    def short(self, path, target, **options):
        get_file(self, path, target, **options)
        os.truncate(target, 1000 if not tries else os.path.getsize(target))
        tries.append(path)

    monkeypatch.setattr(type(memory), "get_file", short)
    assert ShardSource("memory://set/00002.tar")[0].captions() == ("picture 6",)
    assert len(tries) == 2


def test_what_is_not_there(copies, monkeypatch):
    fsspec.filesystem("memory").store.clear()
    for word, says in (
        ("gcs://bucket/00000.tar", "gcsfs"),
        ("memory://none/00000.tar", "memory://none/00000.tar: FileNotFoundError"),
        ("memory://none", "no .tar file"),
        ("memory://none/*.tar", "no .tar file"),
        ("nosuch://x/a.tar", "Protocol not known: nosuch"),
    ):
        assert says in message(word)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    assert "pip install 'declip[remote]'" in message("s3://bucket/00000.tar")
