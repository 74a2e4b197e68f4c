"""Stand-ins for the tests of data: JPEG files, tables, shards, a source of noise, a tokenizer, loaders by options."""

import csv
import io
import json
import tarfile
import zlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import encoded, refuses, write_rows
from declip.data.images.views import ViewTransform
from declip.data.loader import Assembler, PairLoader
from declip.data.pair import BrokenPair, Pair, PairSource
from declip.data.plan import Plan
from declip.data.sources.open import open_source
from declip.recipe.schema import ImageView, TextView


def scene(width=150, height=101, seed=0):
    """Smooth colors with some grain, as a photograph has them."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), 3
    )
    grain = generator.normal(0, 4, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def jpeg(image=None, **options):
    """A JPEG file of an image, of a scene by default."""
    return encoded(image or scene(), "JPEG", **{"quality": 90} | options)


class Noise(PairSource):
    """Images of noise, two captions a pair; some broken, by place and reason."""

    def __init__(self, count=30, broken=None):
        self.name, self.count, self.broken = "fake", count, broken or {}

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenPair(self.broken[index], f"pair-{index}")
        noise = np.random.default_rng(index).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        return Pair.of(f"pair-{index}", Image.fromarray(noise), self.said(index))

    def said(self, index):
        end = "of a small dog under the green tree by night"
        return f"{index} photo {end}", f"{index} sketch {end}"


class Words:
    """A tokenizer with an id a word."""

    vocabulary, start, end, mask, padding = 5003, 5000, 5001, 5002, 0
    words = range(start)

    def __init__(self, context=32):
        self.context, self.word_of = context, {}

    def encode(self, text):
        ids = [1 + zlib.crc32(word.encode()) % 4999 for word in text.split()]
        self.word_of |= dict(zip(ids, text.split(), strict=True))
        return [self.start, *ids[: self.context - 2], self.end]

    def decode(self, ids):
        return " ".join(self.word_of[number] for number in ids[1:-1])


def make_loader(
    source=None,
    *,
    size=12,
    context=32,
    mask=0.15,
    whole_context=False,
    interpolation="bicubic",
    **options,
):
    """A loader of two views; options go to `TextView`, the loader and the assembler."""
    text = {name: options.pop(name) for name in TextView.model_fields.keys() & options}
    specs = tuple(
        ViewTransform(name, size, ImageView(), interpolation) for name in ("first", "second")
    )
    plan = Plan(specs, 2, TextView(**text), mask, whole_context, (0.5,) * 3, (0.25,) * 3)
    plan = replace(plan, duplicates=options.pop("duplicates", False))
    loading = {
        name: options.pop(name)
        for name in {"step", "workers", "max_broken_fraction"} & options.keys()
    }
    assembler = Assembler(
        source or Noise(), Words(context), plan, **({"batch_size": 6, "seed": 3} | options)
    )
    return PairLoader(assembler, **loading)


KINDS = ["jsonl", "csv", "tsv", "parquet"]


def write(path, rows, names=("image", "caption")):
    """Write rows in the format of the path's extension."""
    if path.suffix == ".jsonl":
        return write_rows(path, [dict(zip(names, row, strict=True)) for row in rows])
    if path.suffix == ".parquet":
        columns = {name: [row[place] for row in rows] for place, name in enumerate(names)}
        pq.write_table(pa.table(columns), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            table.writerows([names, *rows])
    return path


def reason_of(source, index):
    with pytest.raises(BrokenPair) as caught:
        read(source, index)
    return caught.value.reason


def read(source, index):
    """Captions and pixels of a pair."""
    pair = source[index]
    return pair.captions(), pair.image()


def message(*arguments, **options):
    return refuses("", open_source, *arguments, **options)


SIZES = (5, 1, 9, 6)
"""Pairs in each shard of the fixture `shard_folder`."""


def picture(number, kind="png"):
    """An image whose pixels tell its number."""
    return encoded(Image.new("RGB", (16, 16), (number % 256, number // 256, 7)), kind)


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    """A tar of these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pair(number):
    """The members of pair `number`, as img2dataset writes them."""
    said = {"caption": f"picture {number}", "url": "http://x"}
    return [
        (f"{number:09d}.png", picture(number)),
        (f"{number:09d}.txt", f"picture {number}".encode()),
        (f"{number:09d}.json", json.dumps(said).encode()),
    ]


def write_shards(folder, sizes):
    """Shards 00000.tar and so on with so many pairs, numbered through."""
    first = 0
    for shard, size in enumerate(sizes):
        write_tar(
            folder / f"{shard:05d}.tar", [m for n in range(first, first + size) for m in pair(n)]
        )
        first += size
    return folder
