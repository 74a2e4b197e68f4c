"""Files that a user names as outputs: one that exists is replaced only with --overwrite."""

import csv
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import declip
from declip.errors import UserError
from declip.io.atomic import atomic_write

CARD = "README.md"  # of an export
INDEX_FILE = "index.json"  # of an index
STUDY_FILE = "study.json"  # of a comparison
CHOSEN = ("image", "caption", "coverage")  # columns of `declip choose`
CLASSIFIED = ("image", "class", "probability")  # first columns of `declip classify`


def check_outputs(paths: Iterable[Path | None], overwrite: bool = False) -> None:
    """Refuse paths that cannot be written or that exist, before work that takes long; None is ignored."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            why = f"'{path.parent}' is not a writable folder"
            if path.is_dir():
                why = "it is a folder"
            raise UserError(f"'{path}' cannot be written: {why}. Choose another file.")
        refuse_existing(path, overwrite)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise a `UserError` if a path exists, also as a pipe or a broken link, unless it may be overwritten."""
    if os.path.lexists(path) and not overwrite:
        raise UserError(
            f"'{path}' exists. Give another name, or --overwrite (in Python overwrite=True)."
        )


def check_folder(
    folder: Path,
    marker: str = "",
    ignored: Collection[str] = (),
    remedy: str = "Choose another --out.",
) -> None:
    """Refuse a path that is not a folder, and a folder with files unless one is `marker`; a new one passes."""
    # os.path, because a path that is too long makes pathlib raise
    if not os.path.exists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder. {remedy}")
    names = {path.name for path in folder.iterdir() if path.name[0] != "."}
    others = names.difference(ignored)
    if others and marker not in others:
        raise UserError(f"'{folder}' has other files, such as '{min(others)}'. {remedy}")


def check_export(out: Path, overwrite: bool) -> None:
    """Refuse a folder with files; with `overwrite` an export may be replaced."""
    remedy = "Give another --out, or --overwrite to replace an export."
    card = out / CARD
    if overwrite and os.path.isfile(card) and b"written by declip" in card.read_bytes():
        return
    if overwrite:
        remedy = "It is not an export, so --overwrite does not replace it. Give another --out."
    check_folder(out, remedy=remedy)


def png_path(given: Path | None, option: str) -> Path | None:
    """Return the path of an image to write; raises `UserError` if its name is not that of a PNG."""
    if given is not None and given.suffix.lower() != ".png":
        raise UserError(
            f"Images are written as PNG, not as '{given.name}'. Give {option} a name that ends in .png."
        )
    return given


@contextmanager
def output_file(path: Path, option: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` at the end, see `atomic_write` and `refuse_existing`."""
    refuse_existing(path, overwrite)
    with atomic_write(path, f"choose another path with {option}") as partial:
        yield partial
        refuse_existing(path, overwrite)  # again: hours may have passed


@contextmanager
def csv_table(path: Path, header: Iterable[str], overwrite: bool = False) -> Iterator[Any]:
    """Write a table, see `output_file`; yields its csv writer."""
    with (
        output_file(path, "--out", overwrite) as target,
        target.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        table = csv.writer(file)
        table.writerow(header)
        yield table


def write_output(path: Path, text: str, option: str, overwrite: bool = False) -> Path:
    """Write a text file, see `output_file`."""
    with output_file(path, option, overwrite) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def result_json(result: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """Serialize a result, or a list of them, after the version of declip."""
    version = {"declip": declip.__version__}
    if isinstance(result, Mapping):
        tree: Any = {**version, **result}
    else:
        tree = [{**version, **row} for row in result]
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
