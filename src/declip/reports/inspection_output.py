"""Writing what was found: JSON, the page, the sheet."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from declip.errors import UserError
from declip.inspection.result import Inspection
from declip.reports.contact_sheet import sheet
from declip.reports.inspection import page


def check_writable(paths: Iterable[Path | None]) -> None:
    """Refuse a place that cannot be written to, before any pair is read.

    Raises:
        UserError: Its folder is missing or may not be written to, or it is a folder itself.
    """
    for path in paths:
        if path is None:
            continue
        folder = path.expanduser().parent
        if path.is_dir():
            raise _refused(path, "it is a folder")
        if not folder.is_dir():
            raise _refused(path, f"there is no folder '{folder}'")
        if not os.access(folder, os.W_OK):
            raise _refused(path, f"you may not write to '{folder}'")


def write_json(inspection: Inspection, path: Path) -> None:
    """Write the numbers; raises `UserError` where that cannot be done."""
    with saved(path) as target:
        target.write_bytes(inspection.to_json().encode("utf-8", "backslashreplace"))


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page, one file that loads nothing; raises `UserError` where that cannot be done."""
    content = page(inspection)
    with saved(path) as target:
        target.write_text(content, encoding="utf-8")


def write_sheet(inspection: Inspection, path: Path) -> None:
    """Write the contact sheet as PNG; raises `UserError` where that cannot be done."""
    image = sheet(inspection)
    with saved(path) as target:
        image.save(target, "PNG")


@contextmanager
def saved(path: Path) -> Iterator[Path]:
    """Give the path to write to; raises `UserError` where that fails."""
    try:
        yield path.expanduser()
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from error


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"'{path}' cannot be written: {why}. Give another file.")
