"""Pairs of any source made ready for training once: pictures shrunk to what a view needs, in tar shards."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch.utils.data import Dataset

from declip.data.checks import check_range
from declip.data.exclude import find_dropped, read_drop_list
from declip.data.images.lazy import read_lazy
from declip.data.images.shrink import SIZE, downscaled_bytes
from declip.data.pair import BrokenPair, PairSource, SkipCounter, printable
from declip.data.sources.image_source import ImageSource
from declip.data.sources.open import open_source
from declip.data.sources.shards import LARGEST_IMAGE, LARGEST_TEXT
from declip.errors import UserError
from declip.io.atomic import atomic_write, remove
from declip.io.pool import in_order, naming_lost_workers, pairs_bar, usual_workers

log = logging.getLogger("declip")

RECORD, SIZES, NOTICE, LOCK = "prepared.json", "sizes.json", "NOTICE.txt", ".lock"
LAYOUT = 1
"""Raised when the same options make other shards."""

SHARD_PAIRS = 10_000
QUALITY = 92
MOST_SHARDS = 1_000_000
PAIRS_AT_ONCE = 16
"""Pairs that a process hands over together."""

ELSEWHERE = "choose another folder with --out"
BYTE_ORDER_MARK = "\ufeff"
"""At the start of a text file it would be taken for no part of the text."""


@dataclass
class Prepared:
    """Shards that were made.

    Attributes:
        folder: Where they are; `open_source` opens it.
        pairs: Pairs in them.
        shards: How many there are.
        bytes: Of all shards.
        skipped: The source's other pairs, by reason.
    """

    folder: Path
    pairs: int = 0
    shards: int = 0
    bytes: int = 0
    skipped: SkipCounter = field(default_factory=SkipCounter)

    def summary(self) -> str:
        """What was made and what was left out, in a line each."""
        shards = f"{self.shards:,} shard{'s' if self.shards > 1 else ''}"
        lines = [f"Ready: {self.folder}: {self.pairs:,} pairs, {shards}, {self.bytes / 1e6:,.1f} MB"]
        for reason, row in self.skipped.to_dict()["reasons"].items():
            lines.append(f"Left out: {row['count']:,} × {reason}, such as {', '.join(row['examples'])}")
        return "\n".join(lines)


def prepare_source(
    source: str | Path | PairSource,
    out: str | Path,
    *,
    size: int = SIZE,
    shard_pairs: int = SHARD_PAIRS,
    quality: int = QUALITY,
    workers: int | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    image_root: str | Path | None = None,
    drop: str | Path | None = None,
    progress: bool = False,
) -> Prepared:
    """Write the pairs of a source as WebDataset shards with pictures no larger than needed.

    The shards are 000000.tar and so on, `shard_pairs` pairs of the source each, in its order; a pair that cannot be
    used is left out and counted. A pair's key is its place in the source. Its captions are a .txt file where there is
    one and no keyword, else a .json file. Besides there are sizes.json, the pairs of each shard, and prepared.json,
    what was made of what. Stopped and called again with the same arguments, it goes on after the last whole shard.

    Args:
        source: A source, or what `open_source` opens.
        out: The folder to write to.
        size: Pixels of the shorter side at most; a larger picture is shrunk, none is enlarged. A JPEG file that is
            small enough is copied as it is.
        shard_pairs: Pairs of the source in a shard.
        quality: Of the JPEG files written, 1 to 100.
        workers: Processes that shrink; 0 does it in this one, None takes one for each core, 8 at most.
        image_column: As `open_source` has it; so for the two that follow.
        caption_column: For tables.
        image_root: For tables.
        drop: A list of pairs to leave out, as `read_drop_list` reads it; each is counted by the list's reason.
        progress: Show a progress bar.

    Raises:
        UserError: There is no such source or list, no pair of the list is in the source, an option is out of its range,
            no pair can be used, or the folder holds something else, the shards of another source or other options, or
            cannot be written to.
    """
    check_range("size", size, 16)
    check_range("shard_pairs", shard_pairs, 1)
    check_range("quality", quality, 1, 100)
    workers = usual_workers() if workers is None else workers
    check_range("workers", workers, 0)
    opened = (
        open_source(source, image_column=image_column, caption_column=caption_column, image_root=image_root)
        if isinstance(source, str | Path)
        else source
    )
    starts = range(0, len(opened), shard_pairs)
    if len(starts) > MOST_SHARDS:
        raise UserError(f"shard_pairs={shard_pairs} makes {len(starts):,} shards, more than {MOST_SHARDS:,}.")
    dropped = {} if drop is None else _dropped(opened, drop)
    made_of = {
        "layout": LAYOUT,
        "source": _name(source),
        "pairs": len(opened),
        "size": size,
        "quality": quality,
        "shard_pairs": shard_pairs,
        "image_column": image_column,
        "caption_column": caption_column,
        "image_root": None if image_root is None else _name(image_root),
        "drop": _digest(dropped) if dropped else None,
    }
    with _held(Path(out).expanduser()) as folder:
        record = _Record(folder, made_of)
        record.save()
        shards = [_Shard(f"{k:06d}.tar", range(s, min(s + shard_pairs, len(opened)))) for k, s in enumerate(starts)]
        missing = [shard for shard in shards if not record.has(shard.name)]
        _make(missing, record, _Maker(opened, size, quality, dropped), workers, progress)
        record.finish(getattr(opened, "credit", ""))
    prepared = record.total()
    if not prepared.pairs:
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in sorted(prepared.skipped.counts.items()))
        raise UserError(f"None of the {len(opened):,} pairs of '{opened.name}' can be used: {reasons}.")
    return prepared


@dataclass(frozen=True)
class _Shard:
    name: str
    places: range

    def parts(self) -> list[range]:
        """The places in parts of a process's work."""
        return [self.places[start : start + PAIRS_AT_ONCE] for start in range(0, len(self.places), PAIRS_AT_ONCE)]


def _make(shards: Sequence[_Shard], record: _Record, maker: _Maker, workers: int, progress: bool) -> None:
    """Make shards one after the other; the pictures of the next ones are shrunk meanwhile."""
    source = maker.source
    parts = [shard.parts() for shard in shards]
    jobs = _Jobs(maker, [places for own in parts for places in own])
    stream: Iterator[_Part] = in_order(jobs, len(jobs.parts), workers)
    with naming_lost_workers(), pairs_bar(progress) as bar:
        done = len(source) - sum(map(len, jobs.parts))
        task = bar.add_task(f"Pairs of {source.name}", total=len(source), completed=done)
        for shard, own in zip(shards, parts, strict=True):
            skipped = SkipCounter()
            path = record.folder / shard.name
            with (
                atomic_write(path, ELSEWHERE) as beside,
                tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                for part, places in zip(islice(stream, len(own)), own, strict=True):
                    for name, content in part.members:
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
                    skipped.merge(part.skipped)
                    bar.advance(task, len(places))
            record.add(shard.name, len(shard.places) - skipped.total, path.stat().st_size, skipped)


@dataclass
class _Part:
    """Some pairs as members of a shard, in order."""

    members: list[tuple[str, bytes]] = field(default_factory=list)
    skipped: SkipCounter = field(default_factory=SkipCounter)


@dataclass(frozen=True)
class _Maker:
    """Makes members of a shard of pairs."""

    source: PairSource
    size: int
    quality: int
    dropped: Mapping[int, str]

    def part(self, places: range) -> _Part:
        """Those of the pairs at some places."""
        made = _Part()
        for place in places:
            try:
                made.members += self.members(place)
            except BrokenPair as broken:
                made.skipped.add(broken)
        return made

    def members(self, place: int) -> list[tuple[str, bytes]]:
        """Those of one pair; raises `BrokenPair`, also where it is to be dropped."""
        if place in self.dropped:
            raise BrokenPair(self.dropped[place], ImageSource(self.source).key(place), "on the list")
        pair = read_lazy(self.source, place)
        image, content = downscaled_bytes(pair.picture, self.size, self.quality)
        text, said = _written(pair.captions, pair.keywords)
        if len(content) > LARGEST_IMAGE:
            raise BrokenPair("image too large", pair.key, f"{len(content):,} bytes, at most {LARGEST_IMAGE:,}")
        if len(said) > LARGEST_TEXT:
            raise BrokenPair("caption too long", pair.key, f"{len(said):,} bytes in all, at most {LARGEST_TEXT:,}")
        return [(f"{place:09d}.{image}", content), (f"{place:09d}.{text}", said)]


class _Jobs(Dataset):
    """The parts as worker processes do them."""

    def __init__(self, maker: _Maker, parts: Sequence[range]) -> None:
        self.maker, self.parts = maker, parts

    def __getitem__(self, number: int) -> _Part:
        return self.maker.part(self.parts[number])


def _written(captions: tuple[str, ...], keywords: tuple[str, ...]) -> tuple[str, bytes]:
    """The captions as the end of a file's name and its content."""
    if len(captions) == 1 and not keywords and not captions[0].startswith(BYTE_ORDER_MARK):
        return "txt", captions[0].encode()
    return "json", json.dumps({"caption": captions, "keywords": keywords}).encode()


class _Record:
    """What has been made in a folder, and of what; kept in prepared.json, which is written anew with each shard."""

    def __init__(self, folder: Path, made_of: dict[str, Any]) -> None:
        self.folder, self.made_of = folder, made_of
        self._shards: dict[str, dict[str, Any]] = {}
        path = folder / RECORD
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            earlier, self._shards = dict(found["made_of"]), dict(found["shards"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{path}' cannot be read: {error}. Remove the folder, or {ELSEWHERE}.") from error
        changed = [key for key in sorted(made_of.keys() | earlier.keys()) if made_of.get(key) != earlier.get(key)]
        if changed:
            shown = "; ".join(f"{key} was {earlier.get(key)!r}, now {made_of.get(key)!r}" for key in changed)
            raise UserError(
                f"'{folder}' holds shards of another source or option: {shown}. Give the same, or {ELSEWHERE}."
            )

    def has(self, name: str) -> bool:
        """Whether a shard is there and whole."""
        path = self.folder / name
        return name in self._shards and path.is_file() and path.stat().st_size == self._shards[name]["bytes"]

    def add(self, name: str, pairs: int, size: int, skipped: SkipCounter) -> None:
        """Keep what was made."""
        self._shards[name] = {"pairs": pairs, "bytes": size, "skipped": skipped.to_dict()["reasons"]}
        self.save()

    def save(self) -> None:
        """Write the record; before the first shard too, so that a folder with shards always has one."""
        self._write(RECORD, json.dumps({"made_of": self.made_of, "shards": self._shards}, indent=1))

    def finish(self, credit: str) -> None:
        """Write what goes beside the shards once all are there."""
        self._write(SIZES, json.dumps({name: row["pairs"] for name, row in sorted(self._shards.items())}, indent=1))
        if credit:
            self._write(NOTICE, credit + "\n")

    def total(self) -> Prepared:
        """All shards together."""
        total = Prepared(self.folder, shards=len(self._shards))
        for _, row in sorted(self._shards.items()):
            total.pairs += row["pairs"]
            total.bytes += row["bytes"]
            total.skipped.merge(SkipCounter.from_dict({"reasons": row["skipped"]}))
        return total

    def _write(self, name: str, text: str) -> None:
        with atomic_write(self.folder / name, ELSEWHERE) as beside:
            beside.write_text(text, encoding="utf-8")


@contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """Keep a folder for this process, made where it is not there, without what a killed process left in it."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
        if others and RECORD not in others:
            raise UserError(f"'{folder}' already holds something else, such as '{others[0]}'; {ELSEWHERE}.")
        lock.acquire()
    except Timeout as error:
        raise UserError(f"Another process is preparing '{folder}'. Wait for it, or {ELSEWHERE}.") from error
    except OSError as error:
        raise UserError(f"'{folder}' cannot be written: {error.strerror}. Mend that, or {ELSEWHERE}.") from error
    try:
        for left in folder.glob(".*.partial"):
            remove(left)
        yield folder
    finally:
        lock.release()


def _dropped(source: PairSource, drop: str | Path) -> dict[int, str]:
    """The places that a list leaves out, and why; raises `UserError` where it names none of the source's pairs."""
    found = find_dropped(source, read_drop_list(drop))
    if not found.reasons:
        raise UserError(
            f"None of the pairs that '{drop}' names is in '{source.name}', such as '{printable(found.missing[0])}'. "
            "Keys are paths below the source, for most sources: give the source that the list was made of."
        )
    if found.missing:
        log.warning(
            "%s keys of '%s' are not in '%s', such as '%s'.",
            f"{len(found.missing):,}",
            drop,
            source.name,
            printable(found.missing[0]),
        )
    return found.reasons


def _digest(dropped: Mapping[int, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(dropped.items())).encode()).hexdigest()


def _name(source: str | Path | PairSource) -> str:
    """What tells a source from another one: a file's or folder's whole path, else the word as given."""
    if not isinstance(source, str | Path):
        return source.name
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else str(source)
