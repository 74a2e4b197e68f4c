"""The page of an inspection, and its tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from declip.data.images.thumbnails import thumbnail
from declip.inspection.results import Finding, Fraction, Inspection, Spread
from declip.io.text import percent, round_two_digits, sanitize
from declip.reports.page import Table, environment, render, rich_table

SHOWN_PERCENTILES = (5, 25, 50, 75, 95)
# Before a number that is followed by text which may run right to left
LTR = "\N{LEFT-TO-RIGHT MARK}"
SPREAD_COLUMNS = (
    "",
    "min",
    *("median" if at == 50 else f"{at} %" for at in SHOWN_PERCENTILES),
    "max",
)


def page(inspection: Inspection) -> str:
    """Render the page; text from the data is escaped and has no control characters."""
    context = {"it": inspection, "tables": tables(inspection), "findings": sentences(inspection)}
    return render("inspection.html", **context, thumbnail=thumbnail)


def summary(it: Inspection) -> Group:
    """Format the inspection for the terminal: numbers first, findings last."""
    extent = f"  {render('extent.txt', it=it)} {it.seconds:.1f} s."
    title = Text(sanitize(it.name), "bold")
    parts: list[Any] = [title.append(extent, "not bold")]
    for table in tables(it).values():
        if table.rows:
            parts += [Text(f"\n{table.caption}", "bold"), rich_table(table)]
    parts.append(Text("\nFindings", "bold"))
    for finding, text, advice in sentences(it):
        line = RichTable.grid()
        mark = Text("· ", "bold")
        if finding.fix:
            mark = Text("! ", "bold red")
        sentence = Text(text).append(f" {advice}", "dim")
        line.add_row(mark, sentence)
        parts.append(line)
    if not it.findings:
        parts.append("No findings.")
    return Group(*parts)


def sentences(inspection: Inspection) -> list[tuple[Finding, str, str]]:
    """Each finding with its result and its advice."""
    module = environment(plain_text=True).get_template("findings.txt").module
    found = []
    for finding in inspection.findings:
        fill = getattr(module, finding.rule)
        lines = str(fill(finding, inspection)).split("\n")
        result = sanitize(lines[0], 400)
        advice = sanitize(lines[-1].strip(), 400)
        found.append((finding, result, advice))
    return found


def tables(it: Inspection) -> dict[str, Table]:
    """All tables by name; empty ones are not shown."""
    reasons = []
    frequent_first = sorted(it.reasons.items(), key=lambda reason: -reason[1]["count"])
    for name, row in frequent_first:
        reasons.append((name, f"{row['count']:,}", _keys(row["examples"], row["count"])))
    leaks = []
    for leak in it.leakages:
        copies = _keys([key for key, _ in leak.copies], leak.matches.count)
        leaks.append((leak.name, f"{leak.images:,}", fraction(leak.matches), copies))
    columns = ("set", "its images", "pairs", "keys")
    return {
        **(_statistics(it) if it.usable else {}),
        "reasons": Table(
            "Pairs that cannot be used", ("reason", "pairs", "such as"), tuple(reasons), 3
        ),
        "leakages": Table("Images similar to those of a checked set", columns, tuple(leaks), 4),
    }


def _statistics(it: Inspection) -> dict[str, Table]:
    images = it.images
    captions = it.captions
    assert images is not None
    assert captions is not None
    spreads = (
        _spread("shorter side of images, px", images.shorter),
        _spread("longer / shorter side", images.aspect, "{:.2f}"),
        _spread("words of captions", captions.words),
        _spread("CLIP tokens of captions", captions.tokens),
        _spread("captions per pair", captions.per_pair),
    )
    facts = [(f"images with a shorter side under {images.size} px", fraction(images.smaller))]
    facts += [
        (f"captions truncated at {length} tokens", fraction(each))
        for length, each in captions.truncated.items()
    ]
    for kind, each in captions.kinds.items():
        examples = ", ".join(f"“{sanitize(text, 40)}”" for text in captions.examples[kind])
        facts.append((kind, f"{LTR}{fraction(each)}: {examples}"))
    equal = f"{round_two_digits(captions.equal_in_batch)} equal pairs expected"
    facts.append((f"equal captions in a batch of {captions.batch_size}", equal))
    repeats = it.equal_captions.examples if it.equal_captions else ()
    frequent = tuple((sanitize(group.caption, 60), f"{group.size:,}") for group in repeats)
    return {
        "spreads": Table("Distributions", SPREAD_COLUMNS, spreads),
        "facts": Table("Fractions", (), tuple(facts), 2),
        "frequent_captions": Table("Most frequent captions", ("caption", "pairs"), frequent),
        "repeats": _repeats(it),
    }


def _repeats(it: Inspection) -> Table:
    rows = []
    for name, repeats in (
        ("equal images", it.equal_images),
        ("images that look alike", it.near_images),
        ("equal captions", it.equal_captions),
    ):
        assert repeats is not None
        largest = max(repeats.examples, key=lambda group: group.size, default=None)
        example = ""
        if largest:
            example = f"{LTR}{largest.size:,} × {sanitize(largest.caption, 40)}"
        share = percent(repeats.members / it.usable)
        rows.append((name, example, f"{repeats.members:,}", share))
    return Table("Repeats", ("", "largest group", "pairs", "fraction"), tuple(rows), texts=2)


def _spread(name: str, spread: Spread, form: str = "{:,.0f}") -> tuple[str, ...]:
    values = (spread["min"], *(spread[f"p{at}"] for at in SHOWN_PERCENTILES), spread["max"])
    return (name, *(form.format(value) for value in values))


def fraction(each: Fraction) -> str:
    """Format a fraction as "3.1 %", with its interval if a sample was read."""
    text = percent(each.fraction)
    if each.low == each.high:
        return text
    return f"{text} ({percent(each.low)} to {percent(each.high)})"


def _keys(some: Sequence[str], count: int) -> str:
    """List the first keys and the number of others."""
    listed = [sanitize(key, 120) for key in some[:5]]
    others = count - len(listed)
    text = ", ".join(listed)
    if others > 0:
        text += f" and {others:,} more"
    return text
