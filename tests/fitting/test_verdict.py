"""What is printed of a fit: whether it is better than its start, and what to do."""

from types import SimpleNamespace

import pytest

from declip.reports.fitted import fitted_lines

PERCENTILE = {"value": 0.75, "low": 0.6, "high": 0.9}
MEASURED = {
    "pairs": 31,
    "captions": 31,
    "classes": 9,
    "method": "ridge",
    "ridge": 1.0,
    "class_weight": 0.0,
    "percentile": PERCENTILE,
    "recall": {},
    "leaking": None,
    "growth": {"pairs": [], "measured": []},
}
VERDICTS = [
    ((0.02, 0.01, 0.03), "is better: +2.0", None),
    (
        (0.02, -0.01, 0.05),
        "Too few pairs to tell whether fine-tuning is better: +2.0 points (95 %: −1.0",
        "39 more",
    ),
    (
        (0.001, -0.03, 0.032),
        "Too few pairs to tell whether fine-tuning is better: +0.10",
        "more than ten times",
    ),
    ((0.001, -0.003, 0.005), "is no better: +0.10", None),
    ((-0.02, -0.05, 0.01), "is no better: −2.0", None),
]


def lines_of(known):
    """What is printed of a fit with some measures."""
    return fitted_lines(SimpleNamespace(cross_validation=known, mixture={}))


def said(known):
    return " ".join(lines_of(known))


@pytest.mark.parametrize(("gain", "verdict", "advice"), VERDICTS)
def test_the_interval_of_the_gain_decides_what_is_said(gain, verdict, advice):
    known = {**MEASURED, "gain": dict(zip(("value", "low", "high"), gain, strict=True))}
    for start in ({"percentile_of_start": PERCENTILE}, {}):
        printed = said({**known, **start})
        assert (verdict in printed) == bool(start)
        assert ("better than chance" in printed) == (not start and gain[1] < 0)
        assert ("declip choose" in printed) == bool(advice)
        assert advice is None or advice in printed


def test_a_start_that_stays_is_said_in_plain_words():
    known = {**MEASURED, "method": "start", "gain": {"value": 0.0, "low": 0.0, "high": 0.0}}
    printed = said(known)
    assert "Nothing was changed" in printed
    assert "chance 50" in printed
    assert "no better" not in printed
    known |= {"known_pairs": 31, "neighbors": [0.5, 0.5], "percentile_of_start": PERCENTILE}
    lines = lines_of(known)
    assert all(lines)
    assert "Nothing was changed" not in lines[0]
    assert "pairs and classes an image and a caption both resemble" in lines[0]
    assert "no better" in " ".join(lines[1:])
