"""Sharding a source: what is read back is what was there, whatever it is called, left out, or stopped."""

import json
import multiprocessing
import os
import re
import signal
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from conftest import draw, refuses
from data.fakes import jpeg, picture, scene, write_tar
from declip.data.pair import BrokenPair, LazyImage, Pair, PairSource
from declip.data.prepare import downscaled_bytes, read_exclusions, shard_source, write_exclusions
from declip.data.sources.open import open_source

pytestmark = pytest.mark.usefixtures("cache")


class Source(PairSource):
    """Pairs with what is hard to write down; some broken."""

    name = "hostile"
    credit = "drawn by somebody"
    keys = ("../../etc/passwd", "a.b.c", "same", "same", "/elsewhere/x", "", "ünï\n\udcff", "CON")
    said = (
        ("one",), ("one", "two \\ lines'"), ("\ufeffmarked",), ('"quoted" \\ {json}',), ("日本語 🐈",),
        ("one", "\ufefftwo"), ("x" * 20_000,), ("one",),
    )  # fmt: skip

    def __init__(self, broken=(), slow=None):
        self.broken, self.slow = broken, slow

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        time.sleep(60 if index == self.slow else 0)
        if index in self.broken:
            raise BrokenPair("missing image", self.keys[index])
        return Pair(self.keys[index], scene(40 + index, 30), self.captions(index))

    def captions(self, index):
        return self.said[index]


@pytest.fixture
def folder(tmp_path):
    """Nine pairs: pictures large and small, a PNG, and two that are broken."""
    where = tmp_path / "pairs"
    where.mkdir()
    for number in range(9):
        (where / f"{number}.jpg").write_bytes(jpeg(scene(300 + number, 200 + number, number)))
        (where / f"{number}.txt").write_text(f"picture {number}\nscene {number}" if number % 2 else f"picture {number}")
    (where / "1.jpg").write_bytes(jpeg()[:-300])
    (where / "4.txt").unlink()
    turned = Image.Exif()
    turned[0x0112] = 6
    (where / "5.jpg").write_bytes(jpeg(scene(60, 40), exif=turned))
    draw("red", "circle", 100).save(where / "6.png")
    (where / "6.jpg").unlink()
    return where


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


SMALL = {"size": 48, "shard_pairs": 4, "workers": 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_back_is_what_was_there(folder, tmp_path, workers):
    made = shard_source(folder, tmp_path / "made", **SMALL | {"workers": workers})
    before, after = open_source(folder), open_source(tmp_path / "made")
    assert (made.pairs, made.shards) == (len(after), 3) == (7, 3)
    assert "7 pairs, 3 shards," in made.summary()
    assert "Left out: 1 × truncated image, such as 1.jpg" in made.summary()
    assert made.skipped.examples == {"truncated image": ["1.jpg"], "missing caption": ["4.jpg"]}
    assert made.bytes == sum(path.stat().st_size for path in (tmp_path / "made").glob("*.tar"))
    assert json.loads((tmp_path / "made/sizes.json").read_text()) == {"000000.tar": 3, "000001.tar": 3, "000002.tar": 1}
    for place, index in enumerate((0, 2, 3, 5, 6, 7, 8)):
        old, new = before[index], after[place]
        assert new.key == f"{index // 4:06d}.tar/{index:09d}"
        assert new.captions == old.captions
        shrunk_to = tuple(max(48, round(side * 48 / min(old.image.size))) for side in old.image.size)
        assert new.image.size == (old.image.size if index == 5 else shrunk_to)
        expected = np.asarray(old.image.resize(new.image.size, Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(expected - np.asarray(new.image)).mean() < 4
    with tarfile.open(tmp_path / "made/000001.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert members["000000005.jpg"] == (folder / "5.jpg").read_bytes(), "turned, and small enough"
    assert {name for name in members if not name.endswith("jpg")} == {
        "000000005.json", "000000006.png", "000000006.txt", "000000007.json",
    }  # fmt: skip


def test_hostile_names_and_captions(tmp_path):
    source = Source(broken=(3,))
    shard_source(source, tmp_path / "made", size=256, workers=0)
    after = open_source(tmp_path / "made")
    found = [(after[place].captions, after[place].image.width) for place in range(len(after))]
    assert found == [(source.said[index], 40 + index) for index in range(len(source)) if index != 3]
    assert (tmp_path / "made/NOTICE.txt").read_text() == "drawn by somebody\n"
    with tarfile.open(tmp_path / "made/000000.tar") as tar:
        assert all(re.fullmatch(r"\d{9}\.(jpg|png|txt|json)", name) for name in tar.getnames())


def test_only_shards_that_are_missing_or_cut_short_are_made_again(folder, tmp_path):
    out = tmp_path / "made"
    shard_source(folder, out, **SMALL)
    whole, first = files(out), (out / "000000.tar").stat().st_mtime_ns
    (out / "000001.tar").write_bytes(whole["000001.tar"][:-512])
    (out / "000002.tar").unlink()
    again = shard_source(folder, out, **SMALL)
    assert (again.pairs, again.skipped.total, files(out)) == (7, 2, whole)
    assert (out / "000000.tar").stat().st_mtime_ns == first


def test_it_continues_after_a_kill(tmp_path):
    out = tmp_path / "made"

    def shard_slowly():
        os.setsid()
        shard_source(Source(slow=6), out, **SMALL | {"workers": 1})

    process = multiprocessing.get_context("fork").Process(target=shard_slowly)
    process.start()
    end = time.monotonic() + 60
    while not list(out.glob(".000001.tar.*.partial")) and time.monotonic() < end:
        time.sleep(0.02)
    refuses("Another process", shard_source, Source(), out, **SMALL)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert files(out).keys() == {"000000.tar", "prepared.json"}
    first = (out / "000000.tar").stat().st_mtime_ns
    shard_source(Source(), out, **SMALL)
    shard_source(Source(), tmp_path / "at once", **SMALL)
    assert files(out) == files(tmp_path / "at once")
    assert (out / "000000.tar").stat().st_mtime_ns == first
    assert not list(out.glob(".*.partial"))


def test_a_folder_of_something_else_is_left_alone(folder, tmp_path):
    shard_source(folder, tmp_path / "made", **SMALL)
    before = files(tmp_path / "made")
    for changed, message in (({"size": 50}, "size was 48, now 50"), ({"shard_pairs": 5}, "shard_pairs was 4, now 5")):
        refuses(f"option: {message}.*--out", shard_source, folder, tmp_path / "made", **SMALL | changed)
    (folder / "9.jpg").write_bytes(jpeg())
    refuses(r"content was .*; pairs was 9, now 10", shard_source, folder, tmp_path / "made", **SMALL)
    assert files(tmp_path / "made") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    refuses(r"'thesis\.tex'", shard_source, folder, tmp_path / "mine", **SMALL)
    assert files(tmp_path / "mine") == {"thesis.tex": b""}
    (tmp_path / "mine/prepared.json").write_text('{"made_of": 5, "shards": {}}')
    refuses(r"prepared\.json' cannot be read", shard_source, folder, tmp_path / "mine", **SMALL)


def test_a_shard_without_a_good_pair_and_a_source_without_any(tmp_path):
    source = Source(broken=range(4))
    made = shard_source(source, tmp_path / "made", shard_pairs=4, workers=0)
    assert (made.pairs, made.shards, made.skipped.counts) == (4, 2, {"missing image": 4})
    assert len(open_source(tmp_path / "made")) == 4
    nothing = Source(broken=range(8))
    refuses(r"None of the 8 pairs of 'hostile' can be used: 8 ×", shard_source, nothing, tmp_path / "none", workers=0)
    assert downscaled_bytes(LazyImage(scene(70_000, 2)), 256)[0] == "png", "longer than JPEG allows"


@pytest.fixture
def twice(tmp_path):
    """Four pairs with three keys: the second and the third share theirs."""
    rows = (("a", "one"), ("b", "two"), ("b", "wrong"), ("c", "four"))
    members = [(f"{n}.{end}", c) for n, said in rows for end, c in (("png", picture(1)), ("txt", said.encode()))]
    return write_tar(tmp_path / "t.tar", members)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\n", "names no pair"),
        (b"\xff\xfe\x00", "utf-8"),
        (b"key,place\na,x\n", "cannot be read"),
        (b"[1]\n", "cannot be read"),
        (b'{"key": "t.tar/c", "place": 1, "reason": "moved"}\n', "'t.tar/c' at index 1"),
        (b'{"key": "t.tar/c", "place": 4, "reason": "gone"}\n', "'t.tar/c' at index 4"),
    ],
)
def test_a_wrong_list_is_refused(twice, tmp_path, content, said):
    (tmp_path / "list").write_bytes(content)
    refuses(said, read_exclusions, tmp_path / "list", open_source(twice))
    refuses("cannot be read", read_exclusions, tmp_path / "nowhere", open_source(twice))


def test_pairs_on_the_list_are_left_out_and_counted_by_reason(twice, tmp_path):
    rows = [("t.tar/b", 2, "image and caption disagree", 0.1, "wrong"), ("t.tar/c", 3, "\ud800\x1bodd" * 30, None, "")]
    (tmp_path / "drop.jsonl").write_text(write_exclusions(rows), encoding="utf-8")
    made = shard_source(twice, tmp_path / "out", exclude=tmp_path / "drop.jsonl", workers=0)
    assert made.pairs == 2
    odd, first = sorted(made.skipped.counts, key=len, reverse=True)
    assert (first, len(odd), odd.isprintable()) == ("image and caption disagree", 80, True)
    assert "Left out: 1 × image and caption disagree, such as t.tar/b" in made.summary()
    kept = open_source(tmp_path / "out")
    assert [kept.captions(place) for place in range(len(kept))] == [("one",), ("two",)]
    assert json.loads((tmp_path / "out/sizes.json").read_text()) == {"000000.tar": 2}
    refuses("content was", shard_source, twice, tmp_path / "out", workers=0)
