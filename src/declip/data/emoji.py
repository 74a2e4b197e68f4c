"""`builtin:emoji`: emoji drawn by many hands, read from the cache that `prepare_emoji` makes.

Several designers drew the same concepts, so the pairs are real and there is a clean test: a designer never seen in
training, for concepts seen and for concepts never seen.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from declip.data.pair import BUILTIN_PREFIX, Pair
from declip.data.picture_cache import TABLE, Cache
from declip.errors import unknown

EMOJI = Cache("emoji", layout=2, effort="17 MB to fetch, about a minute")
IMAGES = "images.npy"


@dataclass(frozen=True)
class Design:
    """A designer's set.

    Attributes:
        key: Name in keys and tables.
        package: The npm package with its drawings.
        version: Its version; a newer one may draw other emoji and so change what a result was measured on.
        credit: What its licence asks to be said wherever a drawing is shown.
        spelled: Whether the names of its drawings are written as words and so serve as captions.
    """

    key: str
    package: str
    version: str
    credit: str
    spelled: bool = True


DESIGNS = (
    Design("noto", "@iconify-json/noto", "1.2.9", "Noto Emoji by Google, Apache-2.0"),
    Design("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Noto Emoji v1 by Google, Apache-2.0"),
    Design("twemoji", "@iconify-json/twemoji", "1.2.5", "Twemoji by Twitter and contributors, CC-BY-4.0"),
    Design("fxemoji", "@iconify-json/fxemoji", "1.2.2", "FxEmoji by Mozilla, Apache-2.0", spelled=False),
    Design("emojione-v2", "@iconify-json/emojione", "1.2.3", "EmojiOne v2 by EmojiOne, CC-BY-4.0"),
    Design("emojione-v1", "@iconify-json/emojione-v1", "1.2.3", "EmojiOne v1 by EmojiOne, CC-BY-SA-4.0"),
    Design("openmoji", "@iconify-json/openmoji", "1.2.29", "OpenMoji by the OpenMoji project, CC-BY-SA-4.0"),
    Design("fluent", "@iconify-json/fluent-emoji-flat", "1.2.6", "Fluent Emoji by Microsoft, MIT"),
)
TRAINING = ("noto", "noto-v1", "twemoji", "fxemoji", "emojione-v2")


@dataclass(frozen=True)
class Split:
    """Which pairs: all drawings by these designers of concepts that training knows, or of those held out of it."""

    designs: tuple[str, ...]
    new: bool = False
    evaluation: bool = False


SPLITS: dict[str, Split] = {
    "emoji": Split(TRAINING),
    "emoji-share-alike": Split((*TRAINING, "emojione-v1")),
    "emoji-validation": Split(("openmoji",), evaluation=True),
    "emoji-validation-new": Split(("openmoji",), new=True, evaluation=True),
    "emoji-test": Split(("fluent",), evaluation=True),
    "emoji-test-new": Split(("fluent",), new=True, evaluation=True),
}


class EmojiSource:
    """Drawings of one split, in the order of the cache: by designer, then as Unicode orders emoji.

    Args:
        split: One of `SPLITS`.
        cache: Folder of the cache; None for the usual one.

    Raises:
        UserError: The cache is missing, damaged or of another layout.
    """

    def __init__(self, split: str, cache: str | Path | None = None) -> None:
        if split not in SPLITS:
            raise unknown("split of the emoji", split, SPLITS)
        self._arguments = (split, cache)
        self.name = BUILTIN_PREFIX + split
        folder = EMOJI.folder(cache)
        EMOJI.check(folder)
        wanted = SPLITS[split]
        table = pq.read_table(folder / TABLE).to_pylist()
        known = {row["code"] for row in table if row["design"] in TRAINING and not row["held_out"]}
        self.rows: list[dict[str, Any]] = [
            row
            for row in table
            if row["design"] in wanted.designs and (row["held_out"] if wanted.new else row["code"] in known)
        ]
        self.credit = "; ".join(design.credit for design in DESIGNS if design.key in wanted.designs)
        self._images = np.load(folder / IMAGES, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        row = self.rows[index]
        image = Image.fromarray(np.array(self._images[row["image"]]))
        return Pair(row["key"], image, tuple(row["captions"]), tuple(row["keywords"]))

    def key(self, index: int) -> str:
        """The key of pair `index`, without its drawing."""
        return self.rows[index]["key"]

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of pair `index`, the CLDR name first."""
        return tuple(self.rows[index]["captions"])

    def __reduce__(self) -> tuple[type["EmojiSource"], tuple[object, ...]]:
        """Pickled as what to open: the images stay in the file, shared by all processes."""
        return type(self), self._arguments


class EmojiClasses(EmojiSource):
    """A split for evaluation: one designer, so that each concept is a class of one drawing.

    Attributes:
        labels: int64 (n,), the position of each pair.
        class_names: The n CLDR names, no two alike.
    """

    def __init__(self, split: str, cache: str | Path | None = None) -> None:
        super().__init__(split, cache)
        self.labels = np.arange(len(self), dtype=np.int64)
        self.class_names = tuple(row["name"] for row in self.rows)


def open_emoji(split: str, cache: str | Path | None = None) -> EmojiSource:
    """Open one of `SPLITS`; those for evaluation have `labels` and `class_names`."""
    evaluation = split in SPLITS and SPLITS[split].evaluation
    return EmojiClasses(split, cache) if evaluation else EmojiSource(split, cache)
