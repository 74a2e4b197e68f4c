"""Two MoCo v2 views of a batch: `ViewTransform`, whose colors are changed on the batch, and torchvision per image."""

import numpy as np
import torch
from torchvision import transforms

from declip.data.batch import Photometric, View
from declip.data.images.crops import ViewTransform, apply_photometric
from declip.recipe.schema import ImageTowerConfig, ImageView
from pairs import open_pairs
from timing import row, take_turns

BATCH = 128


def peer(size: int, view: ImageView, kernel: int) -> transforms.Compose:
    """The same views from the same distributions by torchvision, image by image.

    `torchvision.transforms` on PIL images is its quickest way here: `transforms.v2` on PIL took 1.1 to 1.2
    times as long, and v2 on uint8 tensors 1.1 to 1.8 times.
    """
    tower = ImageTowerConfig()
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, view.scale, view.ratio, transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(view.hflip_prob),
            transforms.RandomApply([transforms.ColorJitter(*view.color_jitter)], view.color_jitter_prob),
            transforms.RandomGrayscale(view.grayscale_prob),
            transforms.RandomApply([transforms.GaussianBlur(kernel, view.blur_sigma)], view.blur_prob),
            transforms.ToTensor(),
            transforms.Normalize(tower.mean, tower.std),
        ]
    )


def measure(repeats: int) -> list[dict[str, object]]:
    """Two views of 128 decoded images at 32 and at 224 pixels, on one thread, as a loading process has it."""
    source, view, tower = open_pairs(), ImageView(), ImageTowerConfig()
    step = len(source) // BATCH
    images = [source[step * number].image for number in range(BATCH)]
    mean, std = torch.tensor(tower.mean), torch.tensor(tower.std)
    rows = []
    for size in (32, 224):
        ours_view = ViewTransform(size, view)
        transform = peer(size, view, kernel=2 * ours_view.blur_radius + 1)
        generator = np.random.default_rng(0)
        shape = (2, BATCH, 3, size, size)

        def ours(view: ViewTransform = ours_view, generator: np.random.Generator = generator) -> torch.Tensor:
            views = {}
            for name in ("first", "second"):
                arrays = [np.asarray(image) for image in images]
                crops = [view.sample_crop(*image.size, generator) for image in images]
                pixels = [view.crop_and_resize(array, crop) for array, crop in zip(arrays, crops, strict=True)]
                params = [view.sample_params(generator) for _ in images]
                views[name] = View(torch.stack(pixels), Photometric.stack(params))
            finished = apply_photometric(views, mean, std)
            return torch.stack([view.pixels for view in finished.values()])

        def theirs(transform: transforms.Compose = transform) -> torch.Tensor:
            return torch.stack([torch.stack([transform(image) for image in images]) for _ in range(2)])

        assert ours().shape == theirs().shape == shape
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        seconds = take_turns(repeats, {"ours": ours, "theirs": theirs})
        torch.set_num_threads(threads)
        common = {"pictures": source.name, "threads": 1}
        part = f"views, {size} px"
        rows.append(row(part, "ViewTransform", seconds["ours"], 2 * BATCH, "views", **common))
        ratio = round(seconds["theirs"] / seconds["ours"], 2)
        peer_row = row(part, "torchvision", seconds["theirs"], 2 * BATCH, "views", **common)
        rows.append({**peer_row, "times_ours": ratio})
    return rows
