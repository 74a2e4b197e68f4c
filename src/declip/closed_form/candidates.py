"""Candidate forms, and the choice among them by their ranks of left-out pairs."""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from declip.closed_form.ranks import HeldOutRanks
from declip.closed_form.solve import Form

# With 5,811 emoji CCA finds 20 % and 44 % (R@1, R@10), ridge regression 11 % and 34 %, its best.
FORMS = (
    *(Form("ridge", ridge) for ridge in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)),
    *(Form("cca", ridge) for ridge in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
)
# Where the features are embeddings of a model that has projections
START_FORMS = (
    *(Form("pulled", ridge) for ridge in (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)),
    *(Form("cca", ridge) for ridge in (0.3, 1.0, 3.0)),
)
# Weights of a class, where an own image has 1; the first where pairs are too few to choose
CLASS_WEIGHTS = (1.0, 0.25, 0.0)
# Standard errors that the gain of a candidate must exceed. A start that was trained on pairs is
# changed with more caution: with 1.0 it lost up to 11 points (31 to 124 pairs of builtin:clipart
# and stamps, from a model of icons).
CAUTION = 1.0
START_CAUTION = 2.0
# Gains that differ by less are equal: the usual heads, or else the larger weight of the classes,
# are kept
TIE = 1e-9
CHANCE = 0.5  # percentile

Key = TypeVar("Key")


def best_candidate(tried: Mapping[Key, HeldOutRanks], usual: Key, caution: float) -> Key:
    """The candidate with the largest gain in the mean score over the usual one, with caution.

    From the gain `caution` standard errors are subtracted.

    A dozen images cannot tell the candidates apart: the best of 39 would be one by chance. With 31
    to 124 pairs this chose heads that were up to 7 points better on other pairs (builtin:stamps and
    stamps-photos, mean of R@1 and R@10).
    """
    best = usual
    largest = 0.0
    compared = tried[usual].scores()
    for key, each in tried.items():
        gains = each.scores() - compared  # (n,)
        spread = caution * gains.std()
        gain = float(gains.mean() - spread / len(gains) ** 0.5)
        if gain > largest + TIE:
            best = key
            largest = gain
    return best


def beats(outcome: HeldOutRanks, start: HeldOutRanks, groups: np.ndarray) -> bool:
    """Whether heads rank left-out pairs better than those of the start, and better than chance.

    The gain alone would be above 0 by chance for half of all pairs whose captions mean nothing. An
    interval of the gain that excludes 0 would give up 2 to 3 points with 31 and 62 pairs (mean of
    R@1 and R@10, measured on the sets of `choice.FEW`).
    """
    gains = outcome.percentiles() - start.percentiles()  # (n,)
    return bool(gains.mean() > 0) and outcome.percentile(groups).low > CHANCE
