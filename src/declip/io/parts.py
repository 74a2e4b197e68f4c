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
    found: dict[int, dict[int, Path]] = {}
    for path in folder.parent.glob(f"{escape(folder.name)}.part-*"):
        if match := NAME.fullmatch(path.name.removeprefix(folder.name)):
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    if not found:
        raise UserError(f"'{folder}' has no parts. Write each with --part, such as --part 1/8, and the same --out.")
    if len(found) > 1:
        counts = " and ".join(f"{count:,}" for count in sorted(found))
        raise UserError(f"'{folder}' has parts of {counts}, of which only one can be used. Remove the others.")
    [(count, paths)] = found.items()
    if missing := [number for number in range(1, count + 1) if not (paths.get(number, folder) / marker).is_file()]:
        others = f" and {len(missing) - 1:,} others are" if len(missing) > 1 else " is"
        absent = f"Part {missing[0]} of {count}{others} missing or not complete"
        raise UserError(f"{absent}. Write it with --part {missing[0]}/{count}.")
    return [paths[number] for number in range(1, count + 1)]
