"""Images without captions: SimCLR on a folder of images, then a recipe on the pairs from these weights.

python examples/images_without_captions.py pictures/ pairs.csv runs/clip
"""

import sys
from pathlib import Path

import declip
from declip.data.images.decode import EXTENSIONS

SHARE = 0.6  # of the time, for images alone
RATIO = 1.5  # time of a step of SimCLR over that of CLIP
STRONG = {
    "views.image.scale": [0.35, 1.0],
    "views.image.color_jitter": [0.4, 0.4, 0.4, 0.1],
    "views.image.blur_prob": 0.5,
}


class Images:
    """The images below a folder; the same caption for each, which SimCLR does not read."""

    def __init__(self, folder: str) -> None:
        self.paths = sorted(
            path for path in Path(folder).rglob("*") if path.suffix.lower() in EXTENSIONS
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Path, str]:
        return self.paths[index], "an image"


def main(images: str, pairs: str, out: str, steps: int = 2400, **overrides: object) -> None:
    """Train the demo model in the time of `steps` steps of CLIP; for photographs, use the recipes slip and clip."""
    alone = round(SHARE * steps / RATIO)
    keys = {
        "loss_weights": {"contrastive": 0.0, "simclr": 1.0},
        "train.steps": alone,
        **STRONG,
        **overrides,
    }
    first = declip.train("demo-slip", keys, out=f"{out}-images", data=Images(images), report=False)
    keys = {
        "finetune.pretrained": str(first.folder),
        "train.steps": round((1 - SHARE) * steps),
        **overrides,
    }
    declip.train("demo-few-clip", keys, out=out, data=pairs)


if __name__ == "__main__":
    main(*sys.argv[1:4])
