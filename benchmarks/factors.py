"""Data-efficiency factors of a recipe over CLIP at equal samples, at equal compute and at convergence, as JSON.

    python benchmarks/factors.py OURS CLIP EQUAL CONVERGED…

EQUAL is the folder of a `declip compare` at both budgets, CONVERGED those of comparisons with many steps; OURS and CLIP
are names of arms, and each arm may be in a folder of its own.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence

from declip.comparison.outcome import read_outcome
from declip.comparison.statistics import EfficiencyCurve, curve_of, factor

MEASURE = "builtin:emoji-test: zero-shot top-1"


def curve(folders: Sequence[str], arm: str, budget: str) -> EfficiencyCurve:
    """An arm's top-1 against the number of pairs, from all folders that have it."""
    values: dict[int, dict[int, float]] = defaultdict(dict)
    for outcome in map(read_outcome, folders):
        if arm in [variant.name for variant in outcome.study.variants]:
            for pairs in outcome.study.pairs:
                values[pairs] |= outcome.values(arm, budget, pairs, MEASURE)
    return curve_of(values)


def described(folders: Sequence[str], ours: str, clip: str, budget: str) -> dict[str, object]:
    """The factor with its interval, and what it is computed from."""
    a, b = (curve(folders, arm, budget) for arm in (ours, clip))
    found = factor(a, b)
    at = {one.pairs: one.factor or ("more than measured" if one.outside == "below" else "less") for one in found.at}
    percent = {
        arm: {
            pairs: [round(100 * value, 2) for value in values] for pairs, values in zip(c.pairs, c.values, strict=True)
        }
        for arm, c in ((ours, a), (clip, b))
    }
    return {"factor": found.mean, "low": found.low, "high": found.high, "at": at, "top1": percent}


def main(ours: str, clip: str, equal: str, *converged: str) -> None:
    """Print them."""
    found = {
        "equal_samples": described([equal], ours, clip, "samples"),
        "equal_compute": described([equal], ours, clip, "compute"),
        **({"convergence": described(converged, ours, clip, "samples")} if converged else {}),
    }
    print(json.dumps({"ours": ours, "over": clip, "measure": MEASURE, **found}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
