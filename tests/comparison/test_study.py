"""The plan of a comparison: which runs, under which names, and what may change when it goes on."""

from dataclasses import replace
from pathlib import Path

import pytest

from declip.comparison.arms import Arm, arms_of, baselines_of, ladder_of
from declip.comparison.study import Study, Tuning, extended, read_counts, read_study, write_study
from declip.errors import UserError

STUDY = Study(
    arms=(Arm("clip", "clip").pinned(), Arm("declip", "declip", {"train.steps": 100}).pinned()),
    pairs=(200, 400),
    seeds=(0, 1),
    steps=100,
    batch=128,
    on=("builtin:emoji-test",),
    protocols=("zero-shot",),
    budgets=("samples", "compute"),
    reference="declip",
    seconds={"clip": 0.1, "declip": 0.25},
)


def test_equal_compute_gives_the_cheaper_arm_more_steps() -> None:
    assert STUDY.steps_of("clip", "samples") == 100
    assert STUDY.steps_of("clip", "compute") == 250
    assert STUDY.steps_of("declip", "compute") == 100


def test_a_run_that_serves_both_budgets_is_made_once() -> None:
    cells = STUDY.cells()
    # 2 arms x 2 sizes x 2 seeds at equal samples, and clip once more for each at equal compute.
    assert len(cells) == 12
    assert len({cell.id for cell in cells}) == 12
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6


def test_names_of_folders_are_safe_and_differ() -> None:
    arm = Arm("clip, weak views/../x", "clip")
    study = replace(STUDY, arms=(arm,), reference=arm.name, seconds={arm.name: 1.0})
    assert all("/" not in cell.id and " " not in cell.id for cell in study.cells())
    plan = Tuning({"train.lr": (0.1, 0.2), "seedless": (1, 2)}, "builtin:emoji-validation", 200, 50, 1000)
    tries = replace(STUDY, tuning=plan).tuning_cells()
    assert len({cell.id for cell in tries}) == 8
    assert {tuple(cell.overrides.items()) for cell in tries if cell.arm == "clip"} == {
        (("train.lr", a), ("seedless", b)) for a in (0.1, 0.2) for b in (1, 2)
    }


def test_the_plan_survives_the_disk(tmp_path: Path) -> None:
    study = replace(
        STUDY,
        tuning=Tuning({"train.lr": (0.1, 0.2)}, "v", 200, 50, 1000),
        chosen={"clip": {"train.lr": 0.1}},
        machine={"cores": "2"},
    )
    write_study(study, tmp_path)
    assert read_study(tmp_path) == study
    assert read_study(tmp_path / "nowhere") is None


def test_a_damaged_plan_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"arms": 3}')
    with pytest.raises(UserError, match="Choose another folder"):
        read_study(tmp_path)


def test_going_on_may_add_arms_pairs_and_seeds_and_keeps_what_was_measured(tmp_path: Path) -> None:
    slip = Arm("slip", "slip")
    more = replace(STUDY, arms=(*STUDY.arms, slip), pairs=(800,), seeds=(2,), seconds={})
    found = extended(more, replace(STUDY, budgets=("samples",)), tmp_path)
    assert found.budgets == ("samples", "compute")
    assert [arm.name for arm in found.arms] == ["clip", "declip", "slip"]
    assert (found.pairs, found.seeds, found.seconds) == ((200, 400, 800), (0, 1, 2), STUDY.seconds)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 50}, "steps was 100, now 50"),
        ({"on": ("other",)}, "on was builtin:emoji-test, now other"),
        ({"arms": (Arm("clip", "clip", {"seed": 3}).pinned(),)}, "arm clip: seed was 0, now 3"),
        ({"tuning": Tuning({"a": (1,)}, "v", 1, 1, 1)}, "tuning differs"),
    ],
)
def test_going_on_as_something_else_is_refused(change: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        extended(replace(STUDY, **change), STUDY, tmp_path)


@pytest.mark.parametrize(
    ("text", "numbers"), [("1k,4K", (1000, 4000)), ("500, 2.5k,500", (500, 2500)), ("1m", (1_000_000,))]
)
def test_numbers_of_pairs(text: str, numbers: tuple[int, ...]) -> None:
    assert read_counts(text) == numbers


@pytest.mark.parametrize("text", ["", "1k,", "many", "-5", "0", "1g"])
def test_what_is_no_number_of_pairs(text: str) -> None:
    with pytest.raises(UserError, match="is not a number of pairs"):
        read_counts(text)


def test_the_ladder_is_the_papers_and_then_each_term_left_out() -> None:
    ladder = {arm.name: arm.overrides["weights"] for arm in ladder_of(Arm("declip", "declip"))}
    assert ladder == {
        "ladder clip": {"contrastive": 0.1},
        "ladder +multi_view": {"contrastive": 0.1, "multi_view": 0.3},
        "ladder +simsiam +masked_language": {
            "contrastive": 0.1, "multi_view": 0.3, "simsiam": 0.2, "masked_language": 0.2,
        },
        "without multi_view": {
            "contrastive": 0.1, "simsiam": 0.2, "masked_language": 0.2, "nearest_neighbor": 0.2,
        },
        "without simsiam": {
            "contrastive": 0.1, "multi_view": 0.3, "masked_language": 0.2, "nearest_neighbor": 0.2,
        },
        "without masked_language": {
            "contrastive": 0.1, "multi_view": 0.3, "simsiam": 0.2, "nearest_neighbor": 0.2,
        },
    }  # fmt: skip


def test_without_the_neighbor_is_the_rung_below_and_not_run_twice() -> None:
    names = [arm.name for arm in ladder_of(Arm("declip", "declip"))]
    assert "without nearest_neighbor" not in names


def test_baselines_are_clip_on_the_same_towers_with_other_views() -> None:
    arms = {arm.name: arm.resolve() for arm in baselines_of(Arm("declip", "declip"))}
    same = arms["clip, same views"]
    declip = Arm("declip", "declip").resolve()
    assert same.weights.active() == ("contrastive",)
    assert (same.image, same.views.image) == (declip.image, declip.views.image)
    assert arms["clip, weak views"].views.image.color_jitter_prob == 0
    assert arms["clip, strong views"].views.image.scale == (0.2, 1.0)
    doubled = arms["clip, two views"]
    assert doubled.weights.active() == ("contrastive", "multi_view")
    assert doubled.views.text.second_view == "same"


def test_a_recipe_without_declips_terms_has_no_ladder() -> None:
    with pytest.raises(UserError, match="no ladder to climb"):
        ladder_of(Arm("clip", "clip"))


def test_ladders_and_baselines_are_of_the_last_recipe() -> None:
    arms = arms_of(["clip", "declip"], {"train.steps": 7}, ladder=True, baselines=True)
    assert [arm.name for arm in arms][:3] == ["clip", "declip", "ladder clip"]
    assert {arm.recipe for arm in arms[2:]} == {"declip"}
    assert all(arm.resolve().train.steps == 7 for arm in arms)


def test_the_same_recipe_twice_is_refused() -> None:
    with pytest.raises(UserError, match="Compared twice: clip"):
        arms_of(["clip", "clip"], {})


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(UserError, match="No recipe was given"):
        arms_of([], {})
