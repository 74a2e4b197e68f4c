"""The task "pointing" against plain loops, and tables of boxes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import refuses

import declip
from declip.data.pair import Pair, PairSource
from declip.data.sources.open import open_source
from declip.evaluation.results import read_result

BOXES = [
    [("red", (0, 0, 8, 8)), ("blue", (8, 8, 24, 16))],
    [("red", (4, 4, 8, 12)), ("red", (16, 0, 20, 4)), ("green", (0, 0, 24, 16))],
]


class Boxed(PairSource):
    name, boxed = "boxed", True

    def __len__(self):
        return len(BOXES)

    def __getitem__(self, index):
        return Pair(str(index), Image.new("RGB", (24, 16)), ("red",))

    def boxes(self, index):
        return BOXES[index]


class Mapped:
    """A model whose maps are random numbers of the text alone."""

    def encode_image(self, images): ...
    def encode_text(self, tokens): ...
    def preprocess(self, images): ...
    def tokenize(self, texts): ...

    def similarity_map(self, image, texts):
        maps = [np.random.default_rng(len(text)).normal(size=(image.height, image.width)) for text in texts]
        return torch.tensor(np.stack(maps), dtype=torch.float32)


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
    result = declip.evaluate(Mapped(), Boxed(), "pointing", progress=False)
    assert (result.images, result.n, result.pointing) == (2, 4, np.mean(hits))
    assert result.iou == pytest.approx(np.mean(overlaps), abs=1e-6)
    assert result.chance == pytest.approx(np.mean(areas), abs=1e-6)
    assert read_result(json.loads(json.dumps(result.to_dict()))) == result


def test_random_maps_are_at_chance():
    class Random(Mapped):
        rng = np.random.default_rng(0)

        def similarity_map(self, image, texts):
            return torch.from_numpy(self.rng.normal(size=(len(texts), image.height, image.width)))

    class Many(Boxed):
        def __len__(self):
            return 400

        def boxes(self, index):
            return [(str(side), (0, 0, side, 16)) for side in (3, 12)]

    result = declip.evaluate(Random(), Many(), "pointing", progress=False)
    assert result.pointing == pytest.approx(result.chance, abs=0.05)
    assert result.iou == pytest.approx(result.iou_chance, abs=0.01)


ROWS = "image,caption,left,top,right,bottom\n"


def table(folder, rows, side=(800, 400)):
    image = Image.new("RGB", side, "blue")
    image.paste((255, 0, 0), (0, 0, side[0] // 2, side[1]))
    image.save(folder / "a.png")
    (folder / "boxes.csv").write_text(ROWS + rows)
    return folder / "boxes.csv"


def test_a_table_has_a_row_for_each_object(tmp_path):
    path = table(tmp_path, "a.png,red,0,0,400,400\na.png,blue,400,0,800.0,400\n")
    assert open_source(path).boxes(0) == [("red", (0, 0, 400, 400)), ("blue", (400, 0, 800, 400))]

    class Half(Mapped):
        def similarity_map(self, image, texts):
            assert image.size == (384, 192), "large images are scaled, and the boxes with them"
            left = torch.arange(384).expand(192, 384).float()
            return torch.stack([-left if text == "red" else left for text in texts])

    result = declip.evaluate(Half(), path, "pointing", progress=False)
    assert (result.n, result.pointing, result.iou, result.chance) == (2, 1, 1, 0.5)


def test_unusable_boxes_are_counted(tmp_path):
    rows = "a.png,red,0,0,400,400\nb.png,red,0,0,4,4\n"
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    for name, sides in (("c.png", "5,5,5,6"), ("d.png", "x,0,1,1"), ("e.png", "0,0,nan,1")):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        rows += f"{name},red,{sides}\n"
    result = declip.evaluate(Mapped(), table(tmp_path, rows), "pointing", progress=False)
    assert (result.n, dict(result.skipped)) == (1, {"missing image": 1, "empty box": 1, "unreadable box": 2})
    refuses(
        "no image with a box could be read",
        declip.evaluate,
        Mapped(),
        table(tmp_path, "a.png,red,1,1,1,1\n"),
        "pointing",
    )


def test_what_has_no_boxes_or_maps_is_refused(tmp_path):
    path = table(tmp_path, "a.png,red,0,0,400,400\n")
    refuses(
        "has no boxes.*a row for each object",
        declip.evaluate,
        Mapped(),
        [(Image.new("RGB", (8, 8)), "red")],
        "pointing",
    )

    class Plain:
        encode_image = encode_text = preprocess = tokenize = None

    refuses("no method `similarity_map`", declip.evaluate, Plain(), path, "pointing")
