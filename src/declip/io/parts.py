"""Parts of an output that an array of jobs writes, in folders next to it, until one more call joins them."""

import re
from glob import escape
from pathlib import Path

from declip.errors import UserError

Part = tuple[int, int]  # number from 1 on, and number of parts

NAME = re.compile(r"\.part-(\d+)-of-(\d+)")


def parse_part(text: str | None) -> Part | None:
    """Read "3/8"; raises `UserError` for anything else but None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part is '{text}'; give the number of a part and that of all, such as 3/8.")
    return int(match[1]), int(match[2])


def part_folder(folder: Path, part: Part) -> Path:
    """The folder of a part of the output in `folder`."""
    # Next to it, so that relative paths in a part's files are those of the output.
    return folder.with_name(f"{folder.name}.part-{part[0]}-of-{part[1]}")


def span_of(part: Part | None, count: int, things: str) -> range:
    """The numbers of the things in a part, of `count` in all; raises `UserError` if there are more parts."""
    number, parts = part or (1, 1)
    if part and parts > count:
        raise UserError(f"There are only {count:,} {things} for {parts:,} parts. Give fewer parts with --part.")
    return range(count * (number - 1) // parts, count * number // parts)


def find_parts(folder: Path, marker: str) -> list[Path]:
    """The folders of all parts of an output, in order; raises `UserError` unless each is there with a file `marker`."""
    paths: dict[tuple[int, int], Path] = {}
    for path in folder.parent.glob(f"{escape(folder.name)}.part-*"):
        if match := NAME.fullmatch(path.name.removeprefix(folder.name)):
            paths[int(match[2]), int(match[1])] = path
    counts = sorted({count for count, _ in paths})
    if not counts:
        raise UserError(f"'{folder}' has no parts. Write each with --part, such as --part 1/8, and the same --out.")
    if len(counts) > 1:
        raise UserError(f"'{folder}' has parts of {' and '.join(map(str, counts))}. Remove those of all but one.")
    [count] = counts
    numbers = range(1, count + 1)
    if missing := [n for n in numbers if (count, n) not in paths or not (paths[count, n] / marker).is_file()]:
        problem = f"Part {missing[0]} of {count} is missing or not complete ({len(missing):,} in all)"
        raise UserError(f"{problem}. Write it with --part {missing[0]}/{count}.")
    return [paths[count, number] for number in numbers]
