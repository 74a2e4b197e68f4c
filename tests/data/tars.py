"""Small shards for the tests, written with the standard library."""

import io
import json
import tarfile

from PIL import Image

from conftest import encoded

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
        write_tar(folder / f"{shard:05d}.tar", [m for n in range(first, first + size) for m in pair(n)])
        first += size
    return folder
