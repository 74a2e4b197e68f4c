"""How many more pairs would help: the percentile with parts of the pairs, continued to 2 to 8 times as many.

Each part is a nested random choice of whole groups. Its heads rank the same held-out images as those of all pairs. The
logit of the percentile is taken to be linear in the log of the pairs.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import expit, logit

from declip.closed_form.heads import Choice, Estimate, HeldOutRanks, effective_groups, group_sums, jackknife
from declip.closed_form.solve import START, Form

PARTS = (1 / 8, 1 / 4, 1 / 2, 1.0)
FITTED = 3  # largest parts that the line is fitted to
TIMES = (2, 4, 8)
MORE_RIDGE = (1.0, 3.0, 10.0)  # times the ridge of all pairs: fewer pairs need more
FEWEST = 30  # groups of equal size
BEND = 0.1  # standard deviation of the logit for each doubling, by which a curve leaves the straight line
FULL = 0.999  # percentile that cannot grow much


class Growth(NamedTuple):
    """The percentile with each part of the pairs, and with more of them."""

    pairs: list[int]  # of each value that was measured, then of each that is expected
    measured: list[Estimate]  # for each of `PARTS`; empty if there is no curve
    expected: list[Estimate]  # for each of `TIMES`; empty if the curve does not say
    reason: str = ""  # why it does not

    def to_dict(self) -> dict[str, Any]:
        """The curve as JSON holds it."""
        measured, expected = ([each._asdict() for each in part] for part in (self.measured, self.expected))
        return {"pairs": self.pairs, "measured": measured, "expected": expected, "reason": self.reason}


def growth(choice: Choice, count: int, seed: int = 0) -> Growth:
    """The curve of a choice that was made for `count` images."""
    validation = choice.validation
    if choice.form == START:
        return Growth([], [], [], "the projections of the start do not depend on the pairs")
    few = Growth([], [], [], "there are too few different pairs")
    if validation is None:
        return few
    groups = validation.groups
    names, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if effective_groups(sizes) < FEWEST:
        return few
    order = np.random.default_rng(seed).permutation(len(names))
    middle = np.empty(len(names))
    middle[order] = (sizes[order].cumsum() - sizes[order] / 2) / sizes.sum()  # the share of images before its middle
    method, ridge = choice.form
    forms = tuple(Form(method, ridge * times) for times in MORE_RIDGE)
    images, outcomes = [], []
    for part in PARTS:
        fitted = torch.from_numpy(middle[members] <= part)
        if part == 1 and len(groups) == count and choice.outcome is not None:  # the same as was chosen
            tried = [choice.outcome]
        else:
            tried = validation.ranks(forms if part < 1 else forms[:1], fitted)
        outcomes.append(max(tried, key=lambda outcome: float(outcome.scores().mean())))
        images.append(int(fitted.sum()) * count // len(groups))
    return _continued(images, outcomes, groups)


def _continued(images: list[int], outcomes: list[HeldOutRanks], groups: np.ndarray) -> Growth:
    pairs = [*images, *(times * images[-1] for times in TIMES)]
    measured = [outcome.percentile(groups) for outcome in outcomes]
    if measured[-1].value > FULL:
        return Growth(pairs, measured, [], "it cannot rise much further")
    # --- logits of the percentile (parts, g) without each group
    sums = np.stack([group_sums(outcome.percentiles().numpy(), groups)[0] for outcome in outcomes])  # (parts, g)
    counts = np.unique(groups, return_counts=True)[1]  # (g,)
    least = 0.5 / counts.sum()
    without = (sums.sum(axis=1, keepdims=True) - sums) / (counts.sum() - counts)
    logits = logit(without.clip(least, 1 - least))
    # --- the slope for each doubling by least squares
    # Of the largest parts: with a few pairs the heads are nearly those of the classes, and the curve is flat.
    doublings, logits = np.log2(np.array(images) / images[-1])[-FITTED:], logits[-FITTED:]
    centered = doublings - doublings.mean()
    slopes = centered @ logits / (centered**2).sum()  # (g,)
    if slopes.mean() < jackknife(slopes, counts) / 2:
        return Growth(pairs, measured, [], "the curve is too flat, or not monotone")
    expected = []
    for times in TIMES:
        ahead = logits.mean(axis=0) + slopes * (np.log2(times) - doublings.mean())  # (g,)
        half = np.hypot(jackknife(ahead, counts), 1.96 * BEND * np.log2(times))
        expected.append(Estimate(*(float(expit(ahead.mean() + side * half)) for side in (0, -1, 1))))
    return Growth(pairs, measured, expected)
