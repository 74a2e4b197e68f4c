"""COCO and Flickr30k: photographs with five captions each, for retrieval."""

import json
from functools import partial
from pathlib import Path

from declip.errors import UserError
from declip.evaluation.readers.images import FileList, Openers

KARPATHY = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}
"""Our splits → those of Karpathy & Fei-Fei (2015), which papers report: 5,000 test images of COCO, 1,000 of
Flickr30k."""

COCO = (
    ("dataset_coco.json", "val2014"),
    ("annotations/captions_val2017.json", "val2017"),
    ("captions_val2017.json", "val2017"),
)
FLICKR = tuple(
    ("dataset_flickr30k.json", folder) for folder in ("flickr30k-images", "flickr30k_images", "Images", "images")
)


def captioned(name: str, root: Path) -> Openers:
    """Open COCO or Flickr30k in the first complete one of its layouts, a list and a folder of images.

    With `dataset_*.json`: Karpathy's splits; COCO's training split needs `train2014/` too. With
    `captions_val2017.json`: the 5,000 images of COCO 2017, which differ. All captions of an image are used.
    """
    layouts = COCO if name == "coco" else FLICKR
    for file, folder in layouts:
        if (root / file).is_file() and (root / folder).is_dir():
            break
    else:
        known = "; or ".join(f"{file} with {folder}/" for file, folder in layouts)
        raise UserError(f"'{name}' is incomplete in '{root}'. Expected in that folder: {known}.")
    if folder == "val2017":
        return {"test": partial(_coco_2017, name, root / file, root / folder)}
    # The list of COCO includes the folder of each image.
    images = root if name == "coco" else root / folder
    missing = {"train"} if name == "coco" and not (root / "train2014").is_dir() else set()
    return {which: partial(_karpathy, name, root / file, images, which) for which in KARPATHY if which not in missing}


def _karpathy(name: str, path: Path, images: Path, which: str) -> FileList:
    tree = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in tree["images"] if row["split"] in KARPATHY[which]]
    keys = [f"{row['filepath']}/{row['filename']}" if row.get("filepath") else row["filename"] for row in rows]
    return FileList(name, images, keys, [[sentence["raw"] for sentence in row["sentences"]] for row in rows])


def _coco_2017(name: str, path: Path, images: Path) -> FileList:
    tree = json.loads(path.read_text(encoding="utf-8"))
    captions: dict[int, list[str]] = {row["id"]: [] for row in tree["images"]}
    for row in tree["annotations"]:
        captions[row["image_id"]].append(row["caption"])
    return FileList(name, images, [row["file_name"] for row in tree["images"]], list(captions.values()))
