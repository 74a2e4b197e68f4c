"""Data-efficiency factors, each with its interval and what it is computed from, as JSON.

    python benchmarks/factors.py equal_samples=FOLDER:ARM,FOLDER:ARM equal_compute=FOLDER:ARM,FOLDER:ARM …
    python benchmarks/factors.py chart FILE.webp "NAME=KEY:ARM" …    curves of arms in the JSON of the first form

FOLDER is that of a `declip compare` and ARM one of its recipes: the first needs that many times fewer pairs than the
second. At equal compute the second arm's comparison has as many more steps as the first's steps are slower.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from declip.comparison.outcome import read_outcome
from declip.comparison.statistics import EfficiencyCurve, curve_of, factor
from declip.reports.charts import pairs_chart

JSON = Path(__file__).parent / "results" / "factors.json"
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


def chart(file: Path, lines: Sequence[str], chance: float = 1 / 1285) -> None:
    """Draw arms of the JSON, each given as its name in the legend, the entry and the arm there."""
    entries, curves = json.loads(JSON.read_text()), {}
    for line in lines:
        name, _, place = line.partition("=")
        key, _, arm = place.partition(":")
        values = entries[key]["top1"][arm]
        curves[name] = curve_of({int(n): dict(enumerate(np.array(v) / 100)) for n, v in values.items()})
    sizes = sorted({pairs for one in curves.values() for pairs in one.pairs})
    top = 1.05 * max(max(map(max, one.values)) for one in curves.values())
    drawn = pairs_chart("Zero-shot top-1, held-out designer", "top-1", curves, sizes, chance, top)
    drawn.figure().savefig(file, dpi=200)


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    if sys.argv[1] == "chart":
        chart(Path(sys.argv[2]), sys.argv[3:])
        sys.exit()
    asked = dict(word.split("=", 1) for word in sys.argv[1:])
    print(
        json.dumps({"measure": MEASURE} | {name: described(word.split(",")) for name, word in asked.items()}, indent=1)
    )
