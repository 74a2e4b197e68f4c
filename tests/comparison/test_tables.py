"""The tables: their numbers on comparisons whose numbers are known."""

import pytest

from comparison.synthetic import AHEAD, MEASURE, outcome, row, study, tuned, with_ladder
from declip.comparison.ablation import baseline_of, difference, main_arms, measured_sizes, read_ladder
from declip.comparison.arms import Arm
from declip.comparison.outcome import Outcome
from declip.comparison.statistics import Factor, FactorAt
from declip.reports.comparison_tables import (
    arms_table,
    cost_table,
    factors_table,
    failures_table,
    ladder_table,
    measured,
    measures_table,
    runs_table,
    scores_table,
    settings,
    tuned_by,
    tuning_table,
    with_interval,
    yaml_value,
)


def test_a_mean_has_its_interval_and_its_seeds() -> None:
    table = scores_table(outcome(study()), MEASURE, "samples")
    assert table.columns == ("arm", "1,000 pairs", "2,000 pairs", "4,000 pairs", "8,000 pairs")
    # three seeds a point apart: the standard deviation is a point, the interval 4.303 / sqrt(3) points
    assert table.rows[0] == ("clip", "10.0 ± 2.5 (3)", "20.0 ± 2.5 (3)", "30.0 ± 2.5 (3)", "40.0 ± 2.5 (3)")
    assert table.rows[1][1] == "20.0 ± 2.5 (3)"


def test_one_seed_has_no_interval_and_a_missing_cell_no_number() -> None:
    found = outcome(study(seeds=(1,)), done=lambda cell: cell.pairs < 8000 or cell.arm == "declip")
    assert scores_table(found, MEASURE, "samples").rows[0] == ("clip", "10.0 (1)", "20.0 (1)", "30.0 (1)", "–")


@pytest.mark.parametrize(
    ("mean", "half", "told"),
    [(0.367, 0.0123, "36.7 ± 1.2 (3)"), (0.00367, 0.00123, "0.37 ± 0.12 (3)"), (0.367, None, "36.7 (3)")],
)
def test_an_interval_has_as_many_decimals_as_its_mean(mean: float, half: float | None, told: str) -> None:
    assert with_interval(mean, half, 3) == told


def test_a_factor_is_told_at_every_size_also_where_it_is_outside() -> None:
    at = (FactorAt(1000, 0.1, None, "below"), FactorAt(2000, 0.2, 800.0), FactorAt(4000, 0.3, None, "above"))
    factors = {
        ("a", "samples"): Factor(at, 2.5, 2.0, 3.0),
        ("a", "compute"): Factor((), None),
        ("b", "samples"): Factor(at, 2.5),
        ("c", "samples"): None,
    }
    table = factors_table(factors, "samples", (1000, 2000, 4000, 8000), "clip", MEASURE)
    assert table.columns[3:] == ("at 1,000", "at 2,000", "at 4,000", "at 8,000")
    assert table.rows == (
        ("a", "2.50", "2.00 to 3.00", "passed", "2.50", "not reached", "–"),
        ("b", "2.50", "–", "passed", "2.50", "not reached", "–"),
        ("c", "–", "–", "–", "–", "–", "–"),
    )


def test_measures_have_n_chance_and_choices() -> None:
    found = outcome(study(), retrieval=True)
    assert measures_table(found).rows == (
        ("test: zero-shot top-1", "200 classes", "400", "0.50 %"),
        ("test: R@1", "400 images and 400 captions", "400", "0.25 %"),
    )
    assert measured(found)[MEASURE].standard_error(0.5) == pytest.approx(0.025)


def test_a_result_of_an_unknown_protocol_is_no_measure() -> None:
    plan = study()
    cell = plan.cells()[0]
    strange = {**row(plan, cell, 0.1, False), "results": [{"protocol": "divination", "on": "test", "luck": 1.0}]}
    found = Outcome(plan, {cell.id: strange})
    assert measured(found) == {}
    assert runs_table(found).columns == ("arm", "pairs", "seed", "steps", "samples", "seconds")


def test_every_run_is_listed() -> None:
    table = runs_table(outcome(study(), retrieval=True))
    assert len(table.rows) == 24
    assert table.folded
    assert table.columns[-2:] == (MEASURE, "test: R@1")
    assert table.rows[0] == ("clip", "1,000", "0", "100", "5,000", "60.0", "9.0 %", "9.0 %")


def test_costs_are_told_against_the_baseline() -> None:
    table = cost_table(study(budgets=("samples", "compute")))
    assert table is not None
    assert table.rows == (
        ("clip", "0.02", "1.00", "100 (5,000)", "200 (10,000)"),
        ("declip", "0.04", "2.00", "100 (5,000)", "100 (5,000)"),
    )


def test_tries_are_told_with_what_was_chosen_and_by_what() -> None:
    found = outcome(tuned(study()))
    table = tuning_table(found)
    assert table is not None
    assert table.rows[:2] == (
        ("clip", "train.lr=0.001", "chosen", "29.0 %"),
        ("clip", "train.lr=0.003", "", "27.0 %"),
    )
    assert tuned_by(found) == "top-5"
    assert table.caption == "Tries on validation: top-5"
    assert tuning_table(outcome(study())) is None


def test_arms_tell_what_is_theirs_alone() -> None:
    plan = with_ladder(study())
    rows = {each[0]: each for each in arms_table(plan).rows}
    assert rows["declip"] == ("declip", "declip", "–")
    assert rows["ladder clip"][1:] == ("declip", "weights={contrastive: 0.1}")
    assert arms_table(tuned(plan)).rows[0][-1] == "train.lr=0.001"


def test_failures_are_told_by_their_last_line() -> None:
    table = failures_table(outcome(study(), failures={"clip_n1000": "Traceback\nRuntimeError: no\n", "x": ""}))
    assert table is not None
    assert table.rows == (("clip_n1000", "RuntimeError: no"), ("x", "no reason was left"))


def test_the_baseline_is_clip_or_the_first() -> None:
    assert baseline_of(study(("declip", "clip"))) == "clip"
    assert baseline_of(study(("slip", "declip"))) == "slip"


def test_a_ladder_ends_in_the_whole_and_its_groups_are_complete() -> None:
    plan = with_ladder(study())
    ladder = read_ladder(plan)
    assert ladder is not None
    assert main_arms(plan) == ["clip", "declip"]
    assert ladder.whole == "declip"
    assert [part.label for part in ladder.rungs] == [
        "clip",
        "+multi_view",
        "+simsiam +masked_language",
        "+nearest_neighbor = declip",
    ]
    assert [part.arm for part in ladder.rungs][-1] == "declip"
    left_out = {part.label: part.arm for part in ladder.left_out}
    assert left_out["nearest_neighbor"] == "ladder +simsiam +masked_language"  # trained once, told twice
    assert list(left_out) == ["multi_view", "simsiam", "masked_language", "nearest_neighbor"]
    assert [part.label for part in ladder.baselines] == ["weak views", "same views", "strong views", "two views"]
    assert ladder.published == (20.6, 24.8, 25.4, 27.2)


def test_the_published_ladder_is_for_declip_only() -> None:
    ladder = read_ladder(with_ladder(study(("clip", "defilip"))))
    assert ladder is not None
    assert ladder.published == ()
    assert read_ladder(study()) is None


def test_the_whole_is_the_recipe_taken_apart_not_the_reference() -> None:
    ladder = read_ladder(with_ladder(study(reference="clip")))
    assert ladder is not None
    assert ladder.whole == "declip"


def test_a_difference_is_paired_over_seeds() -> None:
    noise = {0: 0.0, 1: 0.3, 2: 0.1}  # of the seed: large, and the same for both
    gain = {0: 0.01, 1: 0.02, 2: 0.03}

    found = outcome(study(), value=lambda cell: noise[cell.seed] + gain[cell.seed] * (cell.arm == "declip"))
    paired = difference(found, "declip", "clip", "samples", 1000, MEASURE)
    assert paired is not None
    assert paired.mean == pytest.approx(0.02)
    assert (paired.low, paired.high) == (
        pytest.approx(0.02 - 0.02484, abs=1e-5),
        pytest.approx(0.02 + 0.02484, abs=1e-5),
    )
    assert paired.n == 3


def test_a_difference_counts_the_seeds_that_both_have() -> None:
    found = outcome(study(), done=lambda cell: (cell.arm, cell.seed) in {("clip", 0), ("clip", 1), ("declip", 1)})
    paired = difference(found, "declip", "clip", "samples", 1000, MEASURE)
    assert paired is not None
    assert (paired.mean, paired.low, paired.n) == (pytest.approx(0.1), None, 1)
    other = difference(found, "clip", "declip", "samples", 1000, MEASURE)
    assert other is not None
    assert (other.mean, other.n) == (pytest.approx(-0.1), 1)
    assert difference(found, "declip", "clip", "samples", 3000, MEASURE) is None


def test_a_ladder_is_told_where_all_of_it_was_measured() -> None:
    plan = with_ladder(study())
    ladder = read_ladder(plan)
    assert ladder is not None
    assert measured_sizes(outcome(plan), ladder, MEASURE) == [8000, 4000, 2000, 1000]
    partly = outcome(plan, done=lambda cell: cell.pairs < 4000 or cell.arm != "without simsiam")
    assert measured_sizes(partly, ladder, MEASURE) == [2000, 1000]
    hardly = outcome(plan, done=lambda cell: cell.pairs == 4000 and cell.arm in {"declip", "ladder clip"})
    assert measured_sizes(hardly, ladder, MEASURE) == [4000]
    assert measured_sizes(outcome(plan, done=lambda cell: cell.arm == "declip"), ladder, MEASURE) == []


def test_the_ladders_table_has_differences_and_what_was_published() -> None:
    plan = with_ladder(study())
    ladder = read_ladder(plan)
    assert ladder is not None
    rows = ladder_table(outcome(plan), ladder, MEASURE, 8000).rows
    assert AHEAD["ladder clip"] == 1
    assert rows[0] == ("terms added", "clip", "40.0 %", "−10.0 (−10.0 to −10.0)", "20.6 %")
    assert rows[3] == ("terms added", "+nearest_neighbor = declip", "50.0 %", "–", "27.2 %")
    assert [each[-1] for each in rows[4:]] == ["–"] * 10


@pytest.mark.parametrize(
    ("value", "word"),
    [("0.1", "0.1"), (0.1, "0.1"), (1e-5, "1.0e-05"), (True, "true"), (None, "null"), ({"a": [1, 2]}, "{a: [1, 2]}")],
)
def test_values_are_written_as_the_command_reads_them(value: object, word: str) -> None:
    assert yaml_value(value) == word


def test_settings_are_told_in_a_line() -> None:
    assert settings(Arm("a", "a", {"x": "1", "y.z": 0.5}).overrides) == "x=1, y.z=0.5"
