"""The shipped tables of the sets, and small sets built from small tables and packages."""

import hashlib
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.specifiers import SpecifierSet
from PIL import Image, ImageDraw

import declip
from declip.data.sources.download import download
from declip.data.sources.open import open_source
from declip.evaluation.datasets import open_dataset
from declip_sets import sets
from declip_sets.fetch import FOLDER_VARIABLE
from declip_sets.pictures import NOTICE, BuiltinSource
from declip_sets.sets import CLIPART, DESIGNS, EMOJI, ICONS, ICONS_PACKAGE, STAMPS
from declip_sets.tables import read_rows

PROJECT = Path(__file__).parents[1] / "pyproject.toml"

DRAWINGS = {  # title, size of the file, color
    "animals/bug.svg": ("bug", 'width="210mm" height="297mm"', "red"),
    "animals/cat_old.svg": ("cat and the dog", 'width="744" height="1052"', "#00ff00"),
    "food/pear.svg": ("pear", 'width="100%" height="100%" viewBox="0 0 744 1052"', "blue"),
    "food/pear_02.svg": ("pear", 'width="744" height="1052"', "black"),
    "food/ghost.svg": ("ghost", 'width="744" height="1052"', "white"),
}
COLORS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (0, 0, 0),
]
CHOSEN_STAMPS = [  # key, name, kind, photo, test; "" has no sentence of a thing
    ("animals/birds/cartoon/tux", "", "animal", "0", "0"),
    ("animals/marsupials/koala", "koala", "animal", "1", "0"),
    ("animals/marsupials/koala_2", "koala", "animal", "1", "0"),
    ("food/apple", "apple", "food", "1", "1"),
    ("symbols/a", "", "", "0", "0"),
    ("vehicles/auto", "red car", "vehicle", "0", "1"),
]


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value)
    path.write_text(text, encoding="utf-8")


def keys_of(source):
    return [source[index].key for index in range(len(source))]


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    """The sets of the packages as they lie below the root of a machine."""
    root, cache = tmp_path_factory.mktemp("debian"), tmp_path_factory.mktemp("cache")
    for key, (_, size, color) in DRAWINGS.items():
        square = f'<rect x="20" y="20" width="200" height="200" fill="{color}"/>'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{square}</svg>'
        put(root / CLIPART.packages.data / key, svg)
    put(root / CLIPART.packages.data / "food/torn.svg", "<svg")
    for number, (key, name, *_) in enumerate(CHOSEN_STAMPS):
        path = root / STAMPS.packages.data / f"{key}.png"
        put(path.with_suffix(".txt"), f"See a  {name or 'letter'}.\naf.utf8=Iets.\n")
        image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
        pen = ImageDraw.Draw(image)
        pen.rectangle((10, 10, 29, 29), fill=(200, number * 5, 30))
        image.save(path)
    put(root / "usr/share/doc" / STAMPS.packages.name / "copyright", "GPL-2")
    tables = {"clipart": clipart_rows(), "stamps": stamp_rows()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "read_rows", tables.get)
        patch.setenv(FOLDER_VARIABLE, str(root))
        for name in tables:
            assert download(f"builtin:{name}", cache, progress=False) == cache / name
    return cache


def clipart_rows():
    rows = []
    for key, (title, *_) in DRAWINGS.items():
        rows.append({"key": key, "title": title, "author": "A"})
    for key in ("food/torn.svg", "food/gone.svg"):
        rows.append({"key": key, "title": "x", "author": "A"})
    return rows


def stamp_rows():
    columns = ("key", "name", "kind", "photo", "test")
    return [dict(zip(columns, row, strict=True)) for row in CHOSEN_STAMPS]


def test_clip_art_has_its_titles_and_fills_the_square(debian):
    source = BuiltinSource(CLIPART, "clipart", debian)
    assert source.class_names == ("bug", "cat and the dog", "pear")
    assert source.columns["label"].tolist() == [0, 1, 2, 2], "without a ghost, a torn file and none"
    assert source[0].captions() == ("bug",)
    for index, color in enumerate(COLORS):
        pixels = np.asarray(source[index].open().decoded())
        assert pixels.shape == (CLIPART.side, CLIPART.side, 3)
        assert (pixels[4:-4, 4:-4] == color).all()
    assert "public domain" in (debian / "clipart" / NOTICE).read_text()


def test_stamps_have_sentences_names_and_kinds(debian):
    source = BuiltinSource(STAMPS, "stamps", debian)
    names = [source.class_names[label] for label in source.columns["label"]]
    assert names == ["koala", "koala", "apple", "red car"]
    assert source[0].captions() == ("See a koala.", "koala")
    pixels = np.asarray(source[1].open().decoded())
    assert pixels.shape == (STAMPS.side, STAMPS.side, 3)
    assert (pixels == (200, 10, 30)).all(), "over white, margins cut off"
    photos = BuiltinSource(STAMPS, "stamps-photos", debian)
    names = [Path(key).name for key in keys_of(photos)]
    assert names == ["koala", "koala_2", "apple"]
    assert "contributors, GPL-2" in (debian / "stamps" / NOTICE).read_text()
    licenses = debian / "stamps/licenses" / STAMPS.packages.name
    assert (licenses / "copyright").read_text() == "GPL-2"


def test_the_kinds_of_stamps_are_a_dataset_with_a_training_split(debian, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(debian))
    dataset = open_dataset("builtin:stamps-kinds")
    assert dataset.name == "builtin:stamps-kinds"
    assert list(dataset.openers) == ["train", "test"]
    train, test = dataset.split("train"), dataset.split("test")
    assert [train.name, test.name] == ["builtin:stamps-kinds-train", "builtin:stamps-kinds"]
    assert train.class_names == test.class_names == ("animal", "food", "vehicle")
    assert train.columns["label"].tolist() == [0, 0, 0]
    assert test.columns["label"].tolist() == [1, 2]
    assert list(open_dataset("builtin:stamps").openers) == ["test"]


@pytest.mark.parametrize(("name", "digest"), [
    ("clipart", "8859e5e0ef422b274a661dc9e241e15d61a778b9882546f0259d56cb587ee0cb"),
    ("stamps", "fa21f986ebb6e09d9a5c07270a3ad9cdfca0aecc38e40eccd6153059345e3a7e"),
    ("emoji", "ae5c4097202f4899a8b8996ef25d44e27ce611a2b916f7ef3cb906522995e6e6"),
    ("icons", "9aa90291f2897b7730774716bb93ae61c7310802710a294553745950b43f04c7"),
])  # fmt: skip
def test_the_tables_are_those_that_results_were_measured_on(name, digest):
    rows = read_rows(name)
    lines = ["\t".join(rows[0])]
    lines += ["\t".join(row.values()) for row in rows]
    text = "\n".join(lines)
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_the_emoji_are_those_that_the_pages_count_and_no_group_is_on_two_sides():
    rows = EMOJI.choose({})
    counts = {"emoji": 5811, "emoji-validation": 1601, "emoji-test": 1285, "emoji-test-new": 309}
    for split, count in counts.items():
        assert len(EMOJI.select(split, rows).rows) == count, split
    held_out = {row["group"] for row in rows if row["held_out"]}
    known = {row["group"] for row in rows if not row["held_out"]}
    assert not held_out & known


def concept(code, name, held_out="0", names="", drawn="", **drawings):
    row = {
        "code": code,
        "name": name,
        "category": "things",
        "group": name.split()[-1],
        "held_out": held_out,
        "names": names,
        "drawn": drawn,
    }
    missing = {design.key: "" for design in DESIGNS}
    return row | missing | drawings


GRINS = {"noto": "grin", "fluent": "g", "openmoji": "g"}
CONCEPTS = [
    concept("1f600", "grinning face", "0", "smile", "face|joy", **GRINS),
    concept("2764", "red heart", noto="heart", fxemoji="redheart", fluent="h"),
    concept("1f30a", "water wave", fxemoji="wave", fluent="w", openmoji="w"),
    concept("1f3c3", "person running", "1", noto="run", fluent="r", openmoji="r"),
    concept("1f431", "cat face", fxemoji="cat"),
    concept("1f49a", "green heart", fluent="unseen"),
]
RED = {"fill": "#f00"}
OTHER = {"fill": "#123456"}
DRAWN = {
    "noto": {"grin": RED, "heart": {**RED, "width": 32}, "run": {"fill": "#00f"}},
    "fxemoji": {"redheart": RED, "wave": {"fill": "#0ff"}, "cat": {"fill": "#fff"}},
    "fluent": dict.fromkeys(("g", "h", "w", "r", "unseen"), OTHER),
    "openmoji": dict.fromkeys(("g", "w", "r"), OTHER),
}
SETS = {
    "carbon": {"camera": 0, "wallet": 6, "unheard-of": 7},
    "icon-park": {"camera": 9},
    "bi": {"camera": 11},
    # A bell that is carbon's camera to the pixel.
    "tabler": {"bell": 0, "camera": 3, "wallet": 4},
}


def square(fill, **more):
    return {"body": f'<rect x="4" y="4" width="8" height="8" fill="{fill}"/>', **more}


def bar(number, fill):
    """A drawing of its own for each number: a bar at a place in a frame."""
    start = 4 + number
    path = f"M2 2h1v20H2zM21 2h1v20h-1zM{start} 6h1v{start}h-1z"
    return {"body": f'<path fill="{fill}" d="{path}"/>'}


def write_emoji(root):
    """Write the packages of all designers."""
    for design in DESIGNS:
        drawings = DRAWN.get(design.key, {})
        icons = {name: square(**how) for name, how in drawings.items()}
        put(root / design.package / "icons.json", {"icons": icons})
        put(root / design.package / "package.json", {"version": "1.2.3"})


def write_icons(root):
    """Write the package of all sets of icons, and return the rows of the chosen ones."""
    package = root / ICONS_PACKAGE
    infos, chosen = {}, []
    for prefix, drawings in SETS.items():
        fill = "#0f0" if prefix == "icon-park" else "currentColor"
        icons = {name: bar(number, fill) for name, number in drawings.items()}
        put(package / f"json/{prefix}.json", {"icons": icons, "width": 24, "height": 24})
        license = {"title": "MIT license", "spdx": "MIT"}
        infos[prefix] = {"name": prefix, "license": license, "author": {"name": "A Hand"}}
        for name in drawings:
            captions = f"{name}|a {name}"
            chosen.append({"key": f"{prefix}/{name}", "category": "tools", "captions": captions})
    put(package / "collections.json", infos)
    put(package / "package.json", {"version": "1.2.3"})
    return chosen


@pytest.fixture(scope="module")
def iconify(tmp_path_factory):
    root = tmp_path_factory.mktemp("packages")
    cache = tmp_path_factory.mktemp("cache")
    write_emoji(root)
    tables = {"emoji": CONCEPTS, "icons": write_icons(root)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "read_rows", tables.get)
        for each in (EMOJI, ICONS):
            packages = each.packages.unpacked(root)
            each.build(packages, each.folder(cache))
    return cache


@pytest.mark.parametrize(("split", "expected"), [
    ("emoji", ["noto/1f600", "noto/2764", "fxemoji/2764", "fxemoji/1f30a"]),
    ("emoji-share-alike", ["noto/1f600", "noto/2764", "fxemoji/2764", "fxemoji/1f30a"]),
    ("emoji-test", ["fluent/1f600", "fluent/2764", "fluent/1f30a"]),
    ("emoji-test-new", ["fluent/1f3c3"]),
    ("emoji-validation", ["openmoji/1f600", "openmoji/1f30a"]),
    ("emoji-validation-new", ["openmoji/1f3c3"]),
    ("icons", ["tabler/camera", "tabler/wallet"]),
    ("icons-test", ["carbon/camera", "carbon/wallet", "icon-park/camera"]),
    ("icons-validation", ["bi/camera"]),
])  # fmt: skip
def test_splits_share_names_but_no_designer(iconify, split, expected, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(iconify))
    source = open_source(f"builtin:{split}")
    assert keys_of(source) == expected


def test_pairs_have_their_texts_and_evaluation_a_class_for_each_name(iconify):
    emoji = BuiltinSource(EMOJI, "emoji-test", iconify)
    assert emoji.class_names == ("grinning face", "red heart", "water wave")
    assert emoji.columns["label"].tolist() == [0, 1, 2]
    assert emoji.credit == "Fluent Emoji by Microsoft, MIT"
    icons = BuiltinSource(ICONS, "icons-test", iconify)
    assert icons.class_names == ("camera", "wallet")
    assert icons.columns["label"].tolist() == [0, 1, 0]
    assert icons.credit == "carbon by A Hand, MIT; icon-park by A Hand, MIT"
    training = BuiltinSource(EMOJI, "emoji", iconify)
    assert training[0].captions() == ("grinning face", "smile", "face", "joy")
    assert BuiltinSource(ICONS, "icons", iconify)[0].captions() == ("camera", "a camera")


def test_drawings_fill_the_square_in_black_or_in_their_color(iconify):
    source = BuiltinSource(EMOJI, "emoji", iconify)
    for index in (0, 1):  # squares of different size and place
        pixels = np.asarray(source[index].open().decoded())
        assert pixels.shape == (EMOJI.side, EMOJI.side, 3)
        inner = pixels[2:-2, 2:-2]
        assert (inner == [255, 0, 0]).all()
    source = BuiltinSource(ICONS, "icons-test", iconify)
    line = np.asarray(source[0].open().decoded())
    green = np.asarray(source[2].open().decoded())
    assert line.shape == (ICONS.side, ICONS.side, 3)
    assert line.min() < 20, "currentColor is black"
    assert (line == line[:, :, :1]).all()
    assert green[32, 63, 1] == 255
    assert green[:, :, 0].min() == 0
    assert green[:, :, 2].min() == 0


def test_it_is_said_whose_the_drawings_are(iconify):
    emoji = (iconify / "emoji" / NOTICE).read_text()
    assert "Fluent Emoji by Microsoft, MIT: 5 drawings\n" in emoji
    assert "Unicode CLDR" in emoji
    icons = (iconify / "icons" / NOTICE).read_text()
    assert "carbon by A Hand, MIT: 3 drawings\n" in icons


def test_the_version_is_that_of_declip():
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"].endswith("src/declip/__init__.py")
    [needed] = [each for each in project["project"]["dependencies"] if each.startswith("declip")]
    assert SpecifierSet(needed.removeprefix("declip")).contains(declip.__version__)
    assert ",<" in needed, "other versions may have other plugins"
