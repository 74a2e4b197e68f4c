"""Shrink the images of a source and write tar shards; the same call continues a stopped one.

python examples/shards.py pairs.csv shards 256
"""

import io
import json
import os
import sys
import tarfile
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader

from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.open import open_source
from declip.data.sources.splits import training_part


def shrink(source: PairSource, size: int, index: int) -> dict[str, bytes]:
    """A pair's files, with at most `size` pixels on the shorter side of the image; none if it cannot be used."""
    try:
        pair = source[index]
        captions = pair.captions()
        image = pair.open().decoded()
    except BrokenPair:
        return {}
    ratio, jpeg = min(1, size / min(image.size)), io.BytesIO()
    small = image.resize([round(ratio * side) for side in image.size])
    small.save(jpeg, "JPEG", quality=92)
    return {
        f"{index:09d}.jpg": jpeg.getvalue(),
        f"{index:09d}.json": json.dumps({"caption": captions}).encode(),
    }


def main(
    data: str, out: str, size: int = 256, pairs: int = 10_000, workers: int = os.cpu_count() or 0
) -> None:
    """Write shards of `pairs` pairs each, without those of other splits than training."""
    source, folder = training_part(open_source(data)), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(source), pairs):
        shard, part = (folder / f"{start:09d}.{end}" for end in ("tar", "part"))
        indices = list(range(start, min(start + pairs, len(source))))
        if not shard.exists():
            with tarfile.open(part, "w") as tar:
                for files in DataLoader(
                    indices, None, num_workers=workers, collate_fn=partial(shrink, source, size)
                ):
                    for name, content in files.items():
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            part.rename(shard)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
