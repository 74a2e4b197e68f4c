"""The plan of a comparison and what may change; the data-efficiency factor on curves whose answer is known."""

import json
from dataclasses import asdict, replace
from math import exp, log, sqrt

import numpy as np
import pytest

from comparison.synthetic import outcome, study
from conftest import refuses
from declip.comparison import tuning
from declip.comparison.outcome import EfficiencyCurve, curve_of, factor, pairs_needed
from declip.comparison.study import Study, Trial, Variant, extend_study, read_study
from declip.recipe.checks import read_counts

STUDY = Study(
    variants=(Variant.of("clip", {}), Variant.of("declip", {"train.steps": 100})),
    pairs=(200, 400),
    seeds=(0, 1),
    datasets=("builtin:emoji-test",),
    tasks=("zero-shot",),
)


def _write(study, folder):
    (folder / "study.json").write_text(json.dumps(asdict(study)))


def test_trials_go_seed_by_seed_and_samples_are_those_of_the_recipe():
    trials = STUDY.trials()
    assert len({trial.id for trial in trials}) == len(trials) == 8
    assert Trial("clip, weak views/../x", 4, 2).id == "clip,-weak-views-..-x_n4_s2"
    assert [trial.seed for trial in trials] == [0] * 4 + [1] * 4
    train = STUDY.variants[1].resolve().train
    assert (train.steps, STUDY.variants[1].samples) == (100, 100 * train.batch_size)


def test_the_plan_survives_the_disk_and_a_damaged_one_is_the_users_error(tmp_path):
    _write(STUDY, tmp_path)
    assert read_study(tmp_path) == STUDY
    assert read_study(tmp_path / "nowhere") is None
    (tmp_path / "study.json").write_text('{"variants": 3}')
    refuses("Choose another folder", read_study, tmp_path)
    other_version = {**asdict(STUDY), "shots": [1]}
    (tmp_path / "study.json").write_text(json.dumps(other_version))
    refuses("this version of declip: shots: .*Choose another folder", read_study, tmp_path)


def test_a_later_call_may_add_variants_pairs_and_seeds_and_keeps_what_was_measured(tmp_path):
    slip = Variant.of("slip", {})
    more = replace(STUDY, variants=(*STUDY.variants, slip), pairs=(800,), seeds=(2,))
    timed = tuple(replace(variant, steps=70, seconds=0.1) for variant in STUDY.variants)
    _write(replace(STUDY, variants=timed), tmp_path)
    found = extend_study(more, tmp_path)
    assert [variant.name for variant in found.variants] == ["clip", "declip", "slip"]
    assert (found.pairs, found.seeds) == ((200, 400, 800), (0, 1, 2))
    assert found.variants == (*timed, slip)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"datasets": ("other",)}, "datasets was.*builtin:emoji-test.*now.*other"),
        ({"budget": "compute"}, "budget was samples, now compute"),
        ({"variants": (Variant.of("clip", {"seed": 3}),)}, "clip: seed was 0, now 3"),
        (
            {"variants": (Variant.of("declip", {"train.steps": 50}),)},
            "declip: train.steps was 100, now 50",
        ),
    ],
)
def test_a_later_call_for_something_else_is_refused(change, named, tmp_path):
    _write(STUDY, tmp_path)
    refuses(named, extend_study, replace(STUDY, **change), tmp_path)


def test_numbers_of_pairs():
    assert read_counts("1k,4K") == (1000, 4000)
    assert read_counts("500, 2.5k,500") == (500, 2500)
    assert read_counts("1m") == (1_000_000,)
    for text in ("", "1k,", "many", "-5", "0", "1g"):
        refuses("is not a number of pairs", read_counts, text)


PAIRS = (1000, 2000, 4000, 8000)
LOWER, HIGHER = (0.1, 0.2, 0.3, 0.4), (0.2, 0.3, 0.4, 0.5)  # 0.1 per doubling: HIGHER needs half


def _numbered(pairs, values):
    return EfficiencyCurve(pairs, values, tuple(tuple(range(len(own))) for own in values))


def _curve(values, spread=0.0, pairs=PAIRS):
    return _numbered(pairs, tuple((value - spread, value, value + spread) for value in values))


def test_a_curve_shifted_by_log_pairs_gives_its_shift():
    a, b = _curve(HIGHER), _curve(LOWER)
    found = factor(a, b)
    assert [one.outside for one in found.at] == ["below", "", "", ""]
    assert [one.factor for one in found.at[1:]] == pytest.approx([2, 2, 2])
    assert found.mean == pytest.approx(2)
    assert (found.low, found.high) == pytest.approx((2, 2))
    inverse = factor(b, a)
    last = inverse.at[-1]
    assert (last.needed, last.outside) == (None, "above"), "nothing is extrapolated"
    assert inverse.mean == pytest.approx(0.5)
    assert factor(_numbered((), ()), b).mean is None, "nothing is done yet"
    nothing = factor(_curve([0.6, 0.7, 0.8, 0.9]), b)
    assert (nothing.mean, nothing.low) == (None, None)
    assert {one.outside for one in nothing.at} == {"below"}


def test_between_two_sizes_it_is_linear_in_log_pairs():
    means = np.array(LOWER)
    for value, pairs in ((0.25, 2000 * sqrt(2)), (0.2, 2000), (0.4, 8000), (0.1, 1000)):
        assert pairs_needed(PAIRS, means, value) == (pytest.approx(pairs), "")
    assert pairs_needed(PAIRS, means, 0.09) == (None, "below")
    assert pairs_needed(PAIRS, means, 0.41) == (None, "above")
    # A dip is made monotone: 0.3 and 0.2 pool to 0.25.
    dipping = np.array([0.1, 0.3, 0.2, 0.4])
    assert pairs_needed(PAIRS, dipping, 0.25) == (pytest.approx(2000 * sqrt(2)), "")


def test_a_score_above_the_smoothed_curve_that_was_reached_is_inside():
    means = np.array([0.104, 0.3, 0.29])
    assert pairs_needed((150, 300, 588), means, 0.297) == (pytest.approx(sqrt(300 * 588)), "")
    assert pairs_needed((150, 300, 588), means, 0.301) == (None, "above")
    curves = (_curve(values, 0.02, (150, 300, 588)) for values in (means, (0.1, 0.297, 0.4)))
    assert factor(*curves).low is not None


def test_overlap_is_of_intervals_at_the_same_number_of_pairs():
    # A spread of 0.01 is an interval of ± 0.0248.
    a = _curve([0.2, 0.3], 0.01, (1000, 2000))
    cases = {(0.24, 0.34): True, (0.2, 0.36): False, (0.26, 0.3): False}
    for means, overlapping in cases.items():
        assert factor(a, _curve(means, 0.01, (1000, 2000))).overlapping == overlapping
    assert not factor(a, _numbered((1000,), ((0.2,),))).overlapping, "one seed has no interval"


@pytest.mark.parametrize(
    "means", [[0.2, 0.19, 0.3, 0.4], [0.1, 0.3, 0.2, 0.4], [0.2] * 4, [0.4, 0.3, 0.2, 0.1]]
)
def test_a_recipe_needs_as_many_pairs_as_itself_also_where_more_pairs_were_worse(means):
    curve = _curve(means, 0.01)
    found = factor(curve, curve)
    assert found.mean == pytest.approx(1)
    assert not found.significant


def test_the_interval_is_student_t_of_each_seeds_log_factor():
    # A rises by 1 from 100 to 10,000 pairs, so B's value v at 1,000 pairs has the factor 10 / 100^v: with v = 0.2, 0.5
    # and 0.8 the logs have the mean log(1) and the standard deviation 0.3 log(100).
    a = _numbered((100, 10_000), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    found = factor(a, _numbered((1000,), ((0.2, 0.5, 0.8),)))
    half = 4.30265 / sqrt(3) * 0.3 * log(100)
    assert found.mean == pytest.approx(1)
    assert (found.low, found.high) == pytest.approx((exp(-half), exp(half)), rel=1e-4)


def test_seeds_are_paired_and_those_that_differ_give_no_interval():
    # What both variants have alike in a seed does not widen the interval.
    found = factor(_curve(HIGHER, 0.03), _curve(LOWER, 0.03))
    assert (found.low, found.high) == pytest.approx((2, 2))
    a = curve_of({pairs: dict.fromkeys((0, 1), 0.1 * place) for place, pairs in enumerate(PAIRS)})
    for rows in (
        {1000: {0: 0.05, 1: 0.06}, 2000: {0: 0.15}},
        {1000: {0: 0.05, 2: 0.06}},
        {1000: {0: 0.05}},
    ):
        found = factor(a, curve_of(rows))
        assert (found.mean is None, found.low) == (False, None)


@pytest.mark.parametrize(
    ("sizes", "seeds"), [((1000, 4000), 2), ((1000, 4000), 3), ((500, 1000, 2000, 4000, 8000), 3)]
)
def test_the_interval_holds_the_truth_as_often_as_it_says(sizes, seeds):
    # Two equal variants, a gain of 3 points a doubling, seeds that move each run by 1.5 points, half of it alike for
    # both. The first is the plan of README. 400 comparisons: 95 % have a standard error of 1.1 points.
    generator = np.random.default_rng(0)
    truth = 0.03 * np.log2(np.array(sizes) / sizes[0])[:, None] + 0.1
    held = []
    for _ in range(400):
        shared, *own = 0.015 * sqrt(0.5) * generator.normal(size=(3, len(sizes), seeds))
        curves = [_numbered(sizes, tuple(map(tuple, truth + shared + each))) for each in own]
        found = factor(*curves)
        if found.low is not None and found.high is not None:
            held.append(found.low <= 1 <= found.high)
    assert len(held) > 266
    assert 0.93 < np.mean(held) < 0.985


def test_intervals_of_a_curve_are_student_t_and_sizes_rise():
    # Mean 2, standard deviation 1, n = 3: half width t(0.975, 2) / sqrt(3) = 4.30265 / 1.73205.
    curve = _numbered((10,), ((1.0, 2.0, 3.0),))
    assert curve.half_widths == pytest.approx([2.48414], abs=1e-4)
    assert np.isnan(_numbered((10,), ((1.0,),)).half_widths).all()
    rising = EfficiencyCurve((1, 4), ((0.1,), (0.2,)), ((0,), (0,)))
    assert curve_of({4: {0: 0.2}, 1: {0: 0.1}}) == rising


def test_tuning_takes_the_most_pairs_and_one_seed_and_warns_at_either_edge(monkeypatch, caplog):
    best = {"clip": 0.001, "declip": 0.002, "slip": 0.004}
    asked = []

    def run(plan, out, progress):
        asked.append((plan, out))
        right = {f"{name}-{value}" for name, value in best.items()}
        return outcome(plan, value=lambda trial: 0.2 + 0.3 * (trial.variant in right))

    monkeypatch.setattr(tuning.runner, "run", run)
    plan = study(("clip", "declip", "slip"), budget="compute")
    grid = tuning.Grid.of("train.lr=0.001,0.002,0.004", "validation")
    chosen = tuning.tune_study(plan, grid, "out")
    assert {each.name: each.overrides["train.lr"] for each in chosen.variants} == best
    assert all(each.resolve().train.lr == float(best[each.name]) for each in chosen.variants)
    assert replace(chosen, variants=plan.variants) == plan
    ((trials, out),) = asked
    assert (trials.pairs, trials.seeds, trials.datasets) == ((8000,), (0,), ("validation",))
    assert (trials.budget, len(trials.variants), out) == ("samples", 9, "out-tuning")
    edges = [line for line in caplog.messages if "at the edge of the grid" in line]
    assert [line.partition(":")[0] for line in edges] == ["clip", "slip"]


def test_a_study_keeps_the_file_of_losses_that_a_later_call_brings(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("TERMS = {'first': 1}", encoding="utf-8")
    _write(STUDY, tmp_path)
    with_losses = extend_study(STUDY.with_terms(file), tmp_path)
    assert with_losses.terms == {"first": 1}
    (tmp_path / "study.json").write_text(json.dumps(with_losses.to_dict()), encoding="utf-8")
    kept = extend_study(STUDY, tmp_path)  # a call without them
    assert (kept.terms, kept.terms_file) == ({}, with_losses.terms_file)
    file.write_text("TERMS = {'first': 2}", encoding="utf-8")
    changed = STUDY.with_terms(file)
    refuses(r"losses were own.py \(\w+\), now own.py \(\w+\)", extend_study, changed, tmp_path)
