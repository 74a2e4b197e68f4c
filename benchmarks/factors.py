"""Data-efficiency factors, each with its interval and what it is computed from, as JSON.

    python benchmarks/factors.py equal_samples=FOLDER:ARM,FOLDER:ARM equal_compute=FOLDER:ARM,FOLDER:ARM …

FOLDER is that of a `declip compare` and ARM one of its recipes: the first needs that many times fewer pairs than the
second. At equal compute the second arm's comparison has as many more steps as the first's steps are slower.
"""

import json
import sys
from collections.abc import Sequence

from declip.comparison.outcome import read_outcome
from declip.comparison.statistics import EfficiencyCurve, curve_of, factor

MEASURE = "builtin:emoji-test: zero-shot top-1"


def curve(place: str) -> EfficiencyCurve:
    """An arm's top-1 against the number of pairs."""
    folder, arm = place.rsplit(":", 1)
    outcome = read_outcome(folder)
    return curve_of({pairs: outcome.values(arm, "samples", pairs, MEASURE) for pairs in outcome.study.pairs})


def described(places: Sequence[str]) -> dict[str, object]:
    """The factor with its interval, and what it is computed from."""
    curves = [curve(place) for place in places]
    found = factor(*curves)
    at = {one.pairs: one.factor or ("more than measured" if one.outside == "below" else "less") for one in found.at}
    top1 = {
        place.rpartition(":")[2]: {
            pairs: [round(100 * value, 2) for value in values] for pairs, values in zip(c.pairs, c.values, strict=True)
        }
        for place, c in zip(places, curves, strict=True)
    }
    return {"factor": found.mean, "low": found.low, "high": found.high, "at": at, "top1": top1}


if __name__ == "__main__":
    asked = dict(word.split("=", 1) for word in sys.argv[1:])
    print(
        json.dumps({"measure": MEASURE} | {name: described(word.split(",")) for name, word in asked.items()}, indent=1)
    )
