"""COCO and Flickr30k: photographs with five captions each, for retrieval."""

import json
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from declip.data.pair import PairSource
from declip.errors import UserError
from declip.evaluation.readers.images import CaptionedFiles
from declip.evaluation.readers.layout import opened, require_one
from declip.evaluation.readers.splits import Openers

KARPATHY = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}
"""Our splits to those of Karpathy & Fei-Fei (2015), which retrieval is reported on: 5,000 images of COCO for the
test, 1,000 of Flickr30k."""

FLICKR_FOLDERS = ("flickr30k-images/", "flickr30k_images/", "Images/", "images/")


def coco(name: str, root: Path) -> Openers:
    """Open COCO captions.

    With `dataset_coco.json` and `val2014/` (and `train2014/`): Karpathy's splits. With `captions_val2017.json`, there
    or in `annotations/`, and `val2017/`: those 5,000 images, which are other ones. All captions of an image count.

    Raises:
        UserError: files are missing.
    """
    layouts = [
        ("dataset_coco.json", "val2014/"),
        ("annotations/captions_val2017.json", "val2017/"),
        ("captions_val2017.json", "val2017/"),
    ]
    found = require_one(name, root, layouts)
    if found == 0:
        return _karpathy(name, root / "dataset_coco.json", root, train=(root / "train2014").is_dir())
    return {"test": partial(_coco_2017, name, root / layouts[found][0], root / "val2017")}


def flickr30k(name: str, root: Path) -> Openers:
    """Open Flickr30k.

    With `dataset_flickr30k.json`: Karpathy's splits. With `results_20130124.token` or `results.csv`, which have none,
    all 31,783 images are the test: harder, and not comparable with what is reported for 1,000. The images are in one
    of `FLICKR_FOLDERS`.

    Raises:
        UserError: files are missing.
    """
    lists = ("dataset_flickr30k.json", "results_20130124.token", "results.csv")
    layouts = [(each, folder) for each in lists for folder in FLICKR_FOLDERS]
    path, folder = layouts[require_one(name, root, layouts)]
    if path == lists[0]:
        return _karpathy(name, root / path, root / folder, train=True)
    return {"test": partial(_flickr_lines, name, root / path, root / folder)}


def _karpathy(name: str, path: Path, images: Path, train: bool) -> Openers:
    return {
        which: partial(_karpathy_split, name, path, images, which) for which in KARPATHY if train or which != "train"
    }


def _karpathy_split(name: str, path: Path, images: Path, which: str) -> PairSource:
    def read() -> PairSource:
        rows = [row for row in _json(path)["images"] if row["split"] in KARPATHY[which]]
        keys = [f"{row['filepath']}/{row['filename']}" if row.get("filepath") else row["filename"] for row in rows]
        captions = [[sentence["raw"] for sentence in row["sentences"]] for row in rows]
        return CaptionedFiles(name, images, keys, captions)

    return opened(name, path.parent, read)


def _coco_2017(name: str, path: Path, images: Path) -> PairSource:
    def read() -> PairSource:
        tree = _json(path)
        captions: dict[int, list[str]] = {row["id"]: [] for row in tree["images"]}
        for row in tree["annotations"]:
            captions[row["image_id"]].append(row["caption"])
        keys = [row["file_name"] for row in tree["images"]]
        return CaptionedFiles(name, images, keys, list(captions.values()))

    return opened(name, path.parent, read)


def _flickr_lines(name: str, path: Path, images: Path) -> PairSource:
    return opened(name, path.parent, lambda: _read_flickr_lines(name, path, images))


def _read_flickr_lines(name: str, path: Path, images: Path) -> PairSource:
    """`1.jpg#0<tab>caption` in the .token file; `1.jpg| 0| caption` below a line of headings in the .csv file."""
    captions: dict[str, list[str]] = {}
    table = path.suffix == ".csv"
    with path.open(encoding="utf-8") as lines:
        for line in islice(lines, int(table), None):
            # A caption may hold the mark too, and one published line lacks its second one.
            image, mark, rest = line.rstrip("\r\n").partition("|" if table else "\t")
            if not mark and image:
                name = "|" if table else "tab"
                raise UserError(f"'{path}' has the line '{image[:60]}' without a {name} between image and caption.")
            if table:
                captions.setdefault(image.strip(), []).append(rest.split("|", 1)[-1].strip())
            else:
                captions.setdefault(image.partition("#")[0], []).append(rest)
    captions.pop("", None)
    return CaptionedFiles(name, images, list(captions), list(captions.values()))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
