"""The page of an inspection: one HTML file with nothing to load from elsewhere."""

import datetime
from importlib import metadata, resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from declip.inspection.result import Example, Inspection
from declip.io.text import plural, shown
from declip.reports import inspection_tables as tables
from declip.reports.inspection_tables import caution, extent
from declip.reports.thumbnails import Picture, thumbnail

SIDE = 224
"""Pixels of a picture: sharp at 112 CSS pixels on a screen of double density."""


def page(inspection: Inspection) -> str:
    """Write the page.

    Args:
        inspection: What was found.

    Returns:
        HTML. Everything from the data is escaped, and without control characters.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["words"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    environment.filters["shown"] = shown
    environment.globals.update(tables=tables, picture=_picture)
    look = resources.files("declip.reports") / "templates" / "report.css"
    template = resources.files("declip.reports") / "templates" / "inspect.html"
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        style=Markup(look.read_text(encoding="utf-8")),
        it=inspection,
        lead=_lead(inspection),
        extent=extent(inspection),
        caution=caution(inspection),
        made=f"Written by declip {metadata.version('declip')} on {datetime.datetime.now():%d %B %Y, %H:%M}.",
    )


def _picture(example: Example) -> Picture:
    return thumbnail(example.image, shown(example.caption), SIDE)


def _lead(inspection: Inspection) -> str:
    if inspection.images is None or inspection.captions is None:
        return f"Not one of the {plural(inspection.read, 'pair')} read can be used. The reasons are below."
    mend = sum(finding.mend for finding in inspection.findings)
    first = (
        f"{plural(inspection.total, 'pair')} with {inspection.captions.per_pair.mean:.2g} captions each; images of "
        f"{inspection.images.shorter.median:,.0f} px (median of the shorter side), captions of "
        f"{inspection.captions.words.median:.0f} words."
    )
    if not mend:
        return f"{first} Nothing has to be mended before training."
    return f"{first} {plural(mend, 'thing')} to mend before training."
