import csv
import io
from pathlib import Path

import pytest

from data.tars import picture, write_tar
from declip.data.exclude import Exclusion, match_exclusions, read_exclusions, write_exclusions
from declip.data.prepare import shard_source
from declip.data.sources.open import open_source
from declip.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    """Four pairs with three keys: the second and the third share theirs."""
    rows = (("a", "one"), ("b", "two"), ("b", "wrong"), ("c", "four"))
    members = [(f"{n}.{end}", c) for n, said in rows for end, c in (("png", picture(1)), ("txt", said.encode()))]
    return write_tar(tmp_path / "t.tar", members)


def test_no_cell_is_a_formula_and_all_are_read_back(tmp_path: Path) -> None:
    cells = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''-1", "'plain'"]
    odd = ['a "b", c.png', "two\nlines.png", "\N{SNOWMAN}.png"]
    text = write_exclusions((cell, place, cell, -0.5, cell) for place, cell in enumerate([*cells, *odd]))
    written = list(csv.reader(io.StringIO(text, newline="")))[1:]
    assert all(row[column][0] == "'" for row in written[: len(cells)] for column in (0, 2, 4))
    (tmp_path / "drop.csv").write_text(text, encoding="utf-8", newline="")
    found = read_exclusions(tmp_path / "drop.csv")
    assert [(row.key, row.place) for row in found] == [(key, place) for place, key in enumerate([*cells, *odd])]
    assert [row.reason for row in found][:4] == cells[:4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png\n\n  b c.png \n", [Exclusion("a.png"), Exclusion("b c.png")]),
        ("Key\na.png\n", [Exclusion("a.png")]),
        ("\ufeffreason,key\nbad,a.png\n,b.png\n", [Exclusion("a.png", -1, "bad"), Exclusion("b.png")]),
    ],
)
def test_plain_lists_and_other_columns_are_read(tmp_path: Path, text: str, expected: list[Exclusion]) -> None:
    path = tmp_path / "list"
    path.write_text(text, encoding="utf-8")
    assert read_exclusions(path) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"key\n", "names no pair"), (b"\xff\xfe\x00", "UTF-8"), (b"key,place\na,x\n", "invalid literal")],
)
def test_a_wrong_list_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_exclusions(tmp_path / "list")
    with pytest.raises(UserError, match="cannot be read"):
        read_exclusions(tmp_path / "nowhere")


def test_a_place_names_one_pair_and_a_key_alone_all_of_its_pairs(twice: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(twice)
    assert match_exclusions(source, [Exclusion("t.tar/b", 2, "x")]) == {2: "x"}
    assert match_exclusions(source, [Exclusion("t.tar/b")]).keys() == {1, 2}
    moved = match_exclusions(source, [Exclusion("t.tar/c", 0), Exclusion("gone.png", 9)])
    assert moved.keys() == {3}
    assert "1 keys of the list are not in 't.tar', such as 'gone.png'" in caplog.text
    with pytest.raises(UserError, match=r"such as 'gone.png'"):
        match_exclusions(source, [Exclusion("gone.png")])


def test_pairs_on_the_list_are_left_out_and_counted_by_reason(twice: Path, tmp_path: Path) -> None:
    (tmp_path / "drop.csv").write_text("key,place,reason\nt.tar/b,2,image and caption disagree\nt.tar/c,,by hand\n")
    made = shard_source(twice, tmp_path / "out", exclude=tmp_path / "drop.csv", workers=0)
    assert made.pairs == 2
    assert made.skipped.counts == {"image and caption disagree": 1, "by hand": 1}
    assert "Left out: 1 × image and caption disagree, such as t.tar/b" in made.summary()
    kept = open_source(tmp_path / "out")
    assert [kept.captions(place) for place in range(len(kept))] == [("one",), ("two",)]
    with pytest.raises(UserError, match="content was"):
        shard_source(twice, tmp_path / "out", workers=0)
