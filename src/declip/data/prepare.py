"""Prepare a source: lists of pairs to leave out, and shards of images at the training size (`declip data shard`)."""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from declip.data.columns import DEFAULT, Columns
from declip.data.images.decode import LazyJpeg, encode
from declip.data.pair import BrokenPair, LazyImage, PairSource, SkipCounter, printable
from declip.data.sources.names import absolute
from declip.data.sources.open import ImageSource, open_source
from declip.errors import UserError, check_range
from declip.io.atomic import ELSEWHERE, atomic_write, locked_folder, write_text
from declip.io.pool import mapped
from declip.io.text import plural

LONGEST_REASON = 80  # characters: counts are kept by reason
RECORD, SIZES, NOTICE = "prepared.json", "sizes.json", "NOTICE.txt"
LAYOUT = 3  # raised when the same options write other shards
SIZE, SHARD_PAIRS = 256, 10_000  # pixels of the shorter side: 1.15 times a view of 224, rounded
PAIRS_AT_ONCE = 16  # pairs that a worker returns together
BYTE_ORDER_MARK = "\ufeff"  # at the start of a text file it is not part of the text
QUALITY = 92  # of JPEG
FEW_COLORS = 256  # an image of at most so many is a drawing, which may be smaller as PNG, and without artifacts
LONGEST_JPEG = 65_500  # pixels, libjpeg's limit
SCALED_TO = 2  # a JPEG is decoded no smaller than this many times the result: the filter that shrinks it does the rest

_Members = list[tuple[str, bytes]]


def write_exclusions(rows: Iterable[tuple[str, int, str, float | None, str]]) -> str:
    """A list of rows with a pair's key, its index in the source, the reason, and what a reader wants to see."""
    names = ("key", "place", "reason", "cosine", "caption")
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)


def read_exclusions(path: str | Path, source: PairSource) -> dict[int, str]:
    """Read the reasons of a list by index; raises `UserError` unless the source has the list's keys there."""
    path, keys = Path(path).expanduser(), ImageSource(source)
    try:
        given = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        rows = [(str(row["key"]), int(row["place"]), printable(str(row["reason"])[:LONGEST_REASON])) for row in given]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        remedy = "Pass one that `declip app` or `declip data inspect --exclude` wrote."
        raise UserError(f"The list '{path}' cannot be read: {printable(str(error))}. {remedy}") from error
    if not rows:
        raise UserError(f"The list '{path}' names no pair.")
    for key, index, _ in rows:
        if not 0 <= index < len(source) or keys.key(index) != key:
            problem = f"The list '{path}' has '{printable(key)}' at index {index}, and '{source.name}' does not."
            raise UserError(f"{problem} Use the source that it was made from, unchanged, or make the list again.")
    return {index: reason for _, index, reason in rows}


@dataclass
class ShardedPairs:
    """The totals of a source's shards in a folder, and the source's other pairs by reason."""

    folder: Path
    pairs: int
    shards: int
    bytes: int
    skipped: SkipCounter

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
    workers: int | None = None,
    columns: Columns = DEFAULT,
    exclude: str | Path | None = None,
    progress: bool = False,
) -> ShardedPairs:
    """Write the pairs of a source as WebDataset shards 000000.tar and so on, with images no larger than needed.

    A shard has `shard_pairs` pairs of the source, in its order, without broken ones and those of other splits than
    training. A pair's key is its index in the source. sizes.json has the number of pairs of each shard, prepared.json
    the source and options, by which a repeated call continues a stopped one after its last complete shard.

    Args:
        size: Largest shorter side in pixels; no image is enlarged, and a JPEG file that is small enough is copied.
        workers: Worker processes; 0 does the work in this one, None uses one per core, 8 at most.
        exclude: A list of pairs to leave out, see `read_exclusions`; each is counted by the list's reason.
    """
    check_range("size", size, 16)
    check_range("shard_pairs", shard_pairs, 1)
    check_range("workers", workers or 0, 0)
    # --- the source, and the pairs that are left out
    opened = open_source(source, columns)
    name = absolute(source) if isinstance(source, str | Path) else opened.name
    # Shards hold no splits: a test pair among them would be trained on.
    held_out = ((name, indices) for name, indices in opened.splits().items() if name != "train")
    excluded = {index: f"split {name}" for name, indices in held_out for index in indices.tolist()}
    excluded |= {} if exclude is None else read_exclusions(exclude, opened)
    # --- what the shards depend on, and which exist
    made_of = {"layout": LAYOUT, "source": name, "size": size, "shard_pairs": shard_pairs, "pairs": len(opened)}
    made_of |= {"content": _content(opened, excluded)}
    starts = range(0, len(opened), shard_pairs)
    shards = {f"{k:06d}.tar": range(s, min(s + shard_pairs, len(opened))) for k, s in enumerate(starts)}
    with locked_folder(Path(out).expanduser(), RECORD, ELSEWHERE) as folder:
        done = _finished_shards(folder, made_of)
        missing = {name: indices for name, indices in shards.items() if name not in done}
        # --- the others, each recorded when it is complete; a folder with shards always has a record
        _record(folder, made_of, done)
        work, title = partial(_pack, opened, size, excluded), f"Pairs of {opened.name}" if progress else ""
        for name, row in _write_shards(missing, folder, work, workers, title):
            done[name] = row
            _record(folder, made_of, done)
        _record_sizes(folder, done)
        if opened.credit:
            write_text(folder / NOTICE, opened.credit + "\n")
    return _totals(folder, done, opened.name, len(opened))


def _totals(folder: Path, shards: Mapping[str, Mapping[str, Any]], source: str, count: int) -> ShardedPairs:
    """Sum the rows of all shards; raises `UserError` if they have no pair."""
    skipped = SkipCounter()
    for _, row in sorted(shards.items()):
        skipped.merge(SkipCounter.from_dict({"reasons": row["skipped"]}))
    pairs, size = (sum(row[key] for row in shards.values()) for key in ("pairs", "bytes"))
    if not pairs:
        raise UserError(f"None of the {count:,} pairs of '{source}' can be used: {skipped.explanation()}")
    return ShardedPairs(folder, pairs, len(shards), size, skipped)


def _content(source: PairSource, excluded: Mapping[int, str]) -> str:
    """Hash the list of pairs left out and, unless each shard would have to be fetched, all texts and files' stamps."""
    digest = hashlib.sha256(repr(sorted(excluded.items())).encode("utf-8", "replace"))
    for index in range(0 if source.remote else len(source)):
        try:
            captions = () if source.stamps_captions else source.captions(index)
            read = repr((captions, tuple(source.origin(index))))
        except BrokenPair as broken:
            read = broken.reason
        digest.update(read.encode("utf-8", "replace"))
    return digest.hexdigest()[:12]  # shown in an error


def _finished_shards(folder: Path, made_of: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The shards that are complete, by name, with their numbers; those of another source or option are refused."""
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        earlier, shards = dict(content["made_of"]), dict(content["shards"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' cannot be read: {error}. Remove the folder, or {ELSEWHERE}.") from error
    if changed := [key for key in sorted(made_of.keys() | earlier.keys()) if made_of.get(key) != earlier.get(key)]:
        shown = "; ".join(f"{key} was {earlier.get(key)!r}, now {made_of.get(key)!r}" for key in changed)
        raise UserError(f"'{folder}' holds shards of another source or option: {shown}. Use the same, or {ELSEWHERE}.")
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.tar")}
    return {name: row for name, row in shards.items() if sizes.get(name) == row["bytes"]}


def _write_shards(
    shards: Mapping[str, range], folder: Path, work: Callable[[range], Any], workers: int | None, title: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write shards in order while the images of the next ones are downscaled; yield the totals of each."""
    parts = {name: [p[i : i + PAIRS_AT_ONCE] for i in range(0, len(p), PAIRS_AT_ONCE)] for name, p in shards.items()}
    stream = mapped(work, [indices for own in parts.values() for indices in own], workers, title)
    for shard, indices in shards.items():
        path, skipped = folder / shard, SkipCounter()
        with atomic_write(path, ELSEWHERE) as written, tarfile.open(written, "w", format=tarfile.USTAR_FORMAT) as tar:
            for members, broken in islice(stream, len(parts[shard])):
                for name, content in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
                skipped.merge(broken)
        counts = {"pairs": len(indices) - skipped.total, "bytes": path.stat().st_size}
        yield shard, counts | {"skipped": skipped.to_dict()["reasons"]}


def _record_sizes(folder: Path, shards: Mapping[str, Any]) -> None:
    write_text(folder / SIZES, json.dumps({name: row["pairs"] for name, row in sorted(shards.items())}, indent=1))


def _record(folder: Path, made_of: Mapping[str, Any], shards: Mapping[str, Any]) -> None:
    write_text(folder / RECORD, json.dumps({"made_of": made_of, "shards": shards}, indent=1))


def _pack(source: PairSource, size: int, excluded: Mapping[int, str], indices: range) -> tuple[_Members, SkipCounter]:
    """The members of some pairs, and those that cannot be used or are excluded."""
    members, skipped = _Members(), SkipCounter()
    for index in indices:
        try:
            if index in excluded:
                raise BrokenPair(excluded[index], ImageSource(source).key(index))
            members += _members(source, size, index)
        except BrokenPair as broken:
            skipped.add(broken)
    return members, skipped


def _members(source: PairSource, size: int, index: int) -> _Members:
    """The members of one pair; raises `BrokenPair`."""
    pair = source.read_lazy(index)
    kind, image = downscaled_bytes(pair.image, size)
    if len(pair.captions) == 1 and not pair.captions[0].startswith(BYTE_ORDER_MARK):
        ending, text = "txt", pair.captions[0].encode()
    else:
        ending, text = "json", json.dumps({"caption": pair.captions}).encode()
    return [(f"{index:09d}.{kind}", image), (f"{index:09d}.{ending}", text)]


def downscaled_bytes(image: LazyImage, size: int) -> tuple[str, bytes]:
    """Encode an image as "jpg" or "png" of at most `size` pixels on its shorter side; a small JPEG file stays."""
    short = min(image.size)
    if isinstance(image, LazyJpeg) and short <= size:
        image.pixels()  # raises where the file is damaged
        return "jpg", image.content
    scale = next((scale for scale in image.scales if short >= SCALED_TO * scale * size), 1)
    decoded = Image.fromarray(image.pixels(scale))
    is_drawing = decoded.getcolors(FEW_COLORS) is not None
    if short > size:
        width, height = (max(size, round(side * size / short)) for side in image.size)
        decoded = decoded.resize((width, height), Image.Resampling.LANCZOS)
    files = [("jpg", encode(decoded, "JPEG", quality=QUALITY))] if max(decoded.size) <= LONGEST_JPEG else []
    if is_drawing or not files:
        files.append(("png", encode(decoded, "PNG", optimize=True)))
    return min(files, key=lambda file: len(file[1]))
