"""The numbers of an inspection as words in rows, for the terminal and the page."""

from collections.abc import Iterable
from dataclasses import dataclass

from declip.inspection.result import Histogram, Inspection, Repeats, Share, Spread
from declip.io.text import about, percent, plural, shown

SHOWN_PERCENTILES = (5, 25, 50, 75, 95)
LISTED = 10


@dataclass(frozen=True)
class Rows:
    """Words in rows.

    Attributes:
        title: Above them.
        columns: Their names; empty for facts that need none.
        rows: As many words as columns.
        texts: How many of the first columns are words; the others are numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1


def spreads(inspection: Inspection) -> list[Rows]:
    """How sizes and lengths are distributed."""
    images, captions = inspection.images, inspection.captions
    if images is None or captions is None:
        return []
    columns = ("least", *("median" if at == 50 else f"{at} %" for at in SHOWN_PERCENTILES), "most")
    pictures = {"width, px": images.width, "height, px": images.height, "shorter side, px": images.shorter}
    pictures["longer / shorter"] = images.aspect
    if images.bytes is not None:
        pictures["file, kB"] = images.bytes
    texts = {"words": captions.words, "characters": captions.characters, "CLIP tokens": captions.tokens}
    texts["captions a pair"] = captions.per_pair
    return [
        Rows("Image sizes", ("", *columns), tuple(_spread(name, each) for name, each in pictures.items())),
        Rows("Caption lengths", ("", *columns), tuple(_spread(name, each) for name, each in texts.items())),
    ]


def _spread(name: str, spread: Spread) -> tuple[str, ...]:
    values = (spread.least, *(spread.at(at) for at in SHOWN_PERCENTILES), spread.most)
    if name == "file, kB":
        return (name, *(f"{value / 1000:,.3g}" if value < 1e6 else f"{value / 1000:,.0f}" for value in values))
    if name == "longer / shorter":
        return (name, *(f"{value:.2f}" for value in values))
    return (name, *(f"{value:,.0f}" for value in values))


def image_facts(inspection: Inspection) -> Rows:
    """Shares of the images."""
    images = inspection.images
    assert images is not None
    rows = [
        (f"shorter side under {images.size} px", share(images.smaller)),
        ("more than 3 times as long as wide", share(images.long)),
        ("a single color", share(images.blank)),
    ]
    if images.formats:
        rows += [("formats", counts(images.formats)), ("modes", counts(images.modes))]
    return Rows("Images", (), tuple(rows), 2)


def caption_facts(inspection: Inspection) -> Rows:
    """Shares of the captions."""
    captions = inspection.captions
    assert captions is not None
    rows = [(f"longer than {at} tokens", share(each)) for at, each in captions.cut.items()]
    for kind, each in captions.kinds.items():
        examples = ", ".join(f"“{shown(text, 40)}”" for text in captions.examples[kind])
        rows.append((kind, f"{share(each)}: {examples}"))
    if captions.scripts:
        rows.append(("scripts", counts(captions.scripts)))
    rows.append(
        (f"equal captions in a batch of {captions.batch}", f"{about(captions.equal_in_batch)} couples expected")
    )
    if inspection.keywords is not None and inspection.keywords.count:
        rows.append(("pairs with keywords", f"{share(inspection.keywords)}; {inspection.keywords_per_pair:.1f} a pair"))
    return Rows("Captions", (), tuple(rows), 2)


def frequent_captions(inspection: Inspection) -> Rows:
    """The commonest captions."""
    captions = inspection.captions
    rows = () if captions is None else captions.frequent
    return Rows("Commonest captions", ("caption", "pairs"), tuple((shown(text, 60), f"{n:,}") for text, n in rows))


def common_words(inspection: Inspection) -> Rows:
    """The commonest words."""
    captions = inspection.captions
    rows = () if captions is None else captions.common_words
    return Rows("Commonest words", ("word", "captions"), tuple((shown(text, 40), f"{n:,}") for text, n in rows))


def repeats(inspection: Inspection) -> Rows:
    """What comes more than once."""
    named = {
        "equal images": inspection.equal_images,
        "images that look alike": inspection.near_images,
        "equal captions": inspection.equal_captions,
    }
    columns: tuple[str, ...] = ("", "pairs", "share", "groups", "largest", "surplus")
    if not inspection.whole:
        columns = (*columns, "couples in the whole, about")
    rows = [(name, *_repeat(each, inspection)) for name, each in named.items() if each is not None]
    return Rows("Come more than once", columns, tuple(rows))


def _repeat(each: Repeats, inspection: Inspection) -> tuple[str, ...]:
    largest = each.examples[0].size if each.examples else 0
    part = percent(each.members / inspection.usable)
    found = (f"{each.members:,}", part, f"{each.groups:,}", f"{largest:,}", f"{each.surplus:,}")
    return found if inspection.whole else (*found, about(each.expected) if each.coincidences else "none seen")


def groups(title: str, each: Repeats) -> Rows:
    """The largest groups with their keys."""
    rows = tuple((f"{g.size:,} ×", shown(g.caption, 60), keys(g.keys, g.size)) for g in each.examples)
    return Rows(title, ("", "first caption", "keys"), rows, 3)


def overlaps(inspection: Inspection) -> Rows:
    """Images that other sources have too."""
    rows = tuple(
        (each.name, f"{each.images:,}", share(each.found), keys(each.keys, each.found.count))
        for each in inspection.overlaps
    )
    return Rows("Images that look like one of another source", ("source", "its images", "pairs", "keys"), rows, 4)


def reasons(inspection: Inspection) -> Rows:
    """Pairs that cannot be used, by reason."""
    ordered = sorted(inspection.reasons.items(), key=lambda item: -item[1]["count"])
    rows = tuple((reason, f"{row['count']:,}", keys(row["examples"], row["count"])) for reason, row in ordered)
    return Rows("Cannot be used", ("reason", "pairs", "such as"), rows, 3)


def bars(histogram: Histogram) -> list[tuple[str, int, float]]:
    """Label, count and share of the longest for each bar, those before the first and after the last left out."""
    filled = [place for place, count in enumerate(histogram.counts) if count]
    top, labels = max(histogram.counts), histogram.labels()
    return [(labels[at], histogram.counts[at], histogram.counts[at] / top) for at in range(filled[0], filled[-1] + 1)]


def share(each: Share) -> str:
    """ "3.1 %", and the interval where a sample was read."""
    text = percent(each.value)
    return text if each.low == each.high else f"{text} ({percent(each.low)} to {percent(each.high)})"


def counts(named: dict[str, int]) -> str:
    """ "JPEG 97.0 %, PNG 3.0 %"."""
    whole = sum(named.values())
    return ", ".join(f"{shown(name, 20)} {percent(count / whole)}" for name, count in list(named.items())[:6])


def keys(some: Iterable[str], count: int) -> str:
    """The first few keys, and how many more there are."""
    listed = [shown(key, 60) for key in some]
    more = count - len(listed)
    return ", ".join(listed) + (f" and {more:,} more" if more > 0 else "")


def extent(inspection: Inspection) -> str:
    """How much of the source was read."""
    if inspection.whole:
        return (
            f"All {plural(inspection.total, 'pair')} were read." if inspection.total > 1 else "Its one pair was read."
        )
    return f"{inspection.read:,} of {inspection.total:,} pairs were read, drawn with seed {inspection.seed}."


def caution(inspection: Inspection) -> str:
    """What a sample cannot know; empty when the whole was read."""
    if inspection.whole:
        return ""
    both = inspection.read * (inspection.read - 1) / (inspection.total * (inspection.total - 1))
    return (
        f"A sample misses duplicates: of two equal pairs both are in it with a chance of {about(100 * both)} % only. "
        "So the pairs and groups counted here are too few for the whole source, and the couples in the whole a rough "
        "estimate; read all of it (--all) to count them."
    )
