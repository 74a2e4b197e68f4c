from dataclasses import dataclass

import pytest

from declip.data.sources.origin import Origin
from declip.search.changes import Changes, Known, find_changes


@dataclass
class Listed:
    """Keys and stamps of a source."""

    images: list[tuple[str, str]]

    def key(self, index: int) -> str:
        return self.images[index][0]

    def origin(self, index: int) -> Origin:
        return Origin(stamp=self.images[index][1])


ROWS = [Known(0, "a", "1"), Known(1, "b", "1"), Known(2, "c", "1")]


def changes(images: list[tuple[str, str]], rows: list[Known] = ROWS, **hidden: object) -> Changes:
    return find_changes(Listed(images), range(len(images)), rows, **hidden)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "hidden", "places", "gone", "back"),
    [
        ([("a", "1"), ("b", "1"), ("c", "1")], {}, [], set(), set()),
        ([("a", "1"), ("new", "1"), ("b", "1"), ("c", "1")], {}, [1], set(), set()),
        ([("a", "1"), ("b", "2"), ("c", "1")], {}, [1], {1}, set()),
        ([("a", "1"), ("c", "1")], {}, [], {1}, set()),
        ([("a", "1"), ("c", "1")], {"gone": {1}}, [], set(), set()),
        ([("a", "1"), ("b", "1"), ("c", "1")], {"gone": {1}}, [], set(), {1}),
        ([("a", "1"), ("b", "2"), ("c", "1")], {"removed": {1}}, [], set(), set()),
        ([("a", "1"), ("b", "2"), ("c", "1"), ("out", "1")], {"excluded": {"out"}}, [1], {1}, set()),
        ([("a", "1"), ("a", "1"), ("b", "1"), ("c", "1")], {}, [1], set(), set()),
    ],
)
def test_what_is_new_changed_gone_and_back(
    images: list[tuple[str, str]], hidden: dict[str, set[int]], places: list[int], gone: set[int], back: set[int]
) -> None:
    found = changes(images, **hidden)
    assert (found.places.tolist(), found.gone, found.back) == (places, gone, back)


def test_a_live_row_goes_before_a_hidden_one_of_the_same_picture() -> None:
    rows = [Known(0, "a", "1"), Known(1, "a", "1")]
    assert changes([("a", "1")], rows, gone={0}).back == set()
    assert changes([("a", "1")], rows, gone={0}).gone == set()


def test_the_digest_tells_the_work_apart() -> None:
    one = changes([("a", "1"), ("x", "1"), ("y", "1")])
    assert one.digest == changes([("x", "9"), ("y", "9")]).digest
    assert one.digest != changes([("y", "1"), ("x", "1")]).digest
