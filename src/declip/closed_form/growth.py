"""The growth curve: the percentile with an eighth, a quarter, half and all of the pairs.

Each part is a nested random choice of whole groups. Its heads rank the same held-out images as
those of all pairs.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from declip.closed_form.choice import Choice
from declip.closed_form.estimates import Estimate, effective_groups
from declip.closed_form.ranks import HeldOutRanks
from declip.closed_form.solve import Form

PARTS = (1 / 8, 1 / 4, 1 / 2, 1.0)
MORE_RIDGE = (1.0, 3.0, 10.0)  # times the ridge of all pairs: fewer pairs need more
FEWEST = 30  # groups of equal size


class Growth(NamedTuple):
    """The percentile with each part of the pairs; empty without a fit, or of too few pairs."""

    pairs: list[int]  # of each of `PARTS`
    measured: list[Estimate]

    def to_dict(self) -> dict[str, Any]:
        """The curve as JSON holds it."""
        measured = [each._asdict() for each in self.measured]
        return {"pairs": self.pairs, "measured": measured}


def growth(choice: Choice) -> Growth:
    """The curve of a choice."""
    validation = choice.validation
    whole = choice.whole
    if validation is None or whole is None or choice.outcome is None:  # the start, or too few
        return Growth([], [])
    count = len(whole.data.groups)
    groups = validation.data.groups
    names, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if effective_groups(sizes) < FEWEST:
        return Growth([], [])
    # --- the share of images before the middle of each group, in random order
    order = np.random.default_rng(validation.data.seed).permutation(len(names))
    shuffled = sizes[order]
    middle = np.empty(len(names))
    images_before = shuffled.cumsum() - shuffled / 2
    middle[order] = images_before / sizes.sum()
    # --- the best of several ridges with each part
    method, ridge = choice.form
    forms = tuple(Form(method, ridge * times) for times in MORE_RIDGE)
    pairs = list[int]()
    measured = list[Estimate]()
    for part in PARTS:
        fitted = torch.from_numpy(middle[members] <= part)
        if part < 1:
            tried = validation.ranks(forms, fitted)
        elif whole is validation:  # the same as was chosen
            tried = [choice.outcome]
        else:
            tried = validation.ranks(forms[:1], fitted)
        best = max(tried, key=_mean_score)
        pairs.append(int(fitted.sum()) * count // len(groups))
        measured.append(best.percentile(groups))
    return Growth(pairs, measured)


def _mean_score(outcome: HeldOutRanks) -> float:
    return float(outcome.scores().mean())
