"""A loss, a source of pairs and a tracker outside of declip's own package."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from declip import Columns
from declip.data.pair import LazyImage, Pair, PairSource
from declip.errors import UserError
from declip.supervision.term import Rows, Similarity, Term
from declip.training.sinks import RunInfo
from declip.training.trackers import Tracker

COLORS = ("red", "green", "blue", "yellow", "black")


class Alignment(Term):
    """Mean squared distance of an image to its caption (Wang and Isola 2020, arXiv 2005.10242)."""

    reaches_all = False  # the logit scale gets no gradient
    title = "alignment"
    explanation = "Moves an image and its caption together."

    def keys(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}  # compares each pair with itself alone

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        return (own.images[0] - own.texts[0]).square().sum(dim=-1).mean()


class Circles(PairSource):
    """Pairs that are drawn when they are read; `circles:200` has 200."""

    def __init__(self, count: str, columns: Columns) -> None:
        if not count.isdecimal() or not int(count):
            raise UserError(
                f"'circles:{count}' has no number of pairs. Write circles:200, for example."
            )
        self.name, self.count = f"circles:{count}", int(count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        caption = f"a {COLORS[index % len(COLORS)]} circle of {16 + index % 32} pixels"
        # Drawn only when the image is asked for; with an image at hand: Pair.of(key, image, captions)
        return Pair(str(index), partial(tuple, [caption]), partial(self._draw, index))

    def _draw(self, index: int) -> LazyImage:
        image, margin = Image.new("RGB", (64, 64), "white"), 24 - index % 32 / 2
        ImageDraw.Draw(image).ellipse(
            (margin, margin, 64 - margin, 64 - margin), fill=COLORS[index % len(COLORS)]
        )
        return LazyImage(image)


class Lines(Tracker):
    """Writes a line for each logged step to lines.txt in the run folder."""

    library = "declip_sketch"

    def start(self, info: RunInfo) -> None:
        self.file = (info.folder / "lines.txt").open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self.file.write(f"{step} {values['train/loss']:.4f}\n" if "train/loss" in values else "")

    def close(self) -> None:
        self.file.close()
