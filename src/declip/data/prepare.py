"""Sharding of a source (`declip data shard`): images downscaled once to the size that training needs, in tar shards."""

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from declip.data.exclude import match_exclusions, read_exclusions
from declip.data.images.shrink import SIZE, downscaled_bytes
from declip.data.pair import BrokenPair, PairSource, SkipCounter, printable
from declip.data.sources.image_source import ImageSource
from declip.data.sources.open import open_source
from declip.data.sources.shards import LARGEST_IMAGE, LARGEST_TEXT
from declip.errors import UserError, check_range
from declip.io.atomic import atomic_write, locked_folder
from declip.io.pool import in_order, naming_lost_workers, pairs_bar, usual_workers
from declip.io.text import plural

log = logging.getLogger("declip")

RECORD, SIZES, NOTICE = "prepared.json", "sizes.json", "NOTICE.txt"
LAYOUT = 1  # raised when the same options make other shards

SHARD_PAIRS = 10_000
QUALITY = 92
PAIRS_AT_ONCE = 16  # pairs that a process hands over together

ELSEWHERE = "choose another folder with --out"
BYTE_ORDER_MARK = "\ufeff"  # at the start of a text file it would not count as text


@dataclass
class ShardedPairs:
    """The totals of a source's shards in a folder, and the source's other pairs by reason."""

    folder: Path
    pairs: int
    shards: int
    bytes: int
    skipped: SkipCounter = field(default_factory=SkipCounter)

    def summary(self) -> str:
        """One line for the shards, and one for each reason of pairs left out."""
        totals = f"{plural(self.pairs, 'pair')}, {plural(self.shards, 'shard')}, {self.bytes / 1e6:,.1f} MB"
        return "\n".join([f"Ready: {self.folder}: {totals}", *(f"Left out: {line}" for line in self.skipped.lines())])


def shard_source(
    source: str | Path | PairSource,
    out: str | Path,
    *,
    size: int = SIZE,
    shard_pairs: int = SHARD_PAIRS,
    quality: int = QUALITY,
    workers: int | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    keyword_column: str = "keywords",
    image_root: str | Path | None = None,
    exclude: str | Path | None = None,
    progress: bool = False,
) -> ShardedPairs:
    """Write the pairs of a source as WebDataset shards with images no larger than needed.

    The shards are 000000.tar and so on, `shard_pairs` pairs of the source each, in its order; broken pairs are left out
    and counted. A pair's key is its index in the source. Its captions are a .txt file where there is one caption and no
    keyword, else a .json file. sizes.json has the number of pairs of each shard, prepared.json the source and options.
    A stopped call continues after the last complete shard when it is repeated.

    Args:
        source: A source, or its name for `open_source`, which takes the columns and `image_root`.
        size: Largest shorter side in pixels, at least 16. No image is enlarged; a JPEG file that is small enough is
            copied.
        quality: Quality of the JPEG files, 1 to 100.
        workers: Worker processes; 0 does the work in this one, None uses one per core, 8 at most.
        exclude: A list of pairs to leave out, see `read_exclusions`; each is counted by the list's reason.
    """
    check_range("size", size, 16)
    check_range("shard_pairs", shard_pairs, 1)
    check_range("quality", quality, 1, 100)
    check_range("workers", workers or 0, 0)
    columns = {"image_column": image_column, "caption_column": caption_column, "keyword_column": keyword_column}
    if isinstance(source, PairSource):
        opened, name = source, source.name
    else:
        opened, name = open_source(source, image_root=image_root, **columns), _absolute(source)
    excluded = {} if exclude is None else _excluded(opened, exclude)
    made_of = {
        "layout": LAYOUT,
        "source": name,
        "pairs": len(opened),
        "size": size,
        "quality": quality,
        "shard_pairs": shard_pairs,
        **columns,
        "image_root": None if image_root is None else _absolute(image_root),
        "exclude": hashlib.sha256(json.dumps(sorted(excluded.items())).encode()).hexdigest() if excluded else None,
    }
    starts = range(0, len(opened), shard_pairs)
    shards = {f"{k:06d}.tar": range(s, min(s + shard_pairs, len(opened))) for k, s in enumerate(starts)}
    with locked_folder(Path(out).expanduser(), RECORD, ELSEWHERE) as folder:
        record = _Record(folder, made_of)
        missing = {name: places for name, places in shards.items() if not record.has(name)}
        _write_shards(missing, record, _Packer(opened, size, quality, excluded), workers, progress)
        pairs = {name: row["pairs"] for name, row in sorted(record.shards.items())}
        record.write(SIZES, json.dumps(pairs, indent=1))
        if opened.credit:
            record.write(NOTICE, opened.credit + "\n")
    total = ShardedPairs(folder, sum(pairs.values()), len(pairs), sum(row["bytes"] for row in record.shards.values()))
    for name in pairs:
        total.skipped.merge(SkipCounter.from_dict({"reasons": record.shards[name]["skipped"]}))
    if not total.pairs:
        explained = total.skipped.explanation()
        raise UserError(f"None of the {len(opened):,} pairs of '{opened.name}' can be used: {explained}")
    return total


def _write_shards(
    shards: Mapping[str, range], record: "_Record", packer: "_Packer", workers: int | None, progress: bool
) -> None:
    """Write shards one after the other, while the images of the next ones are downscaled."""
    parts = {name: [p[i : i + PAIRS_AT_ONCE] for i in range(0, len(p), PAIRS_AT_ONCE)] for name, p in shards.items()}
    packer.parts = [places for own in parts.values() for places in own]
    stream: Iterator[tuple[_Members, SkipCounter]] = in_order(
        packer, len(packer.parts), usual_workers() if workers is None else workers
    )
    with naming_lost_workers(), pairs_bar(progress) as bar:
        task = bar.add_task(f"Pairs of {packer.source.name}", total=sum(map(len, packer.parts)))
        for shard, places in shards.items():
            skipped = SkipCounter()
            path = record.folder / shard
            with (
                atomic_write(path, ELSEWHERE) as partial,
                tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                for part in parts[shard]:
                    members, broken = next(stream)
                    for name, content in members:
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
                    skipped.merge(broken)
                    bar.advance(task, len(part))
            record.add(shard, len(places) - skipped.total, path.stat().st_size, skipped)


_Members = list[tuple[str, bytes]]


class _Packer(Dataset):
    """Turns parts of a source into members of a shard, in worker processes."""

    def __init__(self, source: PairSource, size: int, quality: int, excluded: Mapping[int, str]) -> None:
        self.source, self.size, self.quality, self.excluded = source, size, quality, excluded
        self.parts: list[range] = []

    def __getitem__(self, number: int) -> tuple[_Members, SkipCounter]:
        members, skipped = _Members(), SkipCounter()
        for place in self.parts[number]:
            try:
                members += self.files(place)
            except BrokenPair as broken:
                skipped.add(broken)
        return members, skipped

    def files(self, place: int) -> _Members:
        """The members of one pair; raises `BrokenPair`, also where it is excluded."""
        if place in self.excluded:
            raise BrokenPair(self.excluded[place], ImageSource(self.source).key(place))
        pair = self.source.read_lazy(place)
        kind, image = downscaled_bytes(pair.image, self.size, self.quality)
        if len(pair.captions) == 1 and not pair.keywords and not pair.captions[0].startswith(BYTE_ORDER_MARK):
            ending, text = "txt", pair.captions[0].encode()
        else:
            ending, text = "json", json.dumps({"caption": pair.captions, "keywords": pair.keywords}).encode()
        if len(image) > LARGEST_IMAGE:
            raise BrokenPair("image too large", pair.key, f"{len(image):,} bytes, at most {LARGEST_IMAGE:,}")
        if len(text) > LARGEST_TEXT:
            raise BrokenPair("caption too long", pair.key, f"{len(text):,} bytes together, at most {LARGEST_TEXT:,}")
        return [(f"{place:09d}.{kind}", image), (f"{place:09d}.{ending}", text)]


class _Record:
    """The finished shards of a folder, their source and options; prepared.json is rewritten after each shard."""

    def __init__(self, folder: Path, made_of: dict[str, Any]) -> None:
        self.folder, self.made_of = folder, made_of
        self.shards: dict[str, dict[str, Any]] = {}
        path = folder / RECORD
        if path.exists():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                earlier, self.shards = dict(content["made_of"]), dict(content["shards"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"'{path}' cannot be read: {error}. Remove the folder, or {ELSEWHERE}.") from error
            changed = [key for key in sorted(made_of.keys() | earlier.keys()) if made_of.get(key) != earlier.get(key)]
            if changed:
                shown = "; ".join(f"{key} was {earlier.get(key)!r}, now {made_of.get(key)!r}" for key in changed)
                raise UserError(
                    f"'{folder}' holds shards of another source or option: {shown}. Give the same, or {ELSEWHERE}."
                )
        self.save()  # before the first shard, so that a folder with shards always has one

    def has(self, name: str) -> bool:
        path = self.folder / name
        return name in self.shards and path.is_file() and path.stat().st_size == self.shards[name]["bytes"]

    def add(self, name: str, pairs: int, size: int, skipped: SkipCounter) -> None:
        self.shards[name] = {"pairs": pairs, "bytes": size, "skipped": skipped.to_dict()["reasons"]}
        self.save()

    def save(self) -> None:
        self.write(RECORD, json.dumps({"made_of": self.made_of, "shards": self.shards}, indent=1))

    def write(self, name: str, text: str) -> None:
        with atomic_write(self.folder / name, ELSEWHERE) as partial:
            partial.write_text(text, encoding="utf-8")


def _excluded(source: PairSource, path: str | Path) -> dict[int, str]:
    """The reason by index of a list's pairs."""
    matched = match_exclusions(source, read_exclusions(path))
    if not matched.reasons:
        raise UserError(
            f"None of the pairs that '{path}' names is in '{source.name}', such as '{printable(matched.missing[0])}'. "
            "Keys are paths below the source, for most sources: give the source that the list was made of."
        )
    if matched.missing:
        count, first = f"{len(matched.missing):,}", printable(matched.missing[0])
        log.warning("%s keys of '%s' are not in '%s', such as '%s'.", count, path, source.name, first)
    return matched.reasons


def _absolute(name: str | Path) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else str(name)
