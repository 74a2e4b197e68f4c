"""How many more pairs would help: cross-validated recall over parts of the pairs, continued to 2 to 8 times as many.

Each part is a nested random choice of whole groups. Its heads find the same held-out images as those of all pairs, so
the number of candidates does not change. The logit of the recall is taken to be linear in the log of the pairs.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import expit, logit

from declip.models.closed_form import START, Form
from declip.training.heads import Choice, HeldOutRanks, Recall, effective_groups, jackknife

PARTS = (1 / 8, 1 / 4, 1 / 2, 1.0)
TIMES = (2, 4, 8)
MORE_RIDGE = (1.0, 3.0, 10.0)  # times the ridge of all pairs: fewer pairs need more
FEWEST = 30  # groups of equal size
BEND = 0.05  # standard deviation of the logit for each doubling, by which a curve leaves the straight line
FULL = 0.98  # recall that cannot grow much


class Growth(NamedTuple):
    """Recall at k with each part of the pairs, and with more of them."""

    measured: list[Recall]  # for each of `PARTS`
    expected: list[Recall]  # for each of `TIMES`; empty if the curve does not say
    reason: str = ""  # why it does not

    def to_dict(self) -> dict[str, Any]:
        """The curve as JSON holds it."""
        measured, expected = ([recall._asdict() for recall in part] for part in (self.measured, self.expected))
        return {"measured": measured, "expected": expected, "reason": self.reason}


def growth(choice: Choice, count: int, seed: int = 0) -> tuple[list[int], dict[int, Growth]]:
    """Numbers of images in the parts, and the curves of R@1 and R@10, for a choice made for `count` images.

    Both are empty if there are too few different pairs.
    """
    validation = choice.validation
    if validation is None:
        return [], {}
    groups = validation.groups
    names, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if effective_groups(sizes) < FEWEST:
        return [], {}
    order = np.random.default_rng(seed).permutation(len(names))
    place = np.empty(len(names))
    place[order] = (sizes[order].cumsum() - sizes[order] / 2) / sizes.sum()  # the share of images before its middle
    method, ridge = choice.form
    forms = (START,) if choice.form == START else tuple(Form(method, ridge * times) for times in MORE_RIDGE)
    images, outcomes = [], []
    for part in PARTS:
        fitted = torch.from_numpy(place[members] <= part)
        if part == 1 and len(groups) == count and choice.outcome is not None:  # the same as was chosen
            tried = [choice.outcome]
        else:
            tried = validation.ranks(forms if part < 1 else forms[:1], fitted)
        outcomes.append(max(tried, key=lambda outcome: float(outcome.scores().mean())))
        images.append(int(fitted.sum()) * count // len(groups))
    return images, {k: _continued(k, images, outcomes, groups) for k in (1, 10)}


def _continued(k: int, images: list[int], outcomes: list[HeldOutRanks], groups: np.ndarray) -> Growth:
    measured = [outcome.recall(k, groups) for outcome in outcomes]
    curves, counts = zip(*(outcome.by_group(k, groups) for outcome in outcomes), strict=True)
    found, count = np.stack(curves), counts[0]  # (parts, g, 2) hits, (g, 2) candidates for one
    if measured[-1].value > FULL:
        return Growth(measured, [], "it cannot rise much further")
    # --- logits of the recall (parts, g) without each group
    least = 0.5 / count.sum()
    without = ((found.sum(axis=1, keepdims=True) - found) / (count.sum(axis=0) - count)).mean(axis=2)
    logits = logit(without.clip(least, 1 - least))
    # --- the slope for each doubling by least squares
    doublings = np.log2(np.array(images) / images[-1])
    centered = doublings - doublings.mean()
    slopes = centered @ logits / (centered**2).sum()  # (g,)
    if slopes.mean() < jackknife(slopes, count) / 2:
        return Growth(measured, [], "the curve is too flat, or not monotone")
    expected = []
    for times in TIMES:
        ahead = logits.mean(axis=0) + slopes * (np.log2(times) - doublings.mean())  # (g,)
        half = np.hypot(jackknife(ahead, count), 1.96 * BEND * np.log2(times))
        expected.append(Recall(*(float(expit(ahead.mean() + side * half)) for side in (0, -1, 1))))
    return Growth(measured, expected)
