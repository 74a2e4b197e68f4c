"""SUN397 with its official first partition."""

from functools import partial
from pathlib import Path

from torchvision import datasets

from declip.errors import UserError
from declip.evaluation.prompt_sets import class_names
from declip.evaluation.readers.images import LabeledFiles
from declip.evaluation.readers.layout import below, opened, require
from declip.evaluation.readers.splits import Openers, drawn_split

PER_CLASS = 50
"""Images of each class in each half of an official partition (Xiao et al. 2010): 19,850 of the 108,754."""

LISTS = {"train": "Training_01.txt", "test": "Testing_01.txt"}
PLACES = ("SUN397", "SUN397/Partitions", "Partitions", ".")
"""Where the lists, which come in an archive of their own, are looked for."""


def sun397(name: str, root: Path) -> Openers:
    """Open SUN397: `root` holds `SUN397/` with `ClassName.txt` and a folder for each first letter.

    With `Training_01.txt` and `Testing_01.txt` in one of `PLACES` the splits are the official ones. Without them 50
    images of each class for training and 50 others for the test are drawn with seed 0, of the paths in order.

    Raises:
        UserError: files are missing.
    """
    require(name, root, ["SUN397/ClassName.txt"])
    return {which: partial(_split, name, root, which) for which in LISTS}


def _split(name: str, root: Path, which: str) -> LabeledFiles:
    return opened(name, root, lambda: _read_split(name, root, which))


def _read_split(name: str, root: Path, which: str) -> LabeledFiles:
    folder = root / "SUN397"
    where = next(
        (root / place for place in PLACES if all((root / place / file).is_file() for file in LISTS.values())), None
    )
    if where is not None:
        classes = [line[3:].strip() for line in (folder / "ClassName.txt").read_text().splitlines() if line.strip()]
        keys = [line.strip().lstrip("/") for line in (where / LISTS[which]).read_text().splitlines() if line.strip()]
        number = {raw: label for label, raw in enumerate(classes)}
        # "a/abbey/sun_aaa.jpg": the first letter, the class, which may hold a slash itself, and the file.
        raw = [key.partition("/")[2].rpartition("/")[0] for key in keys]
        if strange := next((each for each in raw if each not in number), None):
            raise UserError(f"'{where / LISTS[which]}' names the class '{strange}', which ClassName.txt does not.")
        labels = [number[each] for each in raw]
    else:
        found = datasets.SUN397(root, download=False)
        rows = sorted(zip(below(folder, found._image_files), found._labels, strict=True))
        places = drawn_split([label for _, label in rows], PER_CLASS, PER_CLASS)[which]
        keys, labels = [rows[place][0] for place in places], [rows[place][1] for place in places]
        classes = found.classes
    return LabeledFiles(name, folder, keys, labels, class_names(name, [raw.replace("/", " ") for raw in classes]))
