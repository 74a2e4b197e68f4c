"""Measure pairs per second of one core: two views of JPEG files and their captions, compared with other libraries.

    python benchmarks/loader.py --repeats 7 --json

`PairLoader` reads captions, augments and masks them, and tokenizes all three; of the peers, torchvision's does the two
views alone and open_clip's tokenizes the caption once. All tasks take turns in one process, on one thread.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from io import BytesIO
from itertools import cycle

import numpy as np
import open_clip
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torchvision import transforms

from declip.data.images import decode as picture
from declip.data.images.decode import open_image
from declip.data.images.views import apply_photometric
from declip.data.loader import Assembler, PairLoader
from declip.data.pair import Pair, PairSource
from declip.data.plan import plan_views
from declip.data.text.tokenizer import Tokenizer
from declip.recipe.schema import ImageTowerConfig, ImageView, Recipe
from declip.supervision.objective import needs_of
from pairs import open_pairs
from timing import machine, medians, row, show, time_turns

PAIRS = 64
"""Also the batch size, so that every turn loads the same files."""

SIZES = ((500, 375), (2048, 1536))
QUALITY = 90
SCENES = (
    "the roofs of an old chinese temple above green trees under a clear sky",
    "a large orange flower with many petals in front of a dark garden",
)


DEVICE = "declip, colors left to the device"


class Files(PairSource):
    """JPEG files in memory, each with a caption."""

    def __init__(self, name: str, files: list[bytes], captions: list[str]) -> None:
        self.name, self.files, self.said = name, files, captions

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Pair:
        key, said = str(index), self.said[index]
        return Pair(key, lambda: (said,), partial(open_image, self.files[index], key))


def photographs(width: int, height: int) -> Files:
    """Return crops of scikit-learn's two photographs, resized to one size."""
    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    generator, files, captions = np.random.default_rng(0), [], []
    for number, (image, said) in zip(
        range(PAIRS), cycle(zip(images, SCENES, strict=True)), strict=False
    ):
        share, across, down = generator.uniform(0.6, 1), *generator.random(2)
        left, top = across * (1 - share) * image.width, down * (1 - share) * image.height
        box = (left, top, left + share * image.width, top + share * image.height)
        files.append(encoded(image.resize((width, height), Image.Resampling.BICUBIC, box)))
        captions.append(f"{said}, number {number}")
    return Files(f"photographs, {width} x {height}", files, captions)


def drawings() -> Files:
    """Return emoji if they are downloaded, else drawn shapes."""
    source = open_pairs()
    found = [source[len(source) // PAIRS * number] for number in range(PAIRS)]
    return Files(
        f"{source.name}, 96 x 96",
        [encoded(pair.open().decoded()) for pair in found],
        [pair.captions()[0] for pair in found],
    )


def encoded(image: Image.Image) -> bytes:
    """Encode an image as JPEG."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


class Blur:
    """Pillow's Gaussian blur with a random sigma, as in SLIP; faster than torchvision's."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(np.random.uniform(0.1, 2.0))))


def torchvision_view(size: int) -> transforms.Compose:
    """Return a MoCo v2 view as in DeCLIP and SLIP; its resize is bilinear, ours bicubic."""
    tower, view = ImageTowerConfig(), ImageView()
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, view.scale),
            transforms.RandomApply(
                [transforms.ColorJitter(*view.color_jitter)], view.color_jitter_prob
            ),
            transforms.RandomGrayscale(view.grayscale_prob),
            transforms.RandomApply([Blur()], view.blur_prob),
            transforms.RandomHorizontalFlip(view.hflip_prob),
            transforms.ToTensor(),
            transforms.Normalize(tower.mean, tower.std),
        ]
    )


def rgb(file: bytes) -> Image.Image:
    """Decode a file as the other libraries do."""
    return Image.open(BytesIO(file)).convert("RGB")


def tasks(source: Files, size: int) -> dict[str, Callable[[], object]]:
    """Return the compared tasks, each for `PAIRS` pairs."""
    recipe = Recipe(
        image=ImageTowerConfig(size=size),
        loss_weights={"contrastive": 0.4, "simsiam": 0.4, "masked_language": 0.2},
    )
    plan = plan_views(recipe, needs_of(recipe))
    mean, std = torch.tensor(plan.mean), torch.tensor(plan.std)
    theirs, tokenizer = torchvision_view(size), Tokenizer()
    one_view = open_clip.image_transform(size, is_train=True)
    tokenize = open_clip.get_tokenizer("ViT-B-32")

    def ours(finish: bool) -> Callable[[], object]:
        loader = PairLoader(Assembler(source, tokenizer, plan, batch_size=PAIRS, seed=0))

        def load() -> object:
            batch = next(loader)
            return apply_photometric(batch.views, mean, std) if finish else batch.views

        return load

    def torchvisions() -> torch.Tensor:
        pictures = map(rgb, source.files)
        return torch.stack([torch.stack((theirs(each), theirs(each))) for each in pictures], 1)

    def open_clips() -> tuple[torch.Tensor, torch.Tensor]:
        pictures = map(rgb, source.files)
        return torch.stack(
            [torch.stack((one_view(each), one_view(each))) for each in pictures], 1
        ), tokenize(source.said)

    return {
        DEVICE: ours(finish=False),
        "declip, all on the CPU": ours(finish=True),
        "Pillow and torchvision": torchvisions,
        "open_clip's view, twice": open_clips,
    }


def measure(repeats: int, size: int = 224) -> list[dict[str, object]]:
    """Measure pairs per second of one core, from JPEG files in memory."""
    torch.set_num_threads(1)
    rows = []
    for source in (drawings(), *(photographs(*each) for each in SIZES)):
        seconds = medians(time_turns(repeats, tasks(source, size)))
        about = {"pictures": source.name, "bytes": sum(map(len, source.files)) // PAIRS}
        for what, taken in seconds.items():
            ratio = {"times_device": round(taken / seconds[DEVICE], 2)}
            rows.append(row(f"loading, {size} px", what, taken, PAIRS, "pairs", **about, **ratio))
    return rows


def main() -> None:
    """Measure, print a table, and JSON in the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns of each (default 7)")
    parser.add_argument(
        "--json", action="store_true", help="print machine and rows as JSON, as the last line"
    )
    options = parser.parse_args()
    about = {**machine(), "simplejpeg": picture.simplejpeg is not None}
    show(rows := measure(options.repeats), ("part", "count", "unit"))
    if options.json:
        print(json.dumps({"machine": about, "repeats": options.repeats, "rows": rows}))


if __name__ == "__main__":
    main()
