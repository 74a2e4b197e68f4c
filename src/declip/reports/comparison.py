"""The report of a comparison: one page with nothing to load from elsewhere, and the same as Markdown."""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from declip.comparison.ablation import baseline_of, main_arms, measured_sizes, read_ladder
from declip.comparison.outcome import Outcome
from declip.comparison.statistics import Factor
from declip.io.atomic import atomic_write
from declip.io.text import counted, listed
from declip.reports.comparison_charts import Picture
from declip.reports.comparison_figures import curve_pictures, ladder_picture
from declip.reports.comparison_tables import (
    Table,
    arms_table,
    common_overrides,
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
)
from declip.reports.comparison_wording import (
    command,
    computing,
    cost_sentence,
    ladder_sentences,
    lead,
    near_chance,
    plan,
    published_source,
    reading,
    state,
    title,
    tuning_sentence,
)
from declip.reports.factor_wording import factor_sentence, interval

PAGE, WORDS, FIGURES = "report.html", "results.md", "figures"
MOST_CARDS = 6


@dataclass(frozen=True)
class Card:
    """A large number with its name and what it means."""

    value: str
    name: str
    meaning: str


@dataclass(frozen=True)
class Cards:
    """Some of them."""

    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Code:
    """Words to copy."""

    text: str


@dataclass(frozen=True)
class Terms:
    """Terms with their explanations."""

    terms: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Folded:
    """Pictures and tables that are shown when asked for."""

    title: str
    blocks: tuple[Picture | Table, ...]


@dataclass(frozen=True)
class Bullets:
    """Sentences, one below the other."""

    texts: tuple[str, ...]


Block = str | Table | Picture | Cards | Code | Terms | Bullets | Folded


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: Of its heading, to link to.
        title: Its heading.
        short: Its name in the navigation.
        blocks: From top to bottom; a text is a paragraph.
    """

    id: str
    title: str
    short: str
    blocks: tuple[Block, ...]


def write_page(outcome: Outcome, folder: Path) -> tuple[Path, Path]:
    """Write report.html, results.md and figures/ of what there is of a comparison.

    Args:
        outcome: Complete or not.
        folder: Where to; what is there of the same names is replaced.

    Returns:
        The paths of report.html and results.md.

    Raises:
        UserError: the folder cannot be written to.
    """
    folder = Path(folder)
    factors = _factors(outcome)
    foremost = next(iter(outcome.measures), "")
    first = lead(outcome, factors, foremost)
    sections = _sections(outcome, folder, factors, foremost)
    pictures = [block for section in sections for block in _pictures(section.blocks)]
    with atomic_write(folder / FIGURES) as path:
        path.mkdir()
        for picture in pictures:
            picture.write_png(path / f"{picture.name}.png")
    date = datetime.datetime.now().strftime("%d %B %Y, %H:%M")
    made = f"Written by declip {metadata.version('declip')} on {date}."
    with atomic_write(folder / PAGE) as path:
        path.write_text(_html(outcome, sections, first, made), encoding="utf-8")
    with atomic_write(folder / WORDS) as path:
        path.write_text(_markdown(outcome, sections, first, made), encoding="utf-8")
    return folder / PAGE, folder / WORDS


def _factors(outcome: Outcome) -> dict[tuple[str, str], Factor | None]:
    """The factor of each arm over the baseline under each budget, by the foremost measure."""
    if not outcome.measures:
        return {}
    study, measure, baseline = outcome.study, outcome.measures[0], baseline_of(outcome.study)
    found: dict[tuple[str, str], Factor | None] = {}
    for arm in study.arms:
        if arm.name == baseline:
            continue
        for budget in study.budgets:
            both = all(outcome.curve(name, budget, measure).pairs for name in (arm.name, baseline))
            found[arm.name, budget] = outcome.factor(arm.name, baseline, budget, measure) if both else None
    return found


def _sections(
    outcome: Outcome, folder: Path, factors: dict[tuple[str, str], Factor | None], foremost: str
) -> list[Section]:
    return [
        Section("compared", "What was compared", "Compared", tuple(_compared(outcome, folder))),
        Section("factor", "Data-efficiency factor", "Factor", tuple(_headline(outcome, factors, foremost))),
        Section("curves", "Data-efficiency curves", "Curves", tuple(_curves(outcome))),
        *_ladder(outcome, foremost),
        Section("tables", "Every number", "Tables", tuple(_tables(outcome))),
        Section("reading", "How to read it", "Reading", (Terms(tuple(reading(outcome, measured(outcome)))),)),
    ]


def _compared(outcome: Outcome, folder: Path) -> list[Block]:
    study = outcome.study
    common = common_overrides(study)
    shared = f"For all arms: {settings(common)}." if common else "Nothing is overridden for all arms."
    found: list[Block] = [*plan(study), arms_table(study), shared]
    if outcome.measures:
        found += [f"Measured on {listed(study.on)} by {listed(study.protocols)}:", measures_table(outcome)]
    failed = failures_table(outcome)
    return [*found, *([failed] if failed else []), computing(outcome), Code(command(study, folder))]


def _headline(outcome: Outcome, factors: dict[tuple[str, str], Factor | None], foremost: str) -> list[Block]:
    study, baseline = outcome.study, baseline_of(outcome.study)
    if not factors:
        return [lead(outcome, factors, foremost)]
    names = [name for name in main_arms(study) if name != baseline]
    names.sort(key=lambda name: name != study.reference)
    cards = [
        Card(f"{factor.mean:.2f} ×", f"{name}, equal {budget}", _meaning(baseline, factor))
        for name in names
        for budget in study.budgets
        if (factor := factors[name, budget]) is not None and factor.mean is not None
    ]
    told = [
        factor_sentence(name, baseline, budget, factor) for (name, budget), factor in factors.items() if name in names
    ]
    size = measured(outcome)[foremost]
    told += [text for budget in study.budgets for text in near_chance(outcome, budget, foremost, size)]
    return [
        f"How many times fewer pairs an arm needs than {baseline} for the same {foremost}, the foremost measure.",
        *([Cards(tuple(cards[:MOST_CARDS]))] if cards else []),
        *([Bullets(tuple(told))] if told else []),
        *(factors_table(factors, budget, study.pairs, baseline, foremost) for budget in study.budgets),
        f"“Passed”: already with its fewest pairs the arm reaches more than {baseline} with that many. “Not reached”: "
        f"the arm never reaches it. Both lie outside what was measured and do not count: where sizes are not reached "
        f"the mean is too high.",
    ]


def _meaning(baseline: str, factor: Factor) -> str:
    inside = sum(each.factor is not None for each in factor.at)
    sizes = f"over {inside} of {counted(len(factor.at), 'number')} of pairs"
    return f"Against {baseline}, {sizes}; {interval(factor)}."


def _curves(outcome: Outcome) -> list[Block]:
    found: list[Block] = [
        picture
        for number, (measure, each) in enumerate(measured(outcome).items())
        for picture in curve_pictures(outcome, measure, number, each.chance)
    ]
    if not found:
        return ["Nothing has been measured yet."]
    few = len(outcome.study.seeds) == 1
    bars = "With one seed there are no intervals." if few else "Bars: 95 % interval of the mean by Student's t."
    return [
        f"Lines: mean over the seeds. {bars} Small dots: each seed. Dotted: chance. Arms are drawn slightly side by "
        "side, so that bars do not hide each other; a bar that leaves the panel is cut.",
        *found,
    ]


def _ladder(outcome: Outcome, foremost: str) -> list[Section]:
    """A section when a recipe was taken apart, and measured."""
    ladder = read_ladder(outcome.study)
    if ladder is None:
        return []
    sizes = measured_sizes(outcome, ladder, foremost) if foremost else []
    blocks: list[Block] = []
    if not sizes:
        blocks.append(f"{ladder.whole} was taken apart, but not enough of its parts has been measured yet.")
    else:
        blocks.append(Bullets(tuple(ladder_sentences(outcome, ladder, foremost, sizes[0]))))
        blocks += [published_source()] if ladder.published else []
        blocks += [
            ladder_picture(outcome, ladder, foremost, sizes[0]),
            ladder_table(outcome, ladder, foremost, sizes[0]),
        ]
    for pairs in sizes[1:]:
        parts = (ladder_picture(outcome, ladder, foremost, pairs), ladder_table(outcome, ladder, foremost, pairs))
        blocks.append(Folded(f"With {pairs:,} pairs", parts))
    return [Section("parts", f"{ladder.whole}, taken apart", "Parts", tuple(blocks))]


def _tables(outcome: Outcome) -> list[Block]:
    study = outcome.study
    found: list[Block] = [
        scores_table(outcome, measure, budget) for measure in outcome.measures for budget in study.budgets
    ]
    cost, tuning = cost_table(study), tuning_table(outcome)
    found += [cost_sentence(study), *([cost] if cost else [])]
    found += [tuning_sentence(outcome, tuned_by(outcome)), *([tuning] if tuning else [])]
    return [*found, runs_table(outcome)]


def _pictures(blocks: Sequence[Block]) -> list[Picture]:
    found = []
    for block in blocks:
        if isinstance(block, Picture):
            found.append(block)
        elif isinstance(block, Folded):
            found += _pictures(block.blocks)
    return found


def _html(outcome: Outcome, sections: Sequence[Section], first: str, made: str) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["words"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    environment.filters["kind"] = lambda block: type(block).__name__
    look = resources.files("declip.reports") / "templates" / "report.css"
    template = resources.files("declip.reports") / "templates" / "comparison.html"
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        style=Markup(look.read_text(encoding="utf-8")),
        title=title(outcome.study),
        complete=outcome.complete,
        state=state(outcome),
        lead=first,
        sections=sections,
        made=made,
    )


def _markdown(outcome: Outcome, sections: Sequence[Section], first: str, made: str) -> str:
    parts = [f"# {plain(title(outcome.study))}", plain(first), plain(state(outcome))]
    for section in sections:
        parts += [f"## {plain(section.title)}", *filter(None, map(_as_markdown, section.blocks))]
    return "\n\n".join([*parts, plain(made)]) + "\n"


def _as_markdown(block: Block) -> str:
    match block:
        case str():
            return plain(block)
        case Picture():
            return f"![{plain(block.caption.partition('. ')[0])}]({FIGURES}/{block.name}.png)\n\n{plain(block.caption)}"
        case Cards():
            return ""  # the sentences below say the same
        case Code():
            fence = "````" if "```" in block.text else "```"
            return f"{fence}sh\n{block.text}\n{fence}"
        case Bullets():
            return "\n".join(f"- {plain(text)}" for text in block.texts)
        case Terms():
            return "\n".join(f"- **{plain(term)}**: {plain(words)}" for term, words in block.terms)
        case Folded():
            return _folded(block.title, "\n\n".join(_as_markdown(each) for each in block.blocks))
        case Table():
            table = _table(block)
            return _folded(block.caption, table) if block.folded else f"**{plain(block.caption)}**\n\n{table}"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{Markup.escape(title)}</summary>\n\n{text}\n\n</details>"


def _table(table: Table) -> str:
    rules = ["---" if place < table.texts else "---:" for place in range(len(table.columns))]
    rows = [[plain(name) for name in table.columns], rules, *([plain(word) for word in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plain(text: str) -> str:
    """Words that Markdown leaves as they are."""
    text = " ".join(text.split())
    text = re.sub(r"([\\`*\[\]<>|~$&])|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return re.sub(r"^(\d*)([.)](?= )|[-+](?= )|#)", r"\1\\\2", text)
