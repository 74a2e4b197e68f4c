import json

import pytest

from conftest import refuses
from data.tars import picture, write_tar
from declip.data.prepare import read_exclusions, shard_source, write_exclusions
from declip.data.sources.open import open_source

pytestmark = pytest.mark.usefixtures("cache")


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
        (b'{"key": "t.tar/c", "place": 1, "reason": "moved"}\n', "'t.tar/c' at place 1"),
        (b'{"key": "t.tar/c", "place": 4, "reason": "gone"}\n', "'t.tar/c' at place 4"),
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
