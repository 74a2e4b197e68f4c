"""Scenes of several emoji on textured ground, with the box of each: for similarity maps and losses between patches."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from declip.data.builtin.fetch import Package, Packages
from declip.data.builtin.pictures import BuiltinSet, BuiltinSource, Row, Selection

SIZES = 24, 40  # pixels of an object, smallest and largest
OBJECTS = 3, 5  # in a scene
SPARE = 8  # drawings to try in a scene
TRIES = 40  # places to try for an object; where none is free, another object is tried
WHITE = 246  # values above it are the paper that a drawing was made on


class Scenes(BuiltinSet):
    """The scenes: each of one designer's emoji; what a scene shows depends on its split and number alone."""

    name, layout, effort = "scenes", 1, "four minutes and 640 MB, from the emoji"
    side = 96
    names_by = "Names: as of the emoji"
    splits: ClassVar[Mapping[str, tuple[str, int]]] = {  # the emoji in them, and the number of scenes
        "scenes": ("emoji", 20_000),
        "scenes-validation": ("emoji-validation", 1_000),
        "scenes-test": ("emoji-test", 1_000),
        "scenes-test-new": ("emoji-test-new", 1_000),
    }

    def __init__(self, emoji: BuiltinSet) -> None:
        self.emoji = emoji

    @contextmanager
    def fetched(self, cache: str | Path | None, progress: bool) -> Iterator[Packages]:
        folder = self.emoji.download(cache, progress)
        licenses = {each.name: sorted(each.iterdir()) for each in sorted((folder / "licenses").iterdir())}
        packages = {name: Package(folder, "by way of the emoji", notices) for name, notices in licenses.items()}
        yield {"emoji": Package(folder, f"drawn at {self.emoji.side} px", []), **packages}

    def credit(self, row: Row) -> str:
        return self.emoji.credit(row)

    def select(self, split: str, table: list[Row]) -> Selection:
        return [row for row in table if row["split"] == split], None, ()

    def choose(self, packages: Packages) -> list[Row]:
        rows = []
        for seed, (split, (emoji, count)) in enumerate(self.splits.items()):
            source = opened(self.emoji, emoji, packages["emoji"].folder.parent)
            by_design: dict[str, list[int]] = {}
            for index, row in enumerate(source.rows):
                by_design.setdefault(row["design"], []).append(index)
            for number in range(count):
                rng = np.random.default_rng((seed, number))
                ground(rng, self.side)  # the same numbers as in `pixels`
                design = list(by_design)[rng.integers(len(by_design))]
                objects = place(rng, by_design[design], source, self.side)
                row = {"key": f"{split}/{number}", "split": split, "seed": [seed, number], "design": design}
                rows.append({**row, "captions": describe(rng, objects), "objects": objects})
        return rows

    def pixels(self, row: Row, packages: Packages) -> np.ndarray:
        source = opened(self.emoji, self.splits[row["split"]][0], packages["emoji"].folder.parent)
        scene = ground(np.random.default_rng(row["seed"]), self.side)
        for item in row["objects"]:
            size, both = (item["right"] - item["left"],) * 2, layers(source, item["drawing"])
            drawing, opacity = (layer.resize(size, Image.Resampling.LANCZOS) for layer in both)
            scene.paste(drawing, (item["left"], item["top"]), opacity)
        return np.asarray(scene)


@lru_cache
def opened(emoji: BuiltinSet, split: str, cache: Path) -> BuiltinSource:
    """The emoji of a split."""
    return BuiltinSource(emoji, split, cache)


@cache
def layers(source: BuiltinSource, index: int) -> tuple[Image.Image, Image.Image]:
    """A drawing and its opacity, "L": white that reaches the border is outside."""
    drawing = source.image(index)
    white = Image.fromarray(np.where((np.asarray(drawing) > WHITE).all(2), 255, 0).astype(np.uint8))
    framed = ImageOps.expand(white, 1, 255)
    ImageDraw.floodfill(framed, (0, 0), 128)
    return drawing, ImageOps.crop(framed, 1).point(lambda value: 0 if value == 128 else 255)


def ground(rng: np.random.Generator, side: int) -> Image.Image:
    """Mix two bright colors by blurred noise."""
    noise = Image.fromarray(rng.integers(0, 256, (side, side), np.uint8))
    mix = np.asarray(noise.filter(ImageFilter.GaussianBlur(rng.uniform(1, 6))), np.float32)[..., None]
    mix = (mix - mix.min()) / max(1.0, float(mix.max() - mix.min()))
    one, other = rng.integers(90, 256, 3), rng.integers(90, 256, 3)
    return Image.fromarray((one + (other - one) * mix).astype(np.uint8))


def place(rng: np.random.Generator, drawings: list[int], source: BuiltinSource, side: int) -> list[dict[str, Any]]:
    """Put objects of different names where none covers another."""
    objects: dict[str, dict[str, Any]] = {}
    wanted = int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))
    for drawing in rng.choice(drawings, min(SPARE, len(drawings)), replace=False).tolist():
        name = source.captions(drawing)[0]
        if len(objects) == wanted:
            break
        for _ in range(TRIES):
            size = int(rng.integers(SIZES[0], SIZES[1] + 1))
            left, top = (int(rng.integers(0, side - size + 1)) for _ in range(2))
            box = {"left": left, "top": top, "right": left + size, "bottom": top + size}
            if name not in objects and not any(overlap(box, other) for other in objects.values()):
                objects[name] = {"name": name, "drawing": drawing, **box}
                break
    return list(objects.values())


def overlap(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether two boxes share a pixel."""
    sides = (("left", "right"), ("top", "bottom"))
    return all(one[start] < other[end] and other[start] < one[end] for start, end in sides)


def describe(rng: np.random.Generator, objects: list[dict[str, Any]]) -> list[str]:
    """Two captions: all names in random order, and where one object is from another."""
    order = [objects[i] for i in rng.permutation(len(objects))]
    one, other = order[:2]
    across, down = one["left"] - other["left"], one["top"] - other["top"]
    side = ("left of" if across < 0 else "right of") if abs(across) > abs(down) else ("above" if down < 0 else "below")
    return [", ".join(item["name"] for item in order), f"{one['name']} {side} {other['name']}"]
