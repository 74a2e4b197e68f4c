"""COCO and Flickr30k: photographs with five captions each, for retrieval."""

import json
from functools import partial
from pathlib import Path

from declip.errors import UserError
from declip.evaluation.readers.images import FileList, Openers

KARPATHY = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}
"""Our splits → those of Karpathy & Fei-Fei (2015), which papers report: 5,000 test images of COCO, 1,000 of
Flickr30k."""

FOLDERS = {"coco": ("val2014",), "flickr30k": ("flickr30k-images", "flickr30k_images", "Images", "images")}
"""Usual names of the folder of images, of which one must exist."""


def captioned(name: str, root: Path) -> Openers:
    """Open COCO or Flickr30k: `dataset_NAME.json` with a folder of images; all captions of an image are used.

    COCO's training split needs `train2014/` too.
    """
    path = root / f"dataset_{name}.json"
    folder = next((folder for folder in FOLDERS[name] if (root / folder).is_dir()), None)
    if folder is None or not path.is_file():
        raise UserError(
            f"'{name}' is incomplete in '{root}'. Expected in that folder: {path.name} with {FOLDERS[name][0]}/."
        )
    # The list of COCO includes the folder of each image.
    images = root if name == "coco" else root / folder
    missing = {"train"} if name == "coco" and not (root / "train2014").is_dir() else set()
    return {which: partial(_karpathy, name, path, images, which) for which in KARPATHY if which not in missing}


def _karpathy(name: str, path: Path, images: Path, which: str) -> FileList:
    tree = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in tree["images"] if row["split"] in KARPATHY[which]]
    keys = [f"{row['filepath']}/{row['filename']}" if row.get("filepath") else row["filename"] for row in rows]
    return FileList(name, images, keys, [[sentence["raw"] for sentence in row["sentences"]] for row in rows])
