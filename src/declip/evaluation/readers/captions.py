"""COCO and Flickr30k: photographs with five captions each, for retrieval."""

import json
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from declip.data.pair import PairSource
from declip.errors import UserError
from declip.evaluation.readers.images import CaptionedFiles, Openers, opened

KARPATHY = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}
"""Our splits → those of Karpathy & Fei-Fei (2015), which retrieval is reported on: 5,000 images of COCO for the
test, 1,000 of Flickr30k."""

COCO = (
    ("dataset_coco.json", "val2014"),
    ("annotations/captions_val2017.json", "val2017"),
    ("captions_val2017.json", "val2017"),
)
FLICKR_LISTS = ("dataset_flickr30k.json", "results_20130124.token", "results.csv")
FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images", "Images", "images")
FLICKR = tuple((file, folder) for file in FLICKR_LISTS for folder in FLICKR_FOLDERS)


def coco(name: str, root: Path) -> Openers:
    """Open COCO captions.

    With `dataset_coco.json` and `val2014/` (and `train2014/`): Karpathy's splits. With `captions_val2017.json`, there
    or in `annotations/`, and `val2017/`: those 5,000 images, which are other ones. All captions of an image count.
    """
    path, images = _layout(name, root, COCO)
    if path.name == "dataset_coco.json":
        return _karpathy(name, path, root, train=(root / "train2014").is_dir())
    return {"test": partial(opened, name, root, str(path), partial(_coco_2017, name, path, images))}


def flickr30k(name: str, root: Path) -> Openers:
    """Open Flickr30k.

    With `dataset_flickr30k.json`: Karpathy's splits. With `results_20130124.token` or `results.csv`, which have none,
    all 31,783 images are the test: harder, and not comparable with reported results on 1,000. The images are in one
    of `FLICKR_FOLDERS`.
    """
    path, images = _layout(name, root, FLICKR)
    if path.suffix == ".json":
        return _karpathy(name, path, images, train=True)
    return {"test": partial(opened, name, root, str(path), partial(_flickr_lines, name, path, images))}


def _layout(name: str, root: Path, layouts: Sequence[tuple[str, str]]) -> tuple[Path, Path]:
    """The list and the folder of images of the first layout that is complete."""
    for file, folder in layouts:
        if (root / file).is_file() and (root / folder).is_dir():
            return root / file, root / folder
    known = "; or ".join(f"{file} with {folder}/" for file, folder in layouts)
    raise UserError(f"'{name}' is not complete in '{root}'. Expected below that folder: {known}.")


def _karpathy(name: str, path: Path, images: Path, train: bool) -> Openers:
    return {
        which: partial(opened, name, path.parent, str(path), partial(_karpathy_split, name, path, images, which))
        for which in KARPATHY
        if train or which != "train"
    }


def _karpathy_split(name: str, path: Path, images: Path, which: str) -> PairSource:
    rows = [row for row in _json(path)["images"] if row["split"] in KARPATHY[which]]
    keys = [f"{row['filepath']}/{row['filename']}" if row.get("filepath") else row["filename"] for row in rows]
    return CaptionedFiles(name, images, keys, [[sentence["raw"] for sentence in row["sentences"]] for row in rows])


def _coco_2017(name: str, path: Path, images: Path) -> PairSource:
    tree = _json(path)
    captions: dict[int, list[str]] = {row["id"]: [] for row in tree["images"]}
    for row in tree["annotations"]:
        captions[row["image_id"]].append(row["caption"])
    return CaptionedFiles(name, images, [row["file_name"] for row in tree["images"]], list(captions.values()))


def _flickr_lines(name: str, path: Path, images: Path) -> PairSource:
    """`1.jpg#0<tab>caption` in the .token file; `1.jpg| 0| caption` below a line of headings in the .csv file."""
    captions: dict[str, list[str]] = {}
    table = path.suffix == ".csv"
    with path.open(encoding="utf-8") as lines:
        for line in islice(lines, int(table), None):
            # A caption may hold the mark too, and one published line lacks its second one.
            image, mark, rest = line.rstrip("\r\n").partition("|" if table else "\t")
            if not mark and image:
                shown = "|" if table else "tab"
                raise UserError(f"'{path}' has the line '{image[:60]}' without a {shown} between image and caption.")
            if table:
                captions.setdefault(image.strip(), []).append(rest.split("|", 1)[-1].strip())
            else:
                captions.setdefault(image.partition("#")[0], []).append(rest)
    captions.pop("", None)
    return CaptionedFiles(name, images, list(captions), list(captions.values()))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
