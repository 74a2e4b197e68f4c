"""Tables for the terminal."""

from rich.markup import escape
from rich.table import Table as RichTable

from declip.reports.page import Table


def rich_table(table: Table) -> RichTable:
    """A table that rich prints; words of the data are no markup."""
    printed = RichTable(box=None, header_style="dim", show_header=bool(table.columns))
    for place, name in enumerate(table.columns or ("",) * len(table.rows[0])):
        printed.add_column(escape(name), justify="left" if place < table.texts else "right", overflow="fold")
    for row in table.rows:
        printed.add_row(*(escape(word) for word in row))
    return printed
