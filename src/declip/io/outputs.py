"""Files that a user names as outputs: they replace only what declip wrote itself, and never a table with captions."""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import declip
from declip.errors import UserError
from declip.io.atomic import atomic_write

CHOSEN = ("image", "caption", "coverage")  # columns of `declip choose`
CLASSIFIED = ("image", "class", "probability")  # first columns of `declip classify`

HEAD = 4_096  # bytes in which a file has its mark
MARKS = re.compile(
    rb"\x89PNG\r\n.*tEXtSoftware\0declip"
    rb'|<!doctype html>.*<meta name="generator" content="declip'
    rb'|\[?\s*\{\s*"declip": "'
    rb'|.{8}\{"__metadata__":\{"declip\.classifier"'
    rb'|\{"source": ".*"total": \d+, "indices": \[',
    re.DOTALL,
)
"""The beginnings of the images, pages, results, classifiers and lists of pairs that declip writes."""

FOREIGN = "declip did not write it, or it was changed since"


def check_outputs(paths: Iterable[Path | None]) -> None:
    """Refuse paths that cannot be written or whose file must stay, before work that takes long; None is ignored."""
    for path in filter(None, paths):
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            why = "it is a folder" if path.is_dir() else f"'{path.parent}' is not a writable folder"
            raise UserError(f"'{path}' cannot be written: {why}. Choose another file.")
        refuse_foreign(path)


def refuse_foreign(path: Path) -> None:
    """Raise a `UserError` if a file exists that declip did not write, or to which its user added something."""
    if os.path.lexists(path) and (why := _reason_to_stay(path)):
        raise UserError(f"'{path}' is not replaced: {why}. Give another file name, or delete it first.")


@contextmanager
def output_file(path: Path, option: str) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` at the end, see `atomic_write` and `refuse_foreign`."""
    refuse_foreign(path)
    with atomic_write(path, f"choose another path with {option}") as partial:
        yield partial
        refuse_foreign(path)  # again: hours may have passed, in which somebody typed captions


@contextmanager
def csv_table(path: Path, header: Iterable[str]) -> Iterator[Any]:
    """Write a table, see `output_file`; yields its csv writer."""
    options: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with output_file(path, "--out") as target, target.open("w", **options) as file:
        table = csv.writer(file)
        table.writerow(header)
        yield table


def write_output(path: Path, text: str, option: str) -> Path:
    """Write a text file, see `output_file`."""
    with output_file(path, option) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def marked_json(result: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """Serialize a result, or a list of them, after the version of declip, by which the file is recognized."""
    mark = {"declip": declip.__version__}
    marked = {**mark, **result} if isinstance(result, Mapping) else [{**mark, **row} for row in result]
    return json.dumps(marked, indent=1, ensure_ascii=False) + "\n"


def _reason_to_stay(path: Path) -> str | None:
    """Why a file must not be replaced; None if declip wrote it and nothing was added, or if it is empty."""
    if not path.is_file():
        return "it is not a file"  # a device, a pipe, a link to nowhere
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            if not head or MARKS.match(head):
                return None
        with path.open(encoding="utf-8", newline="") as text:
            rows = csv.reader(text, strict=True)
            header = tuple(next(rows))
            if header == CHOSEN:
                return _captions(rows)
            computed = header[:3] == CLASSIFIED and all(_is_computed(row, header[3:]) for row in rows)
            return None if computed else FOREIGN
    except (OSError, ValueError, csv.Error, StopIteration):
        return FOREIGN


def _captions(rows: Iterable[list[str]]) -> str | None:
    count = 0
    for _, caption, coverage in rows:
        count += bool(caption.strip())
        float(coverage)  # raises for what somebody typed
    return f"it has {count:,} captions; with --have, their images count as chosen" if count else None


def _is_computed(row: Sequence[str], classes: Sequence[str]) -> bool:
    """Whether a row has the probabilities of the classes, and the class to which the first one belongs."""
    _, best, probability, *cells = row
    given = dict(zip(classes, cells, strict=True))
    return abs(sum(map(float, cells)) - 1) < 1e-3 and given.get(best) == probability
