"""Scenes of emoji of two designers, drawn for the tests."""

from typing import ClassVar

import numpy as np
import pytest

from declip.data.builtin.pictures import NOTICE, BuiltinSource
from declip.data.builtin.scenes import Scenes, layers
from declip.data.builtin.sets import EMOJI

COLORS = {"square": (200, 30, 30), "bar": (30, 30, 200), "tile": (30, 150, 30), "board": (10, 10, 10)}


class FewScenes(Scenes):
    splits: ClassVar = {"scenes": ("emoji", 6), "scenes-test": ("emoji-test", 4)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The emoji: colored squares whose center is white, by three designers."""
    cache, drawings = tmp_path_factory.mktemp("cache"), []
    for design in ("noto", "twemoji", "fluent"):
        for name, color in COLORS.items():
            pixels = np.full((EMOJI.side, EMOJI.side, 3), 255, np.uint8)
            pixels[8:-8, 8:-8] = color
            pixels[40:-40, 40:-40] = 255
            row = {"key": f"{design}/{name}", "design": design, "code": name, "name": name, "captions": [name]}
            drawings.append(({**row, "held_out": False, "category": "", "group": ""}, pixels))
    EMOJI.write(EMOJI.folder(cache), drawings, {})
    (EMOJI.folder(cache) / "licenses/noto").mkdir(parents=True)
    (EMOJI.folder(cache) / "licenses/noto/LICENSE").write_text("as noto")
    FewScenes(EMOJI).download(cache, progress=False)
    return cache


def test_each_box_holds_the_object_of_its_name(cache):
    source = BuiltinSource(FewScenes(EMOJI), "scenes-test", cache)
    assert (len(source), source.boxed, source.credit) == (4, True, "Fluent Emoji by Microsoft, MIT")
    for index in range(len(source)):
        pixels, covered = np.asarray(source.image(index)), np.zeros((96, 96), int)
        assert 3 <= len(source.boxes(index)) <= 5
        for name, (left, top, right, bottom) in source.boxes(index):
            assert 24 <= right - left == bottom - top <= 40
            covered[top:bottom, left:right] += 1
            edge = pixels[top + (bottom - top) // 4, left + (right - left) // 2]  # of the square around the center
            assert np.abs(edge - np.array(COLORS[name], int)).max() < 25
            inner = pixels[(top + bottom) // 2, (left + right) // 2]
            assert inner.min() > 230, "white that is enclosed belongs to the object"
        assert covered.max() == 1


def test_captions_name_all_objects_and_where_one_is(cache):
    source = BuiltinSource(FewScenes(EMOJI), "scenes", cache)
    for index in range(6):
        names, place = source.captions(index)
        boxes = dict(source.boxes(index))
        assert sorted(names.split(", ")) == sorted(boxes)
        one, *words, other = place.split()
        (x, y, *_), (u, v, *_) = boxes[one], boxes[other]
        holds = {"left of": x < u, "right of": x > u, "above": y < v, "below": y >= v}
        assert holds[" ".join(words)]


def test_a_scene_depends_on_its_split_and_number_alone(cache, tmp_path):
    class Fewer(FewScenes):
        splits: ClassVar = {"scenes": ("emoji", 2), "scenes-test": ("emoji-test", 1)}

    first, again = BuiltinSource(FewScenes(EMOJI), "scenes", cache), Fewer(EMOJI)
    layers.cache_clear()
    with again.fetched(cache, progress=False) as packages:
        again.build(packages, again.folder(tmp_path))
    for index in range(2):
        np.testing.assert_array_equal(BuiltinSource(again, "scenes", tmp_path).image(index), first.image(index))
    assert (tmp_path / "scenes/licenses/noto/LICENSE").read_text() == "as noto"
    assert "Fluent Emoji by Microsoft" in (tmp_path / "scenes" / NOTICE).read_text()
