"""The built-in emoji as a tar shard in which a fraction of the pairs has the captions of another pair.

python benchmarks/noisy.py --fraction 0.4 --out runs/noisy.tar
declip compare demo-clip demo-declip-keywords data.source=runs/noisy.tar --pairs 5600 --seeds 3 …
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from rich.progress import track

from declip.data.sources.open import open_source


def main() -> None:
    """Write the shard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=0.4)
    parser.add_argument("--source", default="builtin:emoji")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    source = open_source(options.source)
    generator = np.random.default_rng(options.seed)
    swapped = generator.permutation(len(source))[: round(options.fraction * len(source))]
    words = np.arange(len(source))
    words[swapped] = np.roll(swapped, 1)  # each takes those of another swapped pair
    with tarfile.open(options.out, "w") as tar:
        for index in track(range(len(source)), "writing"):
            pair, other = source[index], source[int(words[index])]
            image = io.BytesIO()
            pair.image.save(image, "png")
            text = json.dumps({"caption": other.captions, "keywords": other.keywords}).encode()
            for ending, content in (("png", image.getvalue()), ("json", text)):
                member = tarfile.TarInfo(f"{index:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
