"""Left-out captions for the report: some with the images that came first, and those that fit worst."""

from typing import Any

import numpy as np
import torch

from declip.closed_form.ranks import HeldOutRanks
from declip.data.images.thumbnails import Thumbnails
from declip.fitting.fit import Fitted

SHOWN_QUERIES = 9  # captions with the images that came first
SHOWN_WORST = 16  # images, each with its worst caption
# Whether the right image came first for a caption, in the order of the page
OUTCOMES = ("now", "before", "both", "neither")


def compared_queries(fitted: Fitted, image_of: Thumbnails) -> dict[str, Any]:
    """Captions that were left out, with the image that came first by the start, and by the fit.

    "counts" of all captions by `OUTCOMES`, and "shown": some at random, of each outcome about its
    part. Without a start, or where it stays, the images before are the same. Empty if nothing
    was measured.
    """
    choice = fitted.choice
    features = fitted.features
    now = choice.outcome
    if now is None:
        return {}
    before = choice.start or now
    outcomes = _outcomes(before, now)
    counts = np.bincount(outcomes, minlength=len(OUTCOMES)).tolist()
    indices = features.image_indices
    shown = []
    for row in _sample(fitted, outcomes):
        shown.append(
            {
                "caption": features.captions[row],
                "outcome": OUTCOMES[outcomes[row]],
                "own": _image(image_of, int(features.indices[row])),
                "before": _image(image_of, indices[int(before.first[row])]),
                "now": _image(image_of, indices[int(now.first[row])]),
            }
        )
    return {
        "compared": before is not now,
        "counts": dict(zip(OUTCOMES, counts, strict=True)),
        "shown": shown,
    }


def _outcomes(before: HeldOutRanks, now: HeldOutRanks) -> np.ndarray:
    """(m,) index in `OUTCOMES` of each caption."""
    was_right = before.to_image == 0
    is_right = now.to_image == 0
    outcomes = torch.full_like(now.to_image, OUTCOMES.index("neither"))
    outcomes[was_right & is_right] = OUTCOMES.index("both")
    outcomes[was_right & ~is_right] = OUTCOMES.index("before")
    outcomes[is_right & ~was_right] = OUTCOMES.index("now")
    return outcomes.numpy()


def _sample(fitted: Fitted, outcomes: np.ndarray) -> list[int]:
    """Random captions of different images, spread evenly over the order of outcomes."""
    owners = fitted.features.pairs.owners.tolist()
    captions = fitted.features.captions
    images = set[int]()
    texts = set[str]()
    rows = list[int]()
    order = np.random.default_rng(fitted.seed).permutation(len(captions))
    for row in order.tolist():
        if owners[row] not in images and captions[row] not in texts:
            images.add(owners[row])
            texts.add(captions[row])
            rows.append(row)
    rows.sort(key=lambda row: outcomes[row])
    count = min(SHOWN_QUERIES, len(rows))
    chosen = np.linspace(0, len(rows) - 1, count).round().astype(np.int64)
    return [rows[index] for index in chosen.tolist()]


def worst_captions(fitted: Fitted, image_of: Thumbnails) -> list[dict[str, Any]]:
    """The worst caption of each of some images, without those that rank first."""
    worst = dict[int, tuple[str, float]]()
    for index, caption, rank in fitted.ranks():
        if rank > 0 and len(worst) < SHOWN_WORST:
            worst.setdefault(index, (caption, rank))
    shown = []
    for index, (caption, rank) in worst.items():
        key = fitted.source[index].key
        image = _image(image_of, index)
        shown.append({"key": key, "caption": caption, "rank": rank, "image": image})
    return shown


def _image(image_of: Thumbnails, index: int) -> dict[str, str] | None:
    """A thumbnail as JSON holds it; None for an image that can no longer be read."""
    image = image_of(index)
    if image is None:
        return None
    return image._asdict()
