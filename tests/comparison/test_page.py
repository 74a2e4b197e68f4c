"""The page and the Markdown: what they say, that they stand alone, that names stay names."""

import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from comparison.synthetic import MEASURE, SIZES, outcome, row, score, study, tuned, with_ladder
from declip.comparison.ablation import read_ladder
from declip.comparison.arms import Arm, arms_of
from declip.comparison.outcome import Outcome
from declip.comparison.statistics import Curve, Factor, FactorAt, factor
from declip.comparison.study import Study
from declip.recipe.load import parse_overrides
from declip.reports.comparison import plain, write_page
from declip.reports.comparison_tables import measured
from declip.reports.comparison_wording import (
    command,
    ladder_sentences,
    near_chance,
    plan,
    reading,
    state,
    title,
)
from declip.reports.factor_wording import factor_sentence

VOID = {"meta", "path", "use"}
BAD = '<script>alert("1")</script>'


class _Page(HTMLParser):
    """Checks that tags are closed in order; keeps texts by section, ids, links and resources."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.resources: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.texts: dict[str, str] = {}
        self.section = "head"
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = given["id"] or ""
        self.ids += [given["id"] or ""] if "id" in given else []
        self.resources += [given[name] or "" for name in ("src", "srcset", "data", "action") if name in given]
        self.links += [given[name] or "" for name in ("href", "xlink:href") if name in given]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + data.replace("\N{NO-BREAK SPACE}", " ")


def _written(found: Outcome, folder: Path) -> tuple[str, _Page, str]:
    page, words = write_page(found, folder)
    html = page.read_text(encoding="utf-8")
    return html, _Page(html), words.read_text(encoding="utf-8")


def test_a_whole_comparison(tmp_path: Path) -> None:
    found = outcome(
        tuned(with_ladder(study(pairs=(1000, 2000), budgets=("samples", "compute")), baselines=False)), retrieval=True
    )
    html, page, words = _written(found, tmp_path)
    assert [each for each in page.ids if each in page.texts] == [
        "compared",
        "factor",
        "curves",
        "parts",
        "tables",
        "reading",
    ]
    assert len(page.ids) == len(set(page.ids))
    assert page.resources == []
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert "declip needs 2.00 times fewer pairs than clip at equal samples" in page.texts["head"]
    assert "All 54 runs are done." in page.texts["head"]
    assert "at 2,000 pairs, one of 2 numbers of pairs" in page.texts["factor"]
    assert "What clip reaches with 1,000 pairs declip passes already with its fewest." in page.texts["factor"]
    assert "arXiv 2110.05208" in page.texts["parts"]
    assert "second-hand" in page.texts["parts"]
    assert "Every run (54)" in page.texts["tables"]
    assert "kept what did best on validation by top-5" in page.texts["tables"]
    assert html.count("<svg") == 2 * 2 + 2 * 3
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", words)
    assert len(shown) == 2 + 2
    assert all((tmp_path / name).stat().st_size > 10_000 for name in shown)


def test_the_markdown_says_what_the_page_says(tmp_path: Path) -> None:
    _, page, words = _written(outcome(study(seeds=(0, 1))), tmp_path)
    texts = " ".join(" ".join(page.texts.values()).split())
    unescaped = words.replace("\\", "")
    lines = [line for line in unescaped.splitlines() if line and line[0] not in "|#<!`*-"]
    assert len(lines) > 12
    for line in lines:
        if not line.startswith(("declip compare", "Written by")):
            assert line in texts
    cells = [cell.strip() for line in unescaped.splitlines() if line.startswith("| ") for cell in line.split("|")[1:-1]]
    assert len(cells) > 100
    assert all(cell in texts for cell in cells if not set(cell) <= set("-:"))


def test_a_second_page_replaces_the_first(tmp_path: Path) -> None:
    write_page(outcome(with_ladder(study(pairs=(1000,)), baselines=False)), tmp_path)
    before = set((tmp_path / "figures").iterdir())
    write_page(outcome(study(pairs=(1000,))), tmp_path)
    after = set((tmp_path / "figures").iterdir())
    assert after < before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.html", "results.md"]


def test_one_arm_one_size_one_seed(tmp_path: Path) -> None:
    _, page, _ = _written(outcome(study(("declip",), pairs=(1000,), seeds=(0,))), tmp_path)
    assert "Only declip was trained, so there is nothing to compare it with." in page.texts["factor"]
    assert "1 arm learns from 1,000 distinct pairs, with seed 0: 1 run." in page.texts["compared"]
    assert "With one seed there are no intervals." in page.texts["curves"]


def test_nothing_measured_yet(tmp_path: Path) -> None:
    _, page, words = _written(outcome(tuned(with_ladder(study())), done=lambda cell: False, tuning={}), tmp_path)
    assert "Not finished: 0 of 144 runs are done; 0 of 24 tries of the tuning are done." in page.texts["head"]
    assert page.texts["curves"].strip().endswith("Nothing has been measured yet.")
    assert "not enough of its parts has been measured yet" in page.texts["parts"]
    assert "Not finished" in words


def test_part_of_the_runs_and_failures(tmp_path: Path) -> None:
    found = outcome(
        study(),
        done=lambda cell: cell.seed == 0 and cell.pairs < 8000,
        failures={"clip_n8000_s0_t100": f"Traceback\nUserError: {BAD}"},
    )
    html, page, words = _written(found, tmp_path)
    assert "Not finished: 6 of 24 runs are done; 1 failed" in page.texts["head"]
    assert f"UserError: {BAD}" in page.texts["compared"]
    assert BAD not in html
    assert "Not finished: 6 of 24 runs are done; 1 failed" in words
    assert "no interval, which needs at least two seeds" in page.texts["factor"]


def test_an_arm_without_any_run(tmp_path: Path) -> None:
    _, page, _ = _written(outcome(study(), done=lambda cell: cell.arm == "clip"), tmp_path)
    assert "At equal samples declip and clip have not both been measured yet." in page.texts["head"]
    assert "declip" not in page.texts["curves"]


def test_results_of_a_protocol_that_is_not_known_here(tmp_path: Path) -> None:
    made = study(protocols=("divination",))
    strange = [{"protocol": "divination", "on": "test", "luck": 1.0}]
    rows = {cell.id: {**row(made, cell, 0.1, False), "results": strange} for cell in made.cells()}
    _, page, _ = _written(Outcome(made, rows), tmp_path)
    assert "Nothing has been measured yet." in page.texts["head"]
    assert "All 24 runs are done." in page.texts["head"]


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    made = study()
    arms = (Arm(BAD, BAD, {BAD: BAD}), replace(made.arms[1], name="a|b `c` *d* [e](f) $g$"))
    made = replace(made, arms=arms, reference=arms[1].name, on=(BAD,), machine={BAD: BAD}, seconds={})
    html, page, words = _written(outcome(made, value=lambda cell: 0.1), tmp_path)
    assert "script" not in page.tags
    assert BAD not in html
    assert BAD in page.texts["compared"]
    outside_code = re.sub(r"```.*?```", "", words, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", outside_code)
    assert "a\\|b \\`c\\` \\*d\\* \\[e\\](f) \\$g\\$" in outside_code


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("masked_language", "masked_language"),
        ("_x_", "\\_x\\_"),
        ("a | b < c & d", "a \\| b \\< c \\& d"),
        ("# a\n# b", "\\# a # b"),
        ("1. a", "1\\. a"),
        ("+ a", "\\+ a"),
        ("+a", "+a"),
    ],
)
def test_plain_words_in_markdown(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize(
    ("mean", "low", "high", "said"),
    [
        (2.0, 1.5, 2.5, "a needs 2.00 times fewer pairs than b for the same (factor 2.00: "),
        (0.5, 0.4, 0.6, "a needs 2.00 times as many as b for the same (factor 0.50: "),
        (1.001, 0.9, 1.1, "a needs as many pairs as b for the same (factor 1.00: "),
    ],
)
def test_a_factor_in_words(mean: float, low: float, high: float, said: str) -> None:
    at = (FactorAt(1000, 0.1, 500.0), FactorAt(2000, 0.2, 1000.0), FactorAt(4000, 0.3, None, "above"))
    told = factor_sentence("a", "b", "samples", Factor(at, mean, low, high))
    assert said in told
    assert f"geometric mean over 2 of 3 numbers of pairs; 95 % interval {low:.2f} to {high:.2f})" in told
    assert ("includes 1" in told) == (low <= 1 <= high)
    assert "What b reaches with 4,000 pairs a never reaches." in told
    assert "fewest" not in told


def test_a_factor_of_one_size_names_it() -> None:
    at = (FactorAt(1000, 0.1, None, "below"), FactorAt(2000, 0.2, 1000.0))
    told = factor_sentence("a", "b", "compute", Factor(at, 2.0))
    assert "(factor 2.00: at 2,000 pairs, one of 2 numbers of pairs; no interval" in told
    assert "What b reaches with 1,000 pairs a passes already with its fewest." in told


def test_no_factor_is_made_up_outside_of_what_was_measured() -> None:
    none = factor(Curve((1000, 2000), ((0.5,), (0.6,))), Curve((1000, 2000), ((0.1,), (0.2,))))
    told = factor_sentence("a", "b", "samples", none)
    assert "there is no factor" in told
    assert "What b reaches with 1,000 and 2,000 pairs a passes already with its fewest." in told
    assert not re.search(r"times (fewer|as many)", told)


def test_levels_near_chance_are_warned_of() -> None:
    # chance 0.5 % of 400 images: a standard error of 0.35 points
    found = outcome(study(), value=lambda cell: 0.012 if cell.pairs == 1000 else 0.1)
    told = near_chance(found, "samples", MEASURE, measured(found)[MEASURE])
    assert told == [
        "Careful: at equal samples with 1,000 pairs clip is within two standard errors of chance (0.50 %), so a factor "
        "there tells nothing."
    ]
    found = outcome(study(), value=lambda cell: 0.013)
    assert near_chance(found, "samples", MEASURE, measured(found)[MEASURE]) == []


def test_the_plan_in_numbers() -> None:
    told = " ".join(plan(study(budgets=("samples", "compute"))))
    assert "2 arms learn from 1,000, 2,000, 4,000 and 8,000 distinct pairs, with seeds 0, 1 and 2: 36 runs." in told
    assert "100 steps of 50 pairs, 5,000 samples: each of 1,000 pairs 5 times, each of 8,000 1 times" in told
    assert "from 100 steps (declip) to 200 (clip)" in told


def test_the_ladders_order_is_compared_with_the_published_one() -> None:
    made = with_ladder(study())
    ladder = read_ladder(made)
    assert ladder is not None
    told = " ".join(ladder_sentences(outcome(made), ladder, MEASURE, 8000))
    # log2: 1.5 gives 5.8 points, 1.6 gives 0.9 more, 2 gives 3.2 more
    assert "multi_view +5.8, simsiam with masked_language +0.93 and nearest_neighbor +3.2" in told
    assert "Every rung adds, as published; the largest step is the same as published, multi_view." in told
    other = outcome(made, value=lambda cell: score(cell) - 0.2 * (cell.arm == "ladder +multi_view"))
    told = " ".join(ladder_sentences(other, ladder, MEASURE, 8000))
    assert "Against what was published, multi_view adds nothing" in told
    assert "the largest step is simsiam with masked_language, not multi_view as published" in told


def test_what_is_missed_most_and_the_strongest_baseline() -> None:
    made = with_ladder(study())
    ladder = read_ladder(made)
    assert ladder is not None
    lost = {"without multi_view": 0.1, "without simsiam": 0.2, "clip, strong views": 0.05, "clip, same views": 0.3}
    found = outcome(made, value=lambda cell: 0.5 - lost.get(cell.arm, 0.0 if cell.arm == "declip" else 0.08))
    told = " ".join(ladder_sentences(found, ladder, MEASURE, 8000))
    assert "declip, the whole, reaches 50.0 %; of its terms simsiam is missed most (−20.0 points without it)" in told
    assert "The strongest plain clip has strong views: 45.0 %, −5.0 points against the whole." in told


def test_a_term_is_missed_only_where_the_seeds_agree() -> None:
    made = with_ladder(study())
    ladder = read_ladder(made)
    assert ladder is not None
    change = {"without multi_view": (-0.3, 0.1, 0.1), "without simsiam": (0.05, 0.06, 0.07)}
    found = outcome(made, value=lambda cell: 0.5 + change.get(cell.arm, (0.0, 0.0, 0.0))[cell.seed])
    told = " ".join(ladder_sentences(found, ladder, MEASURE, 8000))
    assert "no term is missed beyond what seeds do; it is better without simsiam (+6.0 points)." in told


def _command(made: Study) -> list[list[str]]:
    return [shlex.split(line) for line in command(made, Path("runs/x")).splitlines()]


def test_the_command_gives_the_same_arms() -> None:
    overrides = {"train.steps": "100", "views.image.color_jitter": "[0.1, 0.2, 0.3, 0.4]"}
    arms = tuple(arms_of(["clip", "declip"], overrides, ladder=True, baselines=True))
    (words,) = _command(study(("clip", "declip"), arms=arms))
    assert words[:2] == ["declip", "compare"]
    end = words.index("--ablation")
    recipes = [word for word in words[2:end] if "=" not in word]
    given = parse_overrides([word for word in words[2:end] if "=" in word])
    assert tuple(arms_of(recipes, given, ladder=True, baselines="--baselines" in words)) == arms
    options = dict(zip(words[end + 2 :: 2], words[end + 3 :: 2], strict=True))
    assert options == {
        "--pairs": ",".join(map(str, SIZES)),
        "--seeds": "3",
        "--out": "runs/x",
        "--dataset": "test",
        "--budget": "samples",
        "--compute-budget-of": "declip",
    }


def test_arms_that_joined_with_other_overrides_have_a_command_of_their_own() -> None:
    made = with_ladder(study(), baselines=False)
    made = replace(made, arms=(*made.arms, Arm("slip", "slip", {"train.steps": "7"})), seconds={})
    first, second = _command(tuned(made))
    assert first[2:4] == ["clip", "declip"]
    assert "--ablation" in first
    assert second[2:4] == ["slip", "train.steps=7"]
    assert "--ablation" not in second
    assert "--baselines" not in first
    assert " ".join(second).endswith(
        "--sweep train.lr=0.001,0.003 --sweep-dataset validation --sweep-pairs 2000 --sweep-steps 100"
    )


def test_the_recipe_taken_apart_comes_last_in_the_command() -> None:
    arms = arms_of(["clip", "declip"], {}, ladder=True)
    made = study(arms=(*arms, Arm("slip", "slip")), reference="declip")
    (words,) = _command(made)
    assert words[2:6] == ["clip", "slip", "declip", "--ablation"]


def test_the_command_shows_no_absolute_path() -> None:
    assert "--out x " in command(study(), Path("/home/somebody/x"))


def test_seeds_that_the_command_cannot_give_are_said() -> None:
    assert _command(study(seeds=(3, 5)))[-1][0] == "#"
    assert len(_command(study())) == 1


def test_a_title_names_few_and_counts_many() -> None:
    assert title(study()) == "clip and declip compared"
    assert title(with_ladder(study())) == "clip and declip compared"
    assert title(study(tuple("abcdefg"))) == "7 recipes compared"


def test_the_state_counts() -> None:
    assert state(outcome(study())) == "All 24 runs are done."
    assert state(outcome(study(("clip",), pairs=(1000,), seeds=(0,)))) == "The one run is done."


def test_how_to_read_has_the_test_sets_noise() -> None:
    found = outcome(study())
    told = dict(reading(found, measured(found)))
    # the best mean is 50 % of 400
    assert "n = 400; a score of 50.0 % has a standard error of 2.5 points" in told["Test set"]
    assert "3 seeds are few" in told["Intervals"]
    assert "median of 24" in told["Equal compute"]


def test_the_far_ends_of_an_interval_of_two_seeds_can_be_read() -> None:
    at = (FactorAt(1000, 0.1, 500.0),)
    told = factor_sentence("a", "b", "samples", Factor(at, 2.0, 0.00123, 160_000.0))
    assert "95 % interval 0.0012 to 1.6e+05)" in told
