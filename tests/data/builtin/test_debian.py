"""The clip art and the stamps: the shipped tables, and small packages that are built by small tables."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from declip.data.builtin import sets
from declip.data.builtin.fetch import FOLDER_VARIABLE
from declip.data.builtin.pictures import NOTICE, BuiltinSource, read_rows
from declip.data.builtin.sets import BUILTIN_SPLITS, CLIPART, STAMPS, download

DRAWINGS = {  # title, size of the file, color
    "animals/bug.svg": ("bug", 'width="210mm" height="297mm"', "red"),
    "animals/cat_old.svg": ("cat and the dog", 'width="744" height="1052"', "#00ff00"),
    "food/pear.svg": ("pear", 'width="100%" height="100%" viewBox="0 0 744 1052"', "blue"),
    "food/pear_02.svg": ("pear", 'width="744" height="1052"', "black"),
    "food/ghost.svg": ("ghost", 'width="744" height="1052"', "white"),
}
CHOSEN_STAMPS = [  # key, name, kind, photo, test; "" has no sentence of a thing
    ("animals/birds/cartoon/tux", "", "animal", "0", "0"),
    ("animals/marsupials/koala", "koala", "animal", "1", "0"),
    ("animals/marsupials/koala_2", "koala", "animal", "1", "0"),
    ("food/apple", "apple", "food", "1", "1"),
    ("symbols/a", "", "", "0", "0"),
    ("vehicles/auto", "red car", "vehicle", "0", "1"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The packages as they lie below the root of a machine."""
    root = tmp_path_factory.mktemp("debian")
    for key, (_, size, color) in DRAWINGS.items():
        path = root / CLIPART.packages.data / key
        path.parent.mkdir(parents=True, exist_ok=True)
        square = f'<rect x="20" y="20" width="200" height="200" fill="{color}"/>'
        path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{square}</svg>')
    (root / CLIPART.packages.data / "food/torn.svg").write_text("<svg")
    for number, (key, name, *_) in enumerate(CHOSEN_STAMPS):
        path = root / STAMPS.packages.data / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
        ImageDraw.Draw(image).rectangle((10, 10, 29, 29), fill=(200, number * 5, 30))
        image.save(path)
        path.with_suffix(".txt").write_text(f"See a  {name or 'letter'}.\naf.utf8=Iets.\n", encoding="utf-8")
    notice = root / "usr/share/doc" / STAMPS.packages.name / "copyright"
    notice.parent.mkdir(parents=True)
    notice.write_text("GPL-2")
    return root


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    keys = [*DRAWINGS, "food/torn.svg", "food/gone.svg"]
    titles = {key: title for key, (title, *_) in DRAWINGS.items()}
    stamps = [dict(zip(("key", "name", "kind", "photo", "test"), row, strict=True)) for row in CHOSEN_STAMPS]
    rows = {"clipart": [{"key": k, "title": titles.get(k, "x"), "author": "A"} for k in keys], "stamps": stamps}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "read_rows", rows.get)
        patch.setenv(FOLDER_VARIABLE, str(root))
        for name in rows:
            assert download(f"builtin:{name}", cache, progress=False) == cache / name
    return cache


def test_the_tables_hold_what_the_pages_count():
    clipart, stamps = read_rows("clipart"), read_rows("stamps")
    assert (len(clipart), len({row["title"] for row in clipart})) == (1497, 1032)
    assert len({row["key"] for row in stamps}) == len(stamps) == 949
    parts = [{(r["kind"], r["name"]) for r in stamps if r["kind"] and r["name"] and r["test"] == t} for t in "01"]
    assert not parts[0] & parts[1], "the two parts of a kind share no name"


def test_clip_art_has_its_titles_and_fills_the_square(built):
    source = BuiltinSource(CLIPART, "clipart", built)
    assert source.class_names == ("bug", "cat and the dog", "pear")
    assert source.labels.tolist() == [0, 1, 2, 2]
    assert source[0].captions == ("bug",)
    assert len(source) == 4, "without a ghost, a torn file and none"
    for index, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]):
        pixels = np.asarray(source[index].image)
        assert pixels.shape == (CLIPART.side, CLIPART.side, 3)
        assert (pixels[4:-4, 4:-4] == color).all()
    assert "public domain" in (built / "clipart" / NOTICE).read_text()


def test_stamps_have_sentences_names_and_kinds(built):
    source = BuiltinSource(STAMPS, "stamps", built)
    assert [source.class_names[label] for label in source.labels] == ["koala", "koala", "apple", "red car"]
    assert source.captions(0) == ("See a koala.", "koala")
    pixels = np.asarray(source[1].image)
    assert pixels.shape == (STAMPS.side, STAMPS.side, 3)
    assert (pixels == (200, 10, 30)).all(), "over white, margins cut off"
    assert [row["key"] for row in BuiltinSource(STAMPS, "stamps-photos", built).rows] == [
        "animals/marsupials/koala", "animals/marsupials/koala_2", "food/apple",
    ]  # fmt: skip
    train, test = (BuiltinSource(STAMPS, BUILTIN_SPLITS["stamps-kinds"][part], built) for part in ("train", "test"))
    assert train.class_names == test.class_names == ("animal", "food", "vehicle")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 0], [1, 2])
    assert "contributors, GPL-2" in (built / "stamps" / NOTICE).read_text()
    assert (built / "stamps/licenses" / STAMPS.packages.name / "copyright").read_text() == "GPL-2"
