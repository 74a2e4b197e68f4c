"""The two MoCo v2 views of a batch: `ImageViews`, whose colors are done on the batch, against torchvision on each."""

import numpy as np
import torch
from torchvision import transforms

from declip.data.batch import Photometric
from declip.data.images.crops import ImageViews
from declip.recipe.schema import ImageTower
from declip.recipe.schema_pairs import ImageView
from pairs import open_pairs
from timing import row, take_turns

BATCH = 128


def peer(size: int, view: ImageView, kernel: int) -> transforms.Compose:
    """The same views drawn from the same distributions by torchvision, picture by picture.

    `torchvision.transforms` on PIL pictures is the quickest of its ways here: `transforms.v2` on PIL took 1.1 to 1.2
    times as long, and v2 on uint8 tensors 1.1 to 1.8 times.
    """
    tower = ImageTower()
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, view.scale, view.ratio, transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(view.hflip_prob),
            transforms.RandomApply([transforms.ColorJitter(*view.jitter)], view.color_jitter_prob),
            transforms.RandomGrayscale(view.grayscale_prob),
            transforms.RandomApply([transforms.GaussianBlur(kernel, view.blur_sigma)], view.blur_prob),
            transforms.ToTensor(),
            transforms.Normalize(tower.mean, tower.std),
        ]
    )


def measure(repeats: int) -> list[dict[str, object]]:
    """Two views of 128 decoded pictures at 32 and at 224 pixels, on one thread, as a loading process has it."""
    source, view, tower = open_pairs(), ImageView(), ImageTower()
    step = len(source) // BATCH
    pictures = [source[step * number].image for number in range(BATCH)]
    rows = []
    for size in (32, 224):
        views = ImageViews(size, mean=tower.mean, std=tower.std, **view.model_dump())
        transform = peer(size, view, kernel=2 * views.blur_radius + 1)
        generator = np.random.default_rng(0)
        shape = (2, BATCH, 3, size, size)

        def ours(views: ImageViews = views, generator: np.random.Generator = generator) -> torch.Tensor:
            arrays = [np.asarray(picture) for picture in pictures]
            crops = np.stack([np.stack([views.crop(array, generator) for array in arrays]) for _ in range(2)])
            draws = [[views.draw(generator) for _ in arrays] for _ in range(2)]
            return views.finish(torch.from_numpy(crops), Photometric.stack(draws))

        def theirs(transform: transforms.Compose = transform) -> torch.Tensor:
            return torch.stack([torch.stack([transform(picture) for picture in pictures]) for _ in range(2)])

        assert ours().shape == theirs().shape == shape
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        seconds = take_turns(repeats, {"ours": ours, "theirs": theirs})
        torch.set_num_threads(threads)
        common = {"pictures": source.name, "threads": 1}
        part = f"views, {size} px"
        rows.append(row(part, "ImageViews", seconds["ours"], 2 * BATCH, "views", **common))
        ratio = round(seconds["theirs"] / seconds["ours"], 2)
        peer_row = row(part, "torchvision", seconds["theirs"], 2 * BATCH, "views", **common)
        rows.append({**peer_row, "times_ours": ratio})
    return rows
