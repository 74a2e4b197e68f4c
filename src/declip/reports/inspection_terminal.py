"""What was found, as it is printed."""

from collections.abc import Iterator

from rich.console import Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from declip.inspection.result import Inspection
from declip.io.text import shown
from declip.reports import inspection_tables as tables
from declip.reports.inspection_tables import caution, extent


def summary(inspection: Inspection) -> Group:
    """Everything that fits a terminal: numbers first, what they mean last.

    Args:
        inspection: What was found.

    Returns:
        Something that rich prints.
    """
    return Group(*_parts(inspection))


def _parts(inspection: Inspection) -> Iterator[Table | Text | Padding]:
    title = Text(shown(inspection.name), "bold")
    yield title.append(f"  {extent(inspection)} {inspection.seconds:.1f} s.", "not bold")
    parts = [*tables.spreads(inspection)]
    if inspection.images is not None:
        parts = [parts[0], tables.image_facts(inspection), parts[1], tables.caption_facts(inspection)]
        parts += [tables.frequent_captions(inspection), tables.repeats(inspection)]
    parts += [tables.overlaps(inspection), tables.reasons(inspection)]
    for rows in parts:
        if rows.rows:
            yield Padding(Text(rows.title, "bold"), (1, 0, 0, 0))
            yield _table(rows)
    if inspection.images is not None and (warning := caution(inspection)):
        yield Padding(Text(warning, "dim"), (1, 0, 0, 0))
    yield Padding(Text("What this means", "bold"), (1, 0, 0, 0))
    for finding in inspection.findings:
        mark = Text("! ", "bold red") if finding.mend else Text("· ", "bold")
        words = Text(shown(finding.text, 400)).append(f" {shown(finding.advice, 400)}", "dim")
        line = Table.grid()
        line.add_row(mark, words)
        yield line
    if not inspection.findings:
        yield Text("Nothing stands out.")


def _table(rows: tables.Rows) -> Table:
    table = Table(box=None, header_style="dim", show_header=bool(rows.columns))
    for place, name in enumerate(rows.columns or ("",) * len(rows.rows[0])):
        table.add_column(name, justify="left" if place < rows.texts else "right", overflow="fold")
    for row in rows.rows:
        table.add_row(*(escape(word) for word in row))
    return table
