"""The task "pointing" against plain loops, and tables of boxes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import declip
from conftest import refuses
from declip.data.pair import Pair, PairSource
from declip.data.sources.open import open_source
from declip.evaluation.results import read_result
from evaluation.conftest import ColorModel

BOXES = [
    [("red", (0, 0, 8, 8)), ("blue", (8, 8, 24, 16))],
    [("red", (4, 4, 8, 12)), ("red", (16, 0, 20, 4)), ("green", (0, 0, 24, 16))],
]


class Boxed(PairSource):
    name, boxed = "boxed", True

    def __init__(self, objects=BOXES):
        self.objects = objects

    def __len__(self):
        return len(self.objects)

    def __getitem__(self, index):
        return Pair(str(index), Image.new("RGB", (24, 16)), ("red",))

    def boxes(self, index):
        return self.objects[index]


class Mapped(ColorModel):
    """A model whose maps are random numbers of the text alone."""

    def similarity_map(self, image, texts):
        maps = [np.random.default_rng(len(text)).normal(size=(image.height, image.width)) for text in texts]
        return torch.tensor(np.stack(maps), dtype=torch.float32)


def pointing(model, source):
    return declip.evaluate(model, source, "pointing", progress=False)


def test_pointing_equals_the_plain_loop():
    hits, overlaps, areas = [], [], []
    for boxes in BOXES:
        for text in dict.fromkeys(text for text, _ in boxes):
            inside = np.zeros((16, 24), bool)
            for name, (left, top, right, bottom) in boxes:
                if name == text:
                    inside[top:bottom, left:right] = True
            found = np.random.default_rng(len(text)).normal(size=(16, 24)).astype(np.float32)
            top = found >= np.sort(found.ravel())[-inside.sum()]
            hits.append(inside.ravel()[found.argmax()])
            overlaps.append((top & inside).sum() / (top | inside).sum())
            areas.append(inside.mean())
    result = pointing(Mapped(), Boxed())
    assert (result.images, result.n, result.pointing) == (2, 4, np.mean(hits))
    assert result.iou == pytest.approx(np.mean(overlaps), abs=1e-6)
    assert result.chance == pytest.approx(np.mean(areas), abs=1e-6)
    assert read_result(json.loads(json.dumps(result.to_dict()))) == result


def test_random_maps_are_at_chance():
    class Random(Mapped):
        rng = np.random.default_rng(0)

        def similarity_map(self, image, texts):
            return torch.from_numpy(self.rng.normal(size=(len(texts), image.height, image.width)))

    result = pointing(Random(), Boxed([[(str(side), (0, 0, side, 16)) for side in (3, 12)]] * 400))
    assert result.pointing == pytest.approx(result.chance, abs=0.05)
    assert result.iou == pytest.approx(result.iou_chance, abs=0.01)


def table(folder, rows):
    Image.new("RGB", (800, 400)).save(folder / "a.png")
    (folder / "boxes.csv").write_text("image,caption,left,top,right,bottom\n" + rows)
    return folder / "boxes.csv"


def test_a_table_has_a_row_for_each_object(tmp_path):
    path = table(tmp_path, "a.png,red,0,0,400,400\na.png,blue,400,0,800.0,400\n")
    assert open_source(path).boxes(0) == [("red", (0, 0, 400, 400)), ("blue", (400, 0, 800, 400))]

    class Half(Mapped):
        def similarity_map(self, image, texts):
            assert image.size == (384, 192), "large images are scaled, and the boxes with them"
            left = torch.arange(384).expand(192, 384).float()
            return torch.stack([-left if text == "red" else left for text in texts])

    result = pointing(Half(), path)
    assert (result.n, result.pointing, result.iou, result.chance) == (2, 1, 1, 0.5)


def test_unusable_boxes_are_counted(tmp_path):
    rows = "a.png,red,0,0,400,400\nb.png,red,0,0,4,4\n"
    for name, sides in (("c.png", "5,5,5,6"), ("d.png", "x,0,1,1"), ("e.png", "0,0,nan,1")):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        rows += f"{name},red,{sides}\n"
    result = pointing(Mapped(), table(tmp_path, rows))
    assert (result.n, dict(result.skipped)) == (1, {"missing image": 1, "empty box": 1, "unreadable box": 2})
    refuses("no image with a box could be read", pointing, Mapped(), table(tmp_path, "a.png,red,1,1,1,1\n"))


def test_what_has_no_boxes_or_maps_is_refused(tmp_path):
    bare = [(Image.new("RGB", (8, 8)), "red")]
    refuses("has no boxes.*a row for each object", pointing, Mapped(), bare)
    refuses("no method `similarity_map`", pointing, ColorModel(), table(tmp_path, "a.png,red,0,0,400,400\n"))
