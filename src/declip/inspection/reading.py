"""Reading many pairs into arrays of numbers, in several processes, with a progress bar."""

from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Dataset

from declip.data.pair import BrokenPair, PairSource, SkipCounter
from declip.inspection.captions import CaptionCounts, token_count
from declip.inspection.duplicates import LOOK, caption_hash, image_hash, is_blank, look
from declip.io.pool import in_order, naming_lost_workers, pairs_bar

PAIR = np.dtype(
    [
        ("place", np.int64),
        ("exact", np.uint64),
        ("look", LOOK),
        ("width", np.int32),
        ("height", np.int32),
        ("captions", np.uint16),
        ("keywords", np.uint16),
        ("blank", np.bool_),
    ]
)
"""What is kept of a pair, 112 bytes."""

CAPTION = np.dtype([("hash", np.uint64), ("tokens", np.uint32), ("words", np.uint16), ("characters", np.uint16)])
"""What is kept of a caption, 16 bytes."""

MOST_PER_PAIR = np.iinfo(np.uint16).max
"""Captions of a pair that are looked at."""

PARTS, SMALLEST_PART, LARGEST_PART = 200, 8, 512
"""Parts that the work is divided into, and how many pairs one has: small ones move the bar, many cost memory."""


@dataclass
class ReadPairs:
    """The `PAIR`s that can be used, in the order of the source, and their `CAPTION`s."""

    pairs: np.ndarray
    captions: np.ndarray
    counts: CaptionCounts = field(default_factory=CaptionCounts)
    skipped: SkipCounter = field(default_factory=SkipCounter)


def read(source: PairSource, places: np.ndarray, workers: int = 0, progress: str = "") -> ReadPairs:
    """Read the pairs at rising places, in this process where `workers` is 0; `progress` is the title of a bar."""
    step = int(np.clip(len(places) // PARTS, SMALLEST_PART, LARGEST_PART))
    parts = _Parts(source, [places[start : start + step] for start in range(0, len(places), step)])
    whole = ReadPairs(np.empty(0, PAIR), np.empty(0, CAPTION))
    pairs, captions = [whole.pairs], [whole.captions]
    # The workers start here, before the bar's own thread does: a fork copies no thread.
    stream = in_order(parts, len(parts), workers)
    with naming_lost_workers(), pairs_bar(bool(progress)) as bar:
        task = bar.add_task(progress, total=len(places))
        for part in stream:
            pairs.append(part.pairs)
            captions.append(part.captions)
            whole.counts.merge(part.counts)
            whole.skipped.merge(part.skipped)
            bar.advance(task, len(part.pairs) + part.skipped.total)
    whole.pairs, whole.captions = np.concatenate(pairs), np.concatenate(captions)
    return whole


class _Parts(Dataset):
    """Parts of the work by number."""

    def __init__(self, source: PairSource, parts: list[np.ndarray]) -> None:
        self.source, self.parts = source, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> ReadPairs:
        source, part = self.source, ReadPairs(np.empty(0, PAIR), np.empty(0, CAPTION))
        rows: list[tuple[object, ...]] = []
        lines: list[tuple[int, ...]] = []
        for place in self.parts[index].tolist():
            try:
                pair = source[place]
            except BrokenPair as broken:
                part.skipped.add(broken)
                continue
            captions = pair.captions[:MOST_PER_PAIR]
            for caption in captions:
                part.counts.add(caption)
                lines.append((caption_hash(caption), token_count(caption), len(caption.split()), len(caption)))
            seen, counts = look(pair.image), (len(captions), min(len(pair.keywords), MOST_PER_PAIR))
            exact, blank = image_hash(pair.image), is_blank(pair.image, seen)
            rows.append((place, exact, seen, *pair.image.size, *counts, blank))
        part.pairs, part.captions = np.array(rows, PAIR), np.array(lines, CAPTION)
        return part
