import pickle

import numpy as np
import pytest
from PIL import Image

from data.tables import reason_of
from declip.data.images.decode import decode
from declip.data.pair import LONGEST_CAPTION, BrokenPair
from declip.data.sources.folder import FolderSource


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((3, 4, 3), value, np.uint8)).save(path)


def test_images_are_found_below_and_sorted(tmp_path):
    picture(tmp_path / "b.PNG", 9)
    picture(tmp_path / "a/z.jpg", 5)
    picture(tmp_path / "a/c.webp", 7)
    picture(tmp_path / ".hidden/x.png")
    picture(tmp_path / "._b.png")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "b.txt").write_text("\ufeffa gray square\n\n  another name \r\n", encoding="utf-8")
    (tmp_path / "a/z.txt").write_text("z")
    (tmp_path / "a/c.txt").write_text("c")
    source = FolderSource(tmp_path)
    assert source.name == tmp_path.name
    assert [source[i].key for i in range(len(source))] == ["a/c.webp", "a/z.jpg", "b.PNG"]
    assert source[2].captions == source.captions(2) == ("a gray square", "another name")
    assert source[2].image.getpixel((0, 0)) == (9, 9, 9)
    again = pickle.loads(pickle.dumps(source))
    assert again[0].key == "a/c.webp"
    with pytest.raises(IndexError):
        source[3]


def test_photographs_of_phones_are_counted_whether_they_can_be_read_or_not(tmp_path):
    picture(tmp_path / "a.jpg")
    for name in ("b.HEIC", "c.avif"):
        (tmp_path / name).write_bytes(b"ftypheic")
    source = FolderSource(tmp_path)
    assert len(source) == 3
    with pytest.raises(BrokenPair, match=r"unreadable image: b.HEIC \(damaged, or none of JPEG, PNG"):
        decode(tmp_path / "b.HEIC", "b.HEIC")


def test_broken_pairs_keep_their_place(tmp_path):
    for name in ("empty", "latin", "long", "none", "ok", "page", "text"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "long.txt").write_text("x" * 100_000)
    (tmp_path / "ok.txt").write_text("fine")
    (tmp_path / "page.txt").write_text("x\n" * 33 * LONGEST_CAPTION)
    (tmp_path / "text.txt").write_text("not an image")
    (tmp_path / "text.png").write_text("not an image")
    source = FolderSource(tmp_path)
    assert [reason_of(source, index) for index in (0, 1, 2, 3, 5, 6)] == [
        "empty caption", "invalid text", "caption too long", "missing caption", "caption too long", "unreadable image",
    ]  # fmt: skip
    assert (source[4].captions, source.captions(6)) == (("fine",), ("not an image",))
