"""Reading many pairs into arrays of numbers, in several processes, with a progress bar."""

from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from declip.data.images.decode import FORMATS
from declip.data.pair import BrokenPair, PairSource, SkipCounter
from declip.data.sources.folder import FolderSource
from declip.data.sources.table import TableSource
from declip.inspection.captions import CaptionCounts, token_count
from declip.inspection.fingerprint import LOOK, caption_hash, image_hash, is_blank, look
from declip.io.pool import in_order, naming_lost_workers, pairs_bar

PAIR = np.dtype(
    [
        ("place", np.int64),
        ("exact", np.uint64),
        ("look", LOOK),
        ("width", np.int32),
        ("height", np.int32),
        ("bytes", np.uint32),
        ("captions", np.uint16),
        ("keywords", np.uint16),
        ("blank", np.bool_),
    ]
)
"""What is kept of a pair, 116 bytes."""

CAPTION = np.dtype([("hash", np.uint64), ("tokens", np.uint32), ("words", np.uint16), ("characters", np.uint16)])
"""What is kept of a caption, 16 bytes."""

MOST_PER_PAIR = np.iinfo(np.uint16).max
"""Captions of a pair that are looked at."""

PARTS, SMALLEST_PART, LARGEST_PART = 200, 8, 512
"""Parts that the work is divided into, and how many pairs one has: small ones move the bar, many cost memory."""


@dataclass
class ReadPairs:
    """The numbers of the pairs read.

    Attributes:
        pairs: `PAIR`s that can be used, in the order of the source.
        captions: Their `CAPTION`s, those of the first pair first.
        formats, modes: Files by their format and mode.
        details: More about the first of each reason's examples.
    """

    pairs: np.ndarray
    captions: np.ndarray
    counts: CaptionCounts = field(default_factory=CaptionCounts)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    skipped: SkipCounter = field(default_factory=SkipCounter)
    details: dict[str, str] = field(default_factory=dict)


def read(source: PairSource, places: np.ndarray, workers: int = 0, progress: str = "") -> ReadPairs:
    """Read the pairs at rising places, in this process where `workers` is 0; `progress` is the title of a bar."""
    step = int(np.clip(len(places) // PARTS, SMALLEST_PART, LARGEST_PART))
    parts = _Parts(source, [places[start : start + step] for start in range(0, len(places), step)])
    pairs = np.zeros(len(places), PAIR)
    found, filled, captions = ReadPairs(pairs, np.empty(0, CAPTION)), 0, []
    # The workers start here, before the bar's own thread does: a fork copies no thread.
    stream = in_order(parts, len(parts), workers)
    with naming_lost_workers(), pairs_bar(bool(progress)) as bar:
        task = bar.add_task(progress, total=len(places))
        for part in stream:
            pairs[filled : filled + len(part.pairs)] = part.pairs
            filled += len(part.pairs)
            captions.append(part.captions)
            found.counts.merge(part.counts)
            found.formats.update(part.formats)
            found.modes.update(part.modes)
            first = {r: detail for r, detail in part.details.items() if r not in found.skipped.counts}
            found.details.update(first)
            found.skipped.merge(part.skipped)
            bar.advance(task, len(part.pairs) + part.skipped.total)
    found.pairs = pairs[:filled]
    if captions:
        found.captions = np.concatenate(captions)
    return found


def read_part(source: PairSource, places: np.ndarray) -> ReadPairs:
    """Read pairs one after the other, in this process."""
    rows: list[tuple[object, ...]] = []
    lines: list[tuple[int, ...]] = []
    found = ReadPairs(np.empty(0, PAIR), np.empty(0, CAPTION))
    for place in places.tolist():
        try:
            pair = source[place]
        except BrokenPair as broken:
            if broken.detail and broken.reason not in found.skipped.counts:
                found.details[broken.reason] = broken.detail
            found.skipped.add(broken)
            continue
        facts = _file_facts(source, place, pair.key)
        if facts is not None:
            found.formats[facts[0]] += 1
            found.modes[facts[1]] += 1
        captions = pair.captions[:MOST_PER_PAIR]
        for caption in captions:
            found.counts.add(caption)
            lines.append((caption_hash(caption), token_count(caption), len(caption.split()), len(caption)))
        seen = look(pair.image)
        rows.append(
            (
                place,
                image_hash(pair.image),
                seen,
                *pair.image.size,
                0 if facts is None else min(facts[2], np.iinfo(np.uint32).max),
                len(captions),
                min(len(pair.keywords), MOST_PER_PAIR),
                is_blank(pair.image, seen),
            )
        )
    found.pairs, found.captions = np.array(rows, PAIR), np.array(lines, CAPTION)
    return found


def _file_facts(source: PairSource, place: int, key: str) -> tuple[str, str, int] | None:
    """Format, mode and bytes of a pair's image file, read from its header; None where there is none."""
    raw: str | bytes | Path | None
    if isinstance(source, FolderSource):
        raw = source.path / key
    elif isinstance(source, TableSource):
        cell = source.rows.row(place).image()
        raw = source.root / cell if isinstance(cell, str) else cell
    else:
        return None
    if not raw:
        return None
    try:
        with Image.open(BytesIO(raw) if isinstance(raw, bytes) else raw, formats=FORMATS) as image:
            size = len(raw) if isinstance(raw, bytes) else Path(raw).stat().st_size
            return image.format or "unknown", image.mode, size
    except OSError:
        return None


class _Parts(Dataset):
    """Parts of the work by number."""

    def __init__(self, source: PairSource, parts: list[np.ndarray]) -> None:
        self.source, self.parts = source, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> ReadPairs:
        return read_part(self.source, self.parts[index])
