"""The plan of a comparison: which runs, under which names, and what may change when it is continued."""

from dataclasses import replace

import pytest

from conftest import refuses
from declip.comparison.study import Study, Variant, extended, read_counts, read_study, write_study

STUDY = Study(
    variants=(Variant.of("clip", {}), Variant.of("declip", {"train.steps": 100})),
    pairs=(200, 400),
    seeds=(0, 1),
    datasets=("builtin:emoji-test",),
    tasks=("zero-shot",),
)


def test_trials_go_seed_by_seed_and_samples_are_those_of_the_recipe():
    trials = STUDY.trials()
    assert len({trial.id for trial in trials}) == len(trials) == 8
    assert [trial.seed for trial in trials] == [0] * 4 + [1] * 4
    train = STUDY.variants[1].resolve().train
    assert (train.steps, STUDY.variants[1].samples) == (100, 100 * train.batch_size)


def test_names_of_folders_are_safe_and_differ():
    variant = replace(STUDY.variants[0], name="clip, weak views/../x")
    study = replace(STUDY, variants=(variant,))
    assert all("/" not in trial.id and " " not in trial.id for trial in study.trials())
    assert len({trial.id for trial in study.trials()}) == 4


def test_the_plan_survives_the_disk_and_a_damaged_one_is_the_users_error(tmp_path):
    write_study(STUDY, tmp_path)
    assert read_study(tmp_path) == STUDY
    assert read_study(tmp_path / "nowhere") is None
    (tmp_path / "study.json").write_text('{"variants": 3}')
    refuses("Choose another folder", read_study, tmp_path)


def test_a_later_call_may_add_variants_pairs_and_seeds_and_keeps_what_was_measured(tmp_path):
    slip = Variant.of("slip", {})
    more = replace(STUDY, variants=(*STUDY.variants, slip), pairs=(800,), seeds=(2,))
    timed = tuple(replace(variant, steps=70, seconds=0.1) for variant in STUDY.variants)
    found = extended(more, replace(STUDY, variants=timed), tmp_path)
    assert [variant.name for variant in found.variants] == ["clip", "declip", "slip"]
    assert (found.pairs, found.seeds) == ((200, 400, 800), (0, 1, 2))
    assert found.variants == (*timed, slip)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"datasets": ("other",)}, "datasets was.*builtin:emoji-test.*now.*other"),
        ({"budget": "compute"}, "budget was samples, now compute"),
        ({"variants": (Variant.of("clip", {"seed": 3}),)}, "clip: seed was 0, now 3"),
        ({"variants": (Variant.of("declip", {"train.steps": 50}),)}, "declip: train.steps was 100, now 50"),
    ],
)
def test_a_later_call_for_something_else_is_refused(change, named, tmp_path):
    refuses(named, extended, replace(STUDY, **change), STUDY, tmp_path)


def test_numbers_of_pairs():
    assert [read_counts(text) for text in ("1k,4K", "500, 2.5k,500", "1m")] == [(1000, 4000), (500, 2500), (1_000_000,)]
    for text in ("", "1k,", "many", "-5", "0", "1g"):
        refuses("is not a number of pairs", read_counts, text)
