import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from declip.data.builtin import BUILTIN_SPLITS, download
from declip.data.builtin.fetch import FOLDER_VARIABLE
from declip.data.builtin.pictures import MANIFEST, NOTICE, TABLE, BuiltinSource
from declip.data.builtin.stamps import STAMPS, name_of
from declip.data.pair import PairSource

PACKAGE, SIDE = STAMPS.packages, STAMPS.side
COLOURS = ("red", "green", "blue", "white", "black")
STAMPS_DRAWN = {
    "animals/marsupials/koala": "A koala.",
    "animals/birds/cartoon/tux": "Tux—the Linux mascot!",
    "animals/mammals/cats/lion": "A lion.",
    "animals/mammals/cats/lion-2": "A lion.",
    "food/fruit/apple": "An “Eve” apple. Yum!",
    "food/bread": "Eat your bread!",
    "food/pizza": "A quarter of pizza.",
    "symbols/alphabets/a": "The letter a.",
    "medical/tooth": "A tooth.",
    **{f"plants/flowers/flower{i}": "A flower." for i in range(6)},
    **{f"vehicles/auto{i}": f"A {word} car." for i, word in enumerate((*COLOURS, "old", "new", "big"))},
    **{f"clothes/hats/hat{i}": f"A {word} hat." for i, word in enumerate(COLOURS)},
}


def put(root, key, sentence, number, alpha=True):
    path = root / f"{key}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0) if alpha else "white")
    ImageDraw.Draw(image).rectangle((10, 10, 29, 29), fill=(200, number * 5, 30))
    image.save(path)
    path.with_suffix(".txt").write_text(f"{sentence}\naf.utf8=Iets.\n", encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The package as it lies below the root of a machine."""
    root = tmp_path_factory.mktemp("debian")
    folder = root / PACKAGE.data
    for number, (key, sentence) in enumerate(STAMPS_DRAWN.items()):
        put(folder, key, sentence, number)
    put(folder, "space/copy", "A koala again.", 0)
    put(folder, "space/empty", "", 40)
    (folder / "space/lonely.txt").write_text("A text alone.", encoding="utf-8")
    (folder / "vehicles/auto0.svg").write_text("<svg/>")
    (folder / "space/copy_mirror.png").write_bytes((folder / "space/copy.png").read_bytes())
    notice = root / "usr/share/doc" / PACKAGE.name / "copyright"
    notice.parent.mkdir(parents=True)
    notice.write_text("GPL-2")
    return root


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    STAMPS.build(PACKAGE.unpacked(root), STAMPS.folder(cache))
    return cache


def test_stamps_by_name(built):
    source = BuiltinSource(STAMPS, "stamps", built)
    assert isinstance(source, PairSource)
    names = [source.class_names[label] for label in source.labels]
    assert source.class_names[:4] == ("Eve apple", "big car", "black car", "black hat")
    assert names.count("flower") == 6
    assert names.count("lion") == 2
    assert "letter a" not in source.class_names
    assert source.labels.dtype == np.int64
    keys = [row["key"] for row in source.rows]
    assert keys == sorted(keys)
    assert not {"food/bread", "animals/birds/cartoon/tux"} & set(keys), "no name"
    assert source.captions(keys.index("animals/marsupials/koala")) == ("A koala.", "koala")
    assert source[keys.index("animals/marsupials/koala")].keywords == ("animals", "marsupials")


def test_what_is_left_out(built):
    keys = {row["key"] for row in pq.read_table(built / "stamps" / TABLE).to_pylist()}
    assert keys == set(STAMPS_DRAWN), "not a copy, nor what has no sentence or no picture"
    assert json.loads((built / "stamps" / MANIFEST).read_text())["left_out"] == {"seen before": 1}


def test_photographs(built):
    photos = {row["key"] for row in BuiltinSource(STAMPS, "stamps-photos", built).rows}
    assert {"animals/marsupials/koala", "vehicles/auto1"} <= photos
    # Drawn: a cartoon, one that an eye has found, one that was a vector, a letter.
    assert not photos & {"animals/birds/cartoon/tux", "food/pizza", "vehicles/auto0", "symbols/alphabets/a"}


def test_kinds_have_two_parts_that_share_no_name(built):
    train, test = (BuiltinSource(STAMPS, BUILTIN_SPLITS["stamps-kinds"][part], built) for part in ("train", "test"))
    assert train.class_names == test.class_names == ("animal", "food", "piece of clothing", "plant", "vehicle")
    assert len(train) + len(test) == 26, "neither a letter nor a tooth is of a kind"
    for column in ("key", "name"):
        assert not {row[column] for row in train.rows if row[column]} & {row[column] for row in test.rows}
    counts = {name: (test.labels == i).sum() for i, name in enumerate(test.class_names)}
    assert counts == {"animal": 1, "food": 1, "piece of clothing": 2, "plant": 0, "vehicle": 2}
    pixels = [source[i].image.tobytes() for source in (train, test) for i in range(len(source))]
    assert len(set(pixels)) == len(pixels)


def test_stamps_fill_the_square_over_white(built):
    pixels = np.asarray(BuiltinSource(STAMPS, "stamps", built)[2].image)
    assert pixels.shape == (SIDE, SIDE, 3)
    assert (pixels == pixels[0, 0]).all()
    assert pixels[0, 0, 0] == 200


@pytest.mark.parametrize(
    ("sentence", "name"),
    [
        ("A koala.", "koala"),
        ("A pair of “big” glasses. Look!", "big glasses"),
        ("The Sun (a star).", "Sun"),
        ("An owl, flying.", "owl"),
        ("Say cheese!", ""),
        ("A box for trash that can be recycled.", ""),
        ("Another one.", ""),
    ],
)
def test_names(sentence, name):
    assert name_of(sentence) == name


def test_download_takes_the_folder_given(root, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(root))
    folder = download("builtin:stamps-photos", tmp_path, progress=False)
    assert folder == tmp_path / "stamps"
    assert (folder / "licences" / PACKAGE.name / "copyright").read_text() == "GPL-2"
    assert "contributors, GPL-2" in (folder / NOTICE).read_text()
    assert {row["licence"] for row in pq.read_table(folder / TABLE).to_pylist()} == {"GPL-2"}
