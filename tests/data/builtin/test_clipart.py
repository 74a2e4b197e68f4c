import json

import numpy as np
import pytest

from declip.data.builtin.clipart import CLIPART, also_stamps, file_words, is_readable, title_words
from declip.data.builtin.pictures import MANIFEST, NOTICE, BuiltinSource

PACKAGE, SIDE = CLIPART.packages, CLIPART.side
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:cc="http://web.resource.org/cc/" '
    'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" '
)
DRAWINGS = {
    # Title, file's size, colour.
    "animals/bug_nicu_buculei_01": ("Clip art with a bug", 'width="210mm" height="297mm"', "red"),
    "animals/cat_old": ("Cat and the dog (2)", 'width="744" height="1052"', "#00ff00"),
    "food/pear": ("Pear", 'width="100%" height="100%" viewBox="0 0 744 1052"', "blue"),
    "food/pear_02": ("pear", 'width="744" height="1052"', "black"),
    "food/coccinelle": ("Coccinelle", 'width="744" height="1052"', "#123456"),
    "food/ghost": ("Ghost", 'width="744" height="1052"', "white"),
    "food/owned": ("Owned thing", 'width="744" height="1052"', "orange"),
    "shapes/stars/star_12": ("Star", 'width="744" height="1052"', "#111111"),
    "computer/icons/mail": ("Mail", 'width="744" height="1052"', "#222222"),
    **{f"tools/hammer_{i}": ("Set of tools", 'width="744" height="1052"', f"#33333{i}") for i in range(5)},
}
AUTHOR = "Nicu Buculei"


def svg(title, size, colour, licence="http://web.resource.org/cc/PublicDomain"):
    subjects = "".join(f"<rdf:li>{word}</rdf:li>" for word in ("fruit_tree", "hash(0x8a)", "http://a.b", "pear"))
    return (
        f"{HEAD}{size}><metadata><rdf:RDF><cc:Work><dc:title>{title}</dc:title><dc:subject><rdf:Bag>{subjects}"
        f"</rdf:Bag></dc:subject><dc:creator><cc:Agent><dc:title>{AUTHOR}</dc:title></cc:Agent></dc:creator>"
        f'<cc:license rdf:resource="{licence}"/></cc:Work></rdf:RDF></metadata>'
        f'<rect x="20" y="20" width="200" height="200" fill="{colour}"/></svg>'
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The package as it lies below the root of a machine."""
    root = tmp_path_factory.mktemp("debian")
    folder = root / PACKAGE.data
    for key, (title, size, colour) in DRAWINGS.items():
        licence = {"licence": "GPL"} if key == "food/owned" else {}
        path = folder / f"{key}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(svg(title, size, colour, **licence), encoding="utf-8")
    (folder / "food/torn.svg").write_text("<svg")
    latin = '<?xml version="1.0" encoding="latin-1"?>' + svg("Plum", 'width="744" height="1052"', "#abcdef")
    (folder / "food/plum.svg").write_bytes(latin.replace(AUTHOR, "André").encode("latin-1"))
    (folder / "food/apple_copy.svg").symlink_to("pear.svg")
    stamp = sorted(also_stamps())[0]
    (folder / stamp).parent.mkdir(parents=True, exist_ok=True)
    (folder / stamp).write_text(svg("A stamp", 'width="900" height="900"', "#654321"), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    CLIPART.build(PACKAGE.unpacked(root), CLIPART.folder(cache))
    return cache


def test_drawings_and_their_titles(built):
    source = BuiltinSource(CLIPART, "clipart", built)
    titles = {row["key"]: row["title"] for row in source.rows}
    # Not: a title in another language, white on white, not public, series, links, broken files, stamps.
    assert titles == {
        "animals/bug_nicu_buculei_01.svg": "bug",
        "animals/cat_old.svg": "cat and the dog",
        "food/pear.svg": "pear",
        "food/pear_02.svg": "pear",
        **{f"tools/hammer_{i}.svg": "hammer" for i in range(5)},
    }
    assert source.class_names == ("bug", "cat and the dog", "hammer", "pear")
    assert source.labels.tolist() == [0, 1, 3, 3, 2, 2, 2, 2, 2]
    assert source.captions(0) == source[0].captions == ("bug",)
    assert source[0].keywords == ("fruit tree", "pear")
    assert source[2].keywords == ("fruit tree",)
    left_out = json.loads((built / "clipart" / MANIFEST).read_text())["left_out"]
    assert left_out == {"invisible": 1, "cannot be drawn": 1}, "a ghost, and a plum in Latin-1"


def test_a_drawing_fills_the_square_wherever_it_lies_on_its_page(built):
    source = BuiltinSource(CLIPART, "clipart", built)
    for index, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]):
        pixels = np.asarray(source[index].image)
        assert pixels.shape == (SIDE, SIDE, 3)
        assert (pixels[4:-4, 4:-4] == colour).all()


def test_words_of_titles_and_files():
    assert title_words("Bob's 2 Cats (old)") == ["bob", "cats"]
    assert file_words("tools/blue_gun_alex_fernandez_01.svg", "Alex Fernandez") == ["blue", "gun"]
    assert file_words("tools/blue_gun_al_01.svg", "Alex Fernandez") == ["blue", "gun"]
    assert file_words("tools/blue-gun2.svg", "") == ["blue", "gun"]
    assert len(also_stamps()) == 80
    assert is_readable(["shopping", "carts"], ())
    assert is_readable(["wifi", "off"], {"wifi"})
    for words in (["shoppingcart"], ["a"], ["3", "x"], ["one"] * 6):
        assert not is_readable(words, {"3", "x"})


def test_authors_and_license_are_kept(built):
    assert "public domain" in (built / "clipart" / NOTICE).read_text()
    rows = BuiltinSource(CLIPART, "clipart", built).rows
    assert {(row["author"], row["licence"]) for row in rows} == {(AUTHOR, "public domain")}
