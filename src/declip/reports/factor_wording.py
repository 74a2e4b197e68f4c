"""The data-efficiency factor in sentences, with what can't be said."""

from declip.comparison.statistics import Factor
from declip.io.text import counted, listed


def factor_sentence(arm: str, baseline: str, budget: str, factor: Factor | None) -> str:
    """How many times fewer pairs an arm needs, with what can't be said."""
    start = f"At equal {budget}"
    if factor is None:
        return f"{start} {arm} and {baseline} have not both been measured yet."
    told = [f"{start} {_gain(arm, baseline, factor)}", *_outside(arm, baseline, factor)]
    return " ".join(told)


def _gain(arm: str, baseline: str, factor: Factor) -> str:
    inside = [each.pairs for each in factor.at if each.factor is not None]
    if factor.mean is None:
        return f"nothing that {baseline} reaches lies between what {arm} reaches, so there is no factor."
    if len(inside) > 1:
        detail = f"geometric mean over {len(inside)} of {len(factor.at)} numbers of pairs"
    else:
        detail = f"at {listed(inside)} pairs, one of {counted(len(factor.at), 'number')} of pairs"
    said = f"{arm} needs {ratio(baseline, factor.mean)} for the same (factor {factor.mean:.2f}: {detail}; "
    said += f"{interval(factor)})."
    if factor.low is not None and factor.high is not None and factor.low <= 1 <= factor.high:
        said += " The interval includes 1: the two are not told apart."
    return said


def ratio(baseline: str, factor: float) -> str:
    """A factor as words: so many times fewer pairs, or as many, than the baseline."""
    if f"{factor:.2f}" == "1.00":
        return f"as many pairs as {baseline}"
    return (
        f"{factor:.2f} times fewer pairs than {baseline}"
        if factor > 1
        else f"{1 / factor:.2f} times as many as {baseline}"
    )


def interval(factor: Factor) -> str:
    """The interval of a factor, or why there is none."""
    if factor.low is None or factor.high is None:
        return "no interval, which needs at least two seeds, the same ones at every number of pairs"
    return f"95 % interval {span(factor.low, factor.high)}"


def span(low: float, high: float) -> str:
    """ "1.10 to 1.80"; of few seeds the ends may lie far out, "0.0012 to 1.6e+05"."""
    return " to ".join(f"{end:.2f}" if 0.1 <= end < 100 else f"{end:.2g}" for end in (low, high))


def _outside(arm: str, baseline: str, factor: Factor) -> list[str]:
    """What lies outside what the arm measured."""
    below = [each.pairs for each in factor.at if each.outside == "below"]
    above = [each.pairs for each in factor.at if each.outside == "above"]
    told = []
    if below:
        told.append(f"What {baseline} reaches with {listed(below)} pairs {arm} passes already with its fewest.")
    if above:
        told.append(f"What {baseline} reaches with {listed(above)} pairs {arm} never reaches.")
    return told
