"""Pointing: whether the place of an image that is most similar to a text is in the box of the object it names."""

from typing import Any

import torch
from torch import Tensor

from declip.data.pair import Box, BrokenPair, SkipCounter
from declip.errors import UserError
from declip.evaluation.datasets import Dataset
from declip.evaluation.encode import eval_mode
from declip.evaluation.results import PointingResult
from declip.io.pool import pairs_bar

LARGEST = 384  # pixels of the longer side of a map: larger ones cost memory, and models see less


def check_pointing(dataset: Dataset) -> None:
    """Refuse a dataset without boxes."""
    if not dataset.split("test").boxed:
        raise UserError(
            f"'{dataset.name}' has no boxes. The task 'pointing' needs a table with a row for each object and the "
            "columns image, caption, left, top, right and bottom (pixels), or builtin:scenes-test."
        )


def measure_pointing(model: Any, dataset: Dataset, progress: bool = False) -> PointingResult:
    """Compare the similarity map of each object's text with the object's boxes (pointing game, arXiv 1608.00507).

    Equals the plain loop over images i and texts t, where m = similarity_map(i, t) and inside = the pixels of t's boxes
        pointing = mean of inside[argmax m]
        IoU = mean of |inside & top| / |inside | top|, where top = the |inside| largest pixels of m
    One image is encoded at a time. Maps have the size of the image, or `LARGEST` pixels at most.
    """
    source, skipped, rows, images = dataset.split("test"), SkipCounter(), list[tuple[bool, float, float]](), 0
    with eval_mode(model), pairs_bar(progress) as bar:
        for index in bar.track(range(len(source)), description=f"Objects of {dataset.name}"):
            try:
                image, boxes = source.image(index), dict[str, list[Box]]()
                for text, box in source.boxes(index):
                    boxes.setdefault(text, []).append(box)
                scale = min(1.0, LARGEST / max(image.size))
                small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
                masks = [_inside(each, scale, small.width, small.height, source.key(index)) for each in boxes.values()]
            except BrokenPair as broken:
                skipped.add(broken)
                continue
            maps = model.similarity_map(small, list(boxes))
            rows += [_compare(found, inside) for found, inside in zip(maps, masks, strict=True)]
            images += 1
    if not rows:
        raise UserError(
            f"Cannot evaluate on '{dataset.name}': no image with a box could be read. {skipped.explanation()}"
        )
    hits, overlaps, areas = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    return PointingResult(
        dataset=dataset.name,
        images=images,
        n=len(rows),
        pointing=float(hits.mean()),
        chance=float(areas.mean()),
        iou=float(overlaps.mean()),
        iou_chance=float((areas / (2 - areas)).mean()),  # of random pixels, as many as the boxes have
        skipped=skipped.counts,
    )


def _inside(boxes: list[Box], scale: float, width: int, height: int, key: str) -> Tensor:
    """The pixels of an object's boxes, (H, W) bool; raises `BrokenPair` for a box without pixels in the image."""
    inside = torch.zeros(height, width, dtype=torch.bool)
    for box in boxes:
        left, top, right, bottom = (max(0, round(side * scale)) for side in box)
        if left >= min(right, width) or top >= min(bottom, height):
            raise BrokenPair("empty box", key, f"{box} has no pixel in the image")
        inside[top:bottom, left:right] = True
    return inside


def _compare(found: Tensor, inside: Tensor) -> tuple[bool, float, float]:
    """Compare a map with an object's pixels, both (H, W): pointing, overlap, and the share of the image."""
    top = torch.zeros_like(inside)
    top.view(-1)[found.flatten().topk(int(inside.sum())).indices] = True
    overlap = float((top & inside).sum() / (top | inside).sum())
    return bool(inside.view(-1)[found.argmax()]), overlap, float(inside.float().mean())
