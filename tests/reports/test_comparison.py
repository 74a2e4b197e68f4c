"""The result of a comparison: its tables, its page and its terminal output."""

import re
from dataclasses import replace

import pytest
from rich.console import Console

from comparison.synthetic import MEASURE, outcome, score, study
from declip.comparison.outcome import Factor, FactorAt
from declip.reports import comparison as report
from declip.reports.page import NONE
from reports.pages import Page

BAD = '<script>alert("1")</script>'


def written(found, folder):
    html = report.write_page(found, folder).read_text(encoding="utf-8")
    return html, Page(html)


def printed(found):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.summary(found))
    return console.export_text()


def test_a_whole_comparison(tmp_path):
    html, page = written(outcome(study(pairs=(1000, 2000))), tmp_path)
    sections = [name for name in page.ids if name in page.texts]
    assert sections == ["factor", "curves", "tables", "compared", "reading"]
    assert (len(page.ids), page.resources) == (len(set(page.ids)), [])
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert "2.00 times fewer pairs" in page.texts["head"]
    assert html.count("<svg") == 1


@pytest.mark.parametrize(
    ("seeds", "value", "shown", "absent"),
    [
        ((0, 1, 2), score, "2.00 times fewer pairs than clip", "noise"),
        ((0,), score, "--seeds", "times fewer"),
        (
            (0, 1, 2),
            lambda t: score(t) + 0.2 * (t.seed - 1) * (t.variant == "declip"),
            "includes 1",
            "times fewer",
        ),
        (
            (0, 1, 2),
            lambda t: t.pairs / 1e4 / (1 + (t.variant == "declip")),
            "2.00 times as many pairs as",
            "fewer",
        ),
    ],
)
def test_a_winner_is_stated_only_beyond_the_noise_of_the_seeds(seeds, value, shown, absent):
    text = " ".join(printed(outcome(study(seeds=seeds), value=value)).split())
    assert (shown in text, absent in text) == (True, False)


NOISY = {"declip": (0.104, 0.129, 0.083), "clip": (0.112, 0.121, 0.138)}


@pytest.mark.parametrize(("spread", "shown"), [(0.02, True), (0.0001, False)])
def test_overlapping_intervals_are_no_difference(spread, shown):
    def value(trial):
        noise = spread * (trial.seed - 1) * (-1 if trial.variant == "clip" else 1)
        return NOISY[trial.variant][(1000, 2000, 4000).index(trial.pairs)] + noise

    text = " ".join(printed(outcome(study(pairs=(1000, 2000, 4000)), value=value)).split())
    assert ("No difference between declip and clip beyond the noise" in text) == shown
    assert ("No score of declip reaches the monotone curve of clip with 4,000" in text) != shown
    assert "2,000 and 4,000" not in text, "12.9 is more than 12.1"


def test_the_terminal_has_intervals_failures_and_warnings():
    failed = outcome(
        study(),
        done=lambda trial: trial.seed == 0,
        failures={"clip_n8000": f"Traceback\nError: {BAD}"},
    )
    for found, parts in (
        (outcome(study()), ("10.0 ± 2.5 (3)", "2.00 to 2.00")),
        (failed, (BAD, "8 of 24 runs")),
    ):
        text = printed(found)
        assert [part for part in parts if part not in text] == []
    # chance 0.5 % of 400 images: a standard error of 0.35 points
    found = outcome(study(), value=lambda trial: 0.012 if trial.pairs == 1000 else 0.1)
    assert "with 1,000 pairs clip is within two standard errors of chance" in printed(found)
    assert "standard errors" not in printed(outcome(study(), value=lambda trial: 0.013))


def test_unfinished_comparisons_say_so(tmp_path):
    nothing = outcome(study(), done=lambda trial: False)
    texts = written(nothing, tmp_path)[1].texts
    assert "0 of 24 runs" in texts["head"]
    assert "Nothing has been measured" in texts["curves"]
    assert printed(nothing)
    half = outcome(study(), done=lambda trial: trial.variant == "clip")
    assert "not both been measured" in printed(half)
    one = outcome(study(("declip",), pairs=(1000,), seeds=(0,)))
    assert "nothing to compare" in written(one, tmp_path)[1].texts["head"]


def test_names_are_escaped_everywhere(tmp_path):
    made = study()
    bad = replace(made.variants[0], name=BAD, recipe=BAD, overrides={BAD: BAD})
    variants = (bad, replace(made.variants[1], name="a|b `c` *d* [e](f) $g$"))
    made = replace(made, variants=variants, datasets=(BAD,))
    html, page = written(outcome(made, value=lambda trial: 0.1), tmp_path)
    assert "<script" not in html
    assert BAD in page.texts["compared"]


def test_scores_have_intervals_and_as_many_decimals_as_their_mean():
    one = outcome(
        study(seeds=(1,)), done=lambda trial: trial.pairs < 8000 or trial.variant == "declip"
    )
    for found, expected in (
        # three seeds a point apart: the standard deviation is a point, the interval 4.303 / sqrt(3) points
        (
            outcome(study()),
            ("10.0 ± 2.5 (3)", "20.0 ± 2.5 (3)", "30.0 ± 2.5 (3)", "40.0 ± 2.5 (3)"),
        ),
        (one, ("10.0 (1)", "20.0 (1)", "30.0 (1)", NONE)),
        (outcome(study(), value=lambda trial: score(trial) / 100), ("0.10 ± 0.02 (3)",)),
    ):
        row = report.scores_table(found.study, MEASURE, found.curves()[MEASURE]).rows[0]
        assert row[: 1 + len(expected)] == ("clip", *expected)


def test_a_factor_is_listed_at_every_size_also_where_it_is_outside():
    at = (
        FactorAt(1000, 0.1, None, "below"),
        FactorAt(2000, 0.2, 800.0),
        FactorAt(4000, 0.3, None, "above"),
    )
    given = {"a": Factor(at, 2.5, 2.0, 3.0), "b": Factor(at, 2.5), "c": None}
    assert report.factors_table(given, study()).rows == (
        ("a", "2.50", "2.00 to 3.00", "exceeded", "2.50", "not reached", NONE),
        ("b", "2.50", NONE, "exceeded", "2.50", "not reached", NONE),
        ("c", NONE, NONE, NONE, NONE, NONE, NONE),
    )


def test_measures_and_costs_are_listed(tmp_path):
    found = outcome(study(), retrieval=True)
    assert report.measures_table(found.facts).rows == (
        (MEASURE, "200 classes", "400", "0.50 %"),
        ("test: R@1", "400 images and 400 captions", "400", "0.25 %"),
    )
    assert report.cost_table(found).rows == (
        ("clip", "100", "5,000", "60", "1.00"),
        ("declip", "100", "5,000", "120", "2.00"),
    )
    first, second = found.study.variants
    longer = replace(first, steps=200)
    uneven = outcome(replace(found.study, variants=(longer, second)))
    assert "same number of samples" in printed(uneven)
    assert "Equal samples" in printed(found)
    timed = (replace(first, steps=200, seconds=0.1), replace(second, seconds=0.2))
    found = outcome(replace(found.study, variants=timed[::-1], budget="compute"))
    assert report.cost_table(found).rows[1] == ("clip", "0.1", "200", "10,000", "60", "1.00")
    html, _ = written(found, tmp_path)
    for text in (printed(found), html):
        assert "seconds per step" in text
        assert "the steps that fit into the time of 100 steps of declip" in text
    row = ("clip", "clip", "train.steps=100, train.batch_size=50")
    assert report.variants_table(study()).rows[0] == row
