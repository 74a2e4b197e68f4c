"""The cache of vectors: shared by processes, and what happens when it is damaged, read-only or removed."""

import shutil
import sqlite3

import pytest
import torch

from conftest import read_only, refuses
from declip.search.vectors import FILE, VectorCache, text_key

KEYS = [b"1" * 16, b"2" * 16, b"1" * 16]


def numbers(times):
    """Compute vectors by their positions."""
    return lambda missing: torch.tensor([[times * (1.0 + position)] * 2 for position in missing])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.mark.parametrize("padding", [0, 1, 49])
def test_a_caption_has_one_key_for_every_padded_length(padding):
    ids = [5, 0, 1, 49, 7]
    keys = {text_key(torch.tensor(ids + [padding] * count), padding) for count in (0, 1, 9)}
    assert len(keys) == 1
    assert text_key(torch.tensor([*ids, 8]), padding) not in keys


def test_processes_share_vectors_and_a_kill_loses_nothing(cache):
    first, second = VectorCache("a"), VectorCache("a")
    assert first.of(KEYS, numbers(1)).tolist() == [[1, 1], [2, 2], [1, 1]]
    with sqlite3.connect(first.folder / FILE) as file:  # as a killed process leaves it
        file.execute("DELETE FROM vectors WHERE key = ?", (KEYS[1],))
    assert second.of(KEYS, numbers(10)).tolist() == [[1, 1], [20, 20], [1, 1]]
    assert first.of(KEYS, numbers(0)).tolist() == [[1, 1], [20, 20], [1, 1]]


def test_many_vectors_are_found(cache):
    keys = [number.to_bytes(16, "little") for number in range(1_300)]
    store = VectorCache("a")
    store.add(keys, torch.arange(1_300.0)[:, None])
    assert store.of(keys[::-1], None).flatten().tolist() == [*range(1_299, -1, -1)]


def test_a_process_keeps_its_vectors_and_continues_without_them(cache, command):
    store = VectorCache("a")
    assert store.of(KEYS, numbers(1)).tolist() == [[1, 1], [2, 2], [1, 1]]
    assert (command("cache", "clear").out.split()[0], (cache / "a" / FILE).exists()) == (
        "0.0",
        True,
    )
    shutil.rmtree(cache)
    assert store.of(KEYS, numbers(1)).tolist() == [[1, 1], [2, 2], [1, 1]]


def test_a_read_only_cache_is_read_and_named_if_it_lacks_vectors(cache):
    VectorCache("a").of(KEYS, numbers(1))

    def work():
        store = VectorCache("a")
        assert store.of(KEYS[::-1], None).tolist() == [[1, 1], [2, 2], [1, 1]]
        refuses("The cached vectors in .*DECLIP_CACHE", store.of, [b"3" * 16], numbers(1))

    read_only(cache, work)


def test_a_damaged_file_is_named(cache):
    store = VectorCache("a")
    (store.folder / FILE).write_bytes(b"no database" * 1000)
    refuses("DECLIP_CACHE", store.of, KEYS, numbers(1))
