"""What a comparison found, in sentences; every number is computed from the runs."""

import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from scipy import stats

from declip.comparison.ablation import BASELINE, Ladder, baseline_of, difference, main_arms, read_ladder, seed_values
from declip.comparison.cost import ROUNDS, TIMED
from declip.comparison.outcome import Outcome
from declip.comparison.statistics import Factor
from declip.comparison.study import BUDGETS, Study
from declip.comparison.trial import CELLS
from declip.comparison.worker import FAILURE
from declip.io.text import counted, duration, listed, percent
from declip.reports.comparison_tables import Measured, settings, signed, yaml_value
from declip.reports.factor_wording import factor_sentence, interval, ratio


def title(study: Study) -> str:
    """The names of what is compared, as far as they are few."""
    names = main_arms(study)
    return f"{listed(names)} compared" if len(names) <= 6 else f"{len(names)} recipes compared"


def state(outcome: Outcome) -> str:
    """How much of the comparison is done."""
    planned, done, failed = len(outcome.study.cells()), len(outcome.rows), len(outcome.failures)
    tries = len(outcome.study.tuning_cells())
    if done == planned:
        return f"All {counted(planned, 'run')} are done." if planned > 1 else "The one run is done."
    words = [f"Not finished: {done:,} of {counted(planned, 'run')} are done"]
    if failed:
        words.append(f"{failed:,} failed (their reasons in full: {CELLS}/RUN/{FAILURE})")
    if len(outcome.tuning) < tries:
        words.append(f"{len(outcome.tuning):,} of {tries:,} tries of the tuning are done")
    return f"{'; '.join(words)}. What follows is about what there is; the same command goes on."


def plan(study: Study) -> list[str]:
    """What was trained."""
    fewest, most = study.pairs[0], study.pairs[-1]
    samples = study.steps * study.batch
    sizes = f"{listed(study.pairs)} distinct pairs"
    seeds = f"seed{'' if len(study.seeds) == 1 else 's'} {listed(study.seeds)}"
    arms = counted(len(study.arms), "arm")
    told = [
        f"{arms[0].upper()}{arms[1:]} {'learns' if len(study.arms) == 1 else 'learn'} from {sizes}, with {seeds}: "
        f"{counted(len(study.cells()), 'run')}. The seed chooses the pairs; a larger number keeps all that a smaller "
        "one chose."
    ]
    if "samples" in study.budgets:
        often = f"each of {fewest:,} pairs {samples / fewest:,.0f} times"
        often += f", each of {most:,} {samples / most:,.0f} times" if most != fewest else ""
        told.append(
            f"At equal samples every arm takes {study.steps:,} steps of {study.batch:,} pairs, {samples:,} samples: "
            f"{often}."
        )
    if "compute" in study.budgets:
        steps = {arm.name: study.steps_of(arm.name, "compute") for arm in study.arms}
        fast, slow = max(steps, key=lambda name: steps[name]), min(steps, key=lambda name: steps[name])
        time = duration(study.steps * study.seconds[study.reference])
        told.append(
            f"At equal compute every arm takes as long as {study.steps:,} steps of {study.reference} ({time}, by the "
            f"seconds a step): from {steps[slow]:,} steps ({slow}) to {steps[fast]:,} ({fast})."
        )
    return told


def computing(outcome: Outcome) -> str:
    """Hours, hardware and versions."""
    seconds = sum(row["seconds"] for row in outcome.rows.values())
    tried = sum(row["seconds"] for row in outcome.tuning.values())
    spent = f"Computing: {duration(seconds + tried)} of training, summed over the runs"
    spent += f" ({duration(tried)} of it for tuning)." if outcome.tuning else "."
    machine = ", ".join(f"{name} {value}" for name, value in outcome.study.machine.items())
    rows = [*outcome.rows.values(), *outcome.tuning.values()]
    told = [spent, f"Timed on: {machine}." if machine else ""]
    if rows:
        devices = listed(sorted({row["device"] for row in rows}))
        names = list(dict.fromkeys(name for row in rows for name in row["versions"]))
        versions = (
            f"{name} {' or '.join(sorted({row['versions'][name] for row in rows if name in row['versions']}))}"
            for name in names
        )
        told.append(f"Trained on {devices} with {', '.join(versions)}.")
    return " ".join(filter(None, told))


def command(study: Study, folder: Path) -> str:
    """The commands that make this comparison, one a line: more than one when arms with other overrides joined later."""
    ladder = read_ladder(study)
    groups: list[tuple[Mapping[str, Any], list[str]]] = []
    for name in main_arms(study):
        arm = study.arm(name)
        known = next((recipes for overrides, recipes in groups if overrides == arm.overrides), None)
        if known is None:
            groups.append((arm.overrides, [arm.recipe]))
        else:
            known.append(arm.recipe)
    lines = []
    for overrides, recipes in groups:
        whole = study.arm(ladder.whole) if ladder is not None else None
        climbs = whole is not None and whole.overrides == overrides and whole.recipe in recipes
        if climbs and whole is not None:  # what is taken apart is the last recipe
            recipes = [*(recipe for recipe in recipes if recipe != whole.recipe), whole.recipe]
        words = ["declip", "compare", *recipes, *(f"{key}={yaml_value(value)}" for key, value in overrides.items())]
        if climbs and ladder is not None:
            words += ["--ablation"] if ladder.rungs or ladder.left_out else []
            words += ["--baselines"] if ladder.baselines else []
        lines.append(shlex.join([*words, *_options(study, folder)]))
    if study.seeds != tuple(range(len(study.seeds))):
        lines.append(f"# from Python, for its seeds: declip.comparison.runner.compare(..., seeds={study.seeds})")
    return "\n".join(lines)


def _options(study: Study, folder: Path) -> list[str]:
    words = ["--pairs", ",".join(map(str, study.pairs)), "--seeds", str(len(study.seeds))]
    words += ["--out", folder.name if folder.is_absolute() else str(folder)]
    for name in study.on:
        words += ["--dataset", name]
    for name in study.protocols if study.protocols != ("zero-shot",) else ():
        words += ["--task", name]
    if set(study.budgets) != set(BUDGETS):
        words += ["--budget", *study.budgets]
    words += ["--compute-budget-of", study.reference]
    if study.tuning is not None:
        for key, values in study.tuning.grid.items():
            words += ["--sweep", f"{key}={','.join(map(yaml_value, values))}"]
        words += ["--sweep-dataset", study.tuning.on, "--sweep-pairs", str(study.tuning.pairs)]
        words += ["--sweep-steps", str(study.tuning.steps)]
    return words


def near_chance(outcome: Outcome, budget: str, measure: str, size: Measured) -> list[str]:
    """At which numbers of pairs the baseline is not clearly above chance: a factor there tells nothing."""
    baseline = baseline_of(outcome.study)
    curve = outcome.curve(baseline, budget, measure)
    limit = size.chance + 2 * size.standard_error(size.chance)
    weak = [pairs for pairs, mean in zip(curve.pairs, curve.means, strict=True) if mean <= limit]
    if not weak:
        return []
    return [
        f"Careful: at equal {budget} with {listed(weak)} pairs {baseline} is within two standard errors of chance "
        f"({percent(size.chance)}), so a factor there tells nothing."
    ]


def lead(outcome: Outcome, factors: Mapping[tuple[str, str], Factor | None], measure: str) -> str:
    """The first sentences: the reference's factors, or why there is none."""
    study, baseline = outcome.study, baseline_of(outcome.study)
    if not outcome.measures:
        return "Nothing has been measured yet."
    names = [name for name in main_arms(study) if name != baseline]
    if not names:
        return f"Only {baseline} was trained, so there is nothing to compare it with."
    arm = study.reference if study.reference in names else names[-1]
    told = [
        f"{ratio(baseline, factor.mean)} at equal {budget} ({interval(factor)})"
        for budget in study.budgets
        if (factor := factors.get((arm, budget))) is not None and factor.mean is not None
    ]
    if not told:
        return " ".join(factor_sentence(arm, baseline, budget, factors.get((arm, budget))) for budget in study.budgets)
    return f"For the same {measure}, {arm} needs {listed(told)}."


def _left_out(outcome: Outcome, ladder: Ladder, budget: str, pairs: int, measure: str) -> str:
    """Which terms the whole would miss and which it would not, as far as the seeds can tell."""
    found = {
        part.label: each
        for part in ladder.left_out
        if (each := difference(outcome, part.arm, ladder.whole, budget, pairs, measure)) is not None
    }
    if not found:
        return ""
    missed = {name: each.mean for name, each in found.items() if (each.mean if each.high is None else each.high) < 0}
    better = {name: each.mean for name, each in found.items() if (each.mean if each.low is None else each.low) > 0}
    words = "; no term is missed beyond what seeds do"
    if missed:
        most = min(missed, key=lambda name: missed[name])
        words = f"; of its terms {most} is missed most ({signed(missed[most])} points without it)"
    if better:
        listing = [f"{name} ({signed(gain)} points)" for name, gain in better.items()]
        words += f"; it is better without {listed(listing)}"
    return words


def ladder_sentences(outcome: Outcome, ladder: Ladder, measure: str, pairs: int) -> list[str]:
    """What each part gives at a number of pairs, and whether the order is the published one."""
    told = []
    for budget in outcome.study.budgets:
        means = {arm: _mean(outcome, arm, budget, pairs, measure) for arm in ladder.arms}
        known = {arm: value for arm, value in means.items() if value is not None}
        absent = [arm for arm in ladder.arms if arm not in known]
        if ladder.whole in known:
            whole = known[ladder.whole]
            words = f"At equal {budget} with {pairs:,} pairs {ladder.whole}, the whole, reaches {percent(whole)}"
            told.append(f"{words}{_left_out(outcome, ladder, budget, pairs, measure)}.")
            strong = [(known[part.arm], part.label) for part in ladder.baselines if part.arm in known]
            if strong:
                best = max(strong)
                told.append(
                    f"The strongest plain clip has {best[1]}: {percent(best[0])}, "
                    f"{signed(best[0] - whole)} points against the whole."
                )
        if ladder.published:
            told += _published(ladder, [means[part.arm] for part in ladder.rungs], budget)
        if absent:
            told.append(f"Not measured yet at equal {budget}: {listed(absent)}.")
    return told


def _published(ladder: Ladder, means: Sequence[float | None], budget: str) -> list[str]:
    """Whether each rung adds here as it does in the paper, and which adds most."""
    known = [mean for mean in means if mean is not None]
    if len(known) < len(means):
        return []
    gains = [after - before for before, after in pairwise(known)]
    paper = [after - before for before, after in pairwise(ladder.published)]
    labels = [part.label.partition(" = ")[0].replace(" +", " with ").removeprefix("+") for part in ladder.rungs[1:]]
    shown = listed(f"{label} {signed(gain)}" for label, gain in zip(labels, gains, strict=True))
    against = [label for label, gain in zip(labels, gains, strict=True) if gain <= 0]
    order = (
        "Every rung adds, as published"
        if not against
        else f"Against what was published, {listed(against)} adds nothing"
    )
    largest, largest_there = (labels[each.index(max(each))] for each in (gains, paper))
    same = "the largest step is the same as" if largest == largest_there else f"the largest step is {largest}, not"
    same_words = (
        f"{same} published, {largest_there}" if largest == largest_there else f"{same} {largest_there} as published"
    )
    return [f"Steps of the ladder here, equal {budget}, in points: {shown}. {order}; {same_words}."]


def published_source() -> str:
    """Where the published ladder is from."""
    return (
        "Published, for comparison: zero-shot ImageNet top-1 of a ResNet-50 trained on CC3M (Li et al. 2022, arXiv "
        "2110.05208), as quoted second-hand; other data, towers and test set, so only the order compares."
    )


def _mean(outcome: Outcome, arm: str, budget: str, pairs: int, measure: str) -> float | None:
    values = list(seed_values(outcome, arm, budget, pairs, measure).values())
    return sum(values) / len(values) if values else None


def tuning_sentence(outcome: Outcome, by: str) -> str:
    """How the arms were tuned."""
    plan = outcome.study.tuning
    if plan is None:
        return "No arm was tuned here: each ran with its recipe's settings, which may suit one arm better than another."
    grid = "; ".join(f"{key}: {', '.join(map(yaml_value, values))}" for key, values in plan.grid.items())
    chosen = "; ".join(f"{name}: {settings(values)}" for name, values in outcome.study.chosen.items())
    kept = f" Kept: {chosen}." if chosen else " Nothing has been chosen yet."
    return (
        f"Before the runs every arm tried {grid} with {plan.pairs:,} pairs, {plan.steps:,} steps and seed {plan.seed}, "
        f"and kept what did best on {plan.on} by {by}; no result is reported on that set.{kept}"
    )


def cost_sentence(study: Study) -> str:
    """What a step of each arm costs against the baseline's."""
    base = baseline_of(study)
    others = [arm.name for arm in study.arms if arm.name != base and arm.name in study.seconds]
    if base not in study.seconds:
        return "The arms have not been timed yet."
    told = f"A step of {base} takes {study.seconds[base]:.3g} s"
    ratios = [f"{name} {study.seconds[name] / study.seconds[base]:.2f}" for name in others]
    return f"{told}; times as long: {', '.join(ratios)}." if ratios else f"{told}."


def reading(outcome: Outcome, sizes: Mapping[str, Measured]) -> list[tuple[str, str]]:
    """How to read it: terms with their explanations."""
    study, baseline = outcome.study, baseline_of(outcome.study)
    told = [
        (
            "Equal samples",
            f"Every arm takes the same number of steps with the same batch, {study.steps * study.batch:,} samples, "
            "whatever a step costs.",
        ),
        (
            "Equal compute",
            f"Every arm takes as many steps as fit into the time of {study.reference}'s {study.steps:,}. A step's "
            f"seconds are the median of {ROUNDS * TIMED}, loading included, measured before the first run; the arms "
            f"took {ROUNDS} turns, so that a machine that slows down does so for all. The learning-rate schedule ends "
            "with the steps.",
        ),
        (
            "Data-efficiency factor",
            f"For what {baseline} reaches with its N pairs: N over the pairs that the arm needs for the same. The "
            "arm's curve is made monotone (isotonic regression) and is linear in log(pairs) between what was "
            "measured; it is never extrapolated. The factor is the geometric mean over those of the baseline's "
            "numbers of pairs where it is defined. Where the arm passes the baseline already with its fewest pairs, "
            "the factor is larger than N over those; where it never reaches it, smaller than N over its most. Both are "
            "left out of the mean.",
        ),
        (
            "Intervals",
            "Of a mean: Student's t over the seeds, 95 %. Of a factor: t over the log factor of each seed, which is "
            "that of the means and, beside it, how far the seed's two curves are from each other there, over the slope "
            f"of the arm's. Of a difference: t over paired seeds. {_few(len(study.seeds))}",
        ),
        ("Test set", _test_sets(outcome, sizes)),
        (
            "Tuning",
            f"On {study.tuning.on} only, for one number of pairs, and the grid may end before an arm's best."
            if study.tuning is not None
            else "None: settings that suit the baseline less would favour the others.",
        ),
    ]
    if any(arm.name.startswith(BASELINE) for arm in study.arms):
        told.append(
            (
                "Plain clip, same towers",
                "The same towers and settings with the contrastive term alone: with a crop and nothing else (weak), "
                "the recipe's own views (same), MoCo v2's (strong), and twice the views of image and text (two).",
            )
        )
    return told


def _few(seeds: int) -> str:
    if seeds == 1:
        return "With one seed there is none, and a difference may be chance."
    if seeds < 5:
        return f"{seeds} seeds are few, so the intervals are wide: t is {stats.t.ppf(0.975, seeds - 1):.1f}."
    return f"They tell the spread over {seeds} seeds (choice of pairs, start, order), not over other data."


def _test_sets(outcome: Outcome, sizes: Mapping[str, Measured]) -> str:
    if not sizes:
        return "Nothing has been measured yet."
    study, told = outcome.study, []
    for measure, each in sizes.items():
        means = (outcome.curve(arm.name, budget, measure).means for arm in study.arms for budget in study.budgets)
        best = max((float(mean) for curve in means for mean in curve), default=0.0)
        error = 100 * each.standard_error(best)
        told.append(f"{measure}: n = {each.n:,}; a score of {percent(best)} has a standard error of {error:.2g} points")
    return (
        f"{'; '.join(told)}. This is the noise of a finite test set; all arms meet the same images, so it is "
        "partly shared between them and the intervals over seeds do not hold it."
    )
