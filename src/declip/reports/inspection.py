"""The result of an inspection: its page, its tables for the terminal, and the list of pairs to exclude."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Group
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from declip.data.exclude import write_exclusions
from declip.inspection.result import Example, Finding, Fraction, Histogram, Inspection, Repeats, Spread
from declip.io.text import about, percent, shown
from declip.reports.page import Table, environment, render, write
from declip.reports.sheets import inspection_sheet, save_png
from declip.reports.terminal import rich_table
from declip.reports.thumbnails import Thumbnail, thumbnail

SHOWN_PERCENTILES = (5, 25, 50, 75, 95)
SIDE = 224
"""Pixels of an example: sharp at 112 CSS pixels on a screen of double density."""


def page(inspection: Inspection) -> str:
    """Fill in the page; everything from the data is escaped, and without control characters."""
    return render("inspection.html", it=inspection, tables=tables(inspection), findings=sentences(inspection),
                  bars=bars, thumbnail=_thumbnail)  # fmt: skip


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page; raises `UserError` where that cannot be done."""
    write(path.expanduser(), page(inspection))


def write_json(inspection: Inspection, path: Path) -> None:
    """Write the numbers; raises `UserError` where that cannot be done."""
    write(path.expanduser(), inspection.to_json())


def write_exclude(inspection: Inspection, path: Path) -> int:
    """Write the copies of the checked sets' images as a list that training and `data shard --exclude` leave out.

    Returns:
        The number of pairs.

    Raises:
        UserError: the file cannot be written.
    """
    copies = {copy: leakage.name for leakage in inspection.leakages for copy in leakage.copies}
    rows = [(key, place, f"in {name}", None, "") for (key, place), name in copies.items()]
    write(path.expanduser(), write_exclusions(rows))
    return len(rows)


def write_sheet(inspection: Inspection, path: Path) -> None:
    """Write the contact sheet as PNG; raises `UserError` where that cannot be done."""
    save_png(inspection_sheet(inspection, extent(inspection)), path)


def summary(inspection: Inspection) -> Group:
    """Everything that fits a terminal: numbers first, what they mean last."""
    return Group(*_parts(inspection))


def _parts(it: Inspection) -> Iterator[RichTable | Text | Padding]:
    yield Text(shown(it.name), "bold").append(f"  {extent(it)} {it.seconds:.1f} s.", "not bold")
    for name, table in tables(it).items():
        if table.rows and not table.folded and name != "common_words":
            yield Padding(Text(table.caption, "bold"), (1, 0, 0, 0))
            yield rich_table(table)
    yield Padding(Text("What this means", "bold"), (1, 0, 0, 0))
    for finding, text, advice in sentences(it):
        line = RichTable.grid()
        mark = Text("! ", "bold red") if finding.fix else Text("· ", "bold")
        line.add_row(mark, Text(text).append(f" {advice}", "dim"))
        yield line
    if not it.findings:
        yield Text("Nothing stands out.")


def extent(inspection: Inspection) -> str:
    """How much of the source was read, in words."""
    words: str = environment(plain_text=True).get_template("extent.txt").render(it=inspection)
    return words


def sentences(inspection: Inspection) -> list[tuple[Finding, str, str]]:
    """Each finding with what was found and what to do."""
    module = environment(plain_text=True).get_template("findings.txt").module
    filled = [(each, str(getattr(module, each.rule)(each, inspection)).split("\n")) for each in inspection.findings]
    return [(each, shown(lines[0], 400), shown(lines[-1].strip(), 400)) for each, lines in filled]


def tables(it: Inspection) -> dict[str, Table]:
    """All tables by name; those without rows are not shown."""
    reasons = sorted(it.reasons.items(), key=lambda item: -item[1]["count"])
    found = {
        "reasons": Table(
            "Pairs that cannot be used",
            ("reason", "pairs", "such as"),
            tuple((name, f"{row['count']:,}", _keys(row["examples"], row["count"])) for name, row in reasons),
            3,
        ),
        "leakages": Table(
            "Images that look like one of a checked set",
            ("set", "its images", "pairs", "keys"),
            tuple(
                (each.name, f"{each.images:,}", fraction(each.found), _keys([key for key, _ in each.copies[:5]],
                 each.found.count))
                for each in it.leakages
            ),
            4,
        ),
    }  # fmt: skip
    if it.images is None or it.captions is None:
        return found
    return {**_image_tables(it), **_caption_tables(it), **_repeat_tables(it), **found}


def _image_tables(it: Inspection) -> dict[str, Table]:
    images = it.images
    assert images is not None
    sizes = {"width, px": images.width, "height, px": images.height, "shorter side, px": images.shorter}
    rows = [
        *(_spread(name, each) for name, each in sizes.items()),
        _spread("longer / shorter", images.aspect, "{:.2f}"),
    ]
    if images.bytes is not None:
        rows.append(_spread("file, kB", images.bytes, "{:,.3g}", 1000))
    facts = [
        (f"shorter side under {images.size} px", fraction(images.smaller)),
        ("more than 3 times as long as wide", fraction(images.long)),
        ("a single color", fraction(images.blank)),
        *([("formats", _counts(images.formats)), ("modes", _counts(images.modes))] if images.formats else []),
    ]
    return {
        "image_sizes": Table("Image sizes", SPREAD_COLUMNS, tuple(rows)),
        "image_facts": Table("Images", (), tuple(facts), 2),
    }


def _caption_tables(it: Inspection) -> dict[str, Table]:
    captions = it.captions
    assert captions is not None
    lengths = {"words": captions.words, "characters": captions.characters, "CLIP tokens": captions.tokens}
    lengths["captions per pair"] = captions.per_pair
    facts = [(f"truncated at {length} tokens", fraction(each)) for length, each in captions.truncated.items()]
    for kind, each in captions.kinds.items():
        examples = ", ".join(f"“{shown(text, 40)}”" for text in captions.examples[kind])
        facts.append((kind, f"{fraction(each)}: {examples}"))
    if captions.scripts:
        facts.append(("scripts", _counts(captions.scripts)))
    equal = f"{about(captions.equal_in_batch)} couples expected"
    facts.append((f"equal captions in a batch of {captions.batch_size}", equal))
    if it.keywords is not None and it.keywords.count:
        facts.append(("pairs with keywords", f"{fraction(it.keywords)}; {it.keywords_per_pair:.1f} per pair"))
    frequent = tuple((shown(text, 60), f"{n:,}") for text, n in captions.frequent)
    words = tuple((shown(text, 40), f"{n:,}") for text, n in captions.common_words)
    return {
        "caption_lengths": Table("Caption lengths", SPREAD_COLUMNS, tuple(_spread(*each) for each in lengths.items())),
        "caption_facts": Table("Captions", (), tuple(facts), 2),
        "frequent_captions": Table("Most frequent captions", ("caption", "pairs"), frequent),
        "common_words": Table("Most frequent words", ("word", "captions"), words),
    }


def _repeat_tables(it: Inspection) -> dict[str, Table]:
    named = {
        "equal images": it.equal_images,
        "images that look alike": it.near_images,
        "equal captions": it.equal_captions,
    }
    columns = ("", "pairs", "fraction", "groups", "largest", "surplus", *([] if it.whole else ["couples in the whole"]))
    rows = tuple((name, *_repeat(each, it)) for name, each in named.items() if each is not None)
    found = {"repeats": Table("Repeats", columns, rows)}
    for name, each in list(named.items())[:2]:
        assert each is not None
        groups = tuple((f"{g.size:,} ×", shown(g.caption, 60), _keys(g.keys, g.size)) for g in each.examples)
        caption = f"{name.capitalize()}, largest groups"
        found[f"groups of {name}"] = Table(caption, ("", "first caption", "keys"), groups, 3, folded=True)
    return found


def _repeat(each: Repeats, it: Inspection) -> tuple[str, ...]:
    largest = each.examples[0].size if each.examples else 0
    numbers = (f"{each.groups:,}", f"{largest:,}", f"{each.surplus:,}")
    whole = () if it.whole else (f"about {about(each.expected)}" if each.coincidences else "none seen",)
    return (f"{each.members:,}", percent(each.members / it.usable), *numbers, *whole)


SPREAD_COLUMNS = ("", "min", *("median" if at == 50 else f"{at} %" for at in SHOWN_PERCENTILES), "max")


def _spread(name: str, spread: Spread, form: str = "{:,.0f}", unit: float = 1) -> tuple[str, ...]:
    values = (spread.min, *(spread.at(at) for at in SHOWN_PERCENTILES), spread.max)
    return (name, *(form.format(value / unit) for value in values))


def bars(histogram: Histogram) -> list[tuple[str, int, float]]:
    """Label, count and fraction of the longest for each bar, without empty bars at the ends."""
    filled = [place for place, count in enumerate(histogram.counts) if count]
    top, labels = max(histogram.counts), histogram.labels()
    return [(labels[at], histogram.counts[at], histogram.counts[at] / top) for at in range(filled[0], filled[-1] + 1)]


def fraction(each: Fraction) -> str:
    """ "3.1 %", and the interval where a sample was read."""
    text = percent(each.value)
    return text if each.low == each.high else f"{text} ({percent(each.low)} to {percent(each.high)})"


def _counts(named: dict[str, int]) -> str:
    """ "JPEG 97.0 %, PNG 3.0 %"."""
    whole = sum(named.values())
    return ", ".join(f"{shown(name, 20)} {percent(count / whole)}" for name, count in list(named.items())[:6])


def _keys(some: Iterable[str], count: int) -> str:
    """The first few keys, and how many more there are."""
    listed = [shown(key, 120) for key in some]
    return ", ".join(listed) + (f" and {count - len(listed):,} more" if count > len(listed) else "")


def _thumbnail(example: Example) -> Thumbnail:
    return thumbnail(example.image, shown(example.caption), SIDE)
