"""Embed a source: write the vectors of its images in parts, so that a killed call continues where it stopped."""

import hashlib
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.data.columns import DEFAULT, Columns
from declip.data.pair import BrokenPair, LazyImage, LazyPair, Origin, PairSource, SkipCounter
from declip.data.sources.open import ImageSource, open_source
from declip.data.sources.python_items import Items
from declip.data.sources.shard_files import relative, stored_path
from declip.errors import UserError, check_range, unknown
from declip.evaluation.encode import Encoder, encode_batches, text_features
from declip.interchange.read import load
from declip.io.parts import Part, part_folder, span_of
from declip.io.pool import pairs_bar
from declip.models.inference import Engine, Precision, precision_of
from declip.search.index import Index
from declip.search.info import Dtype, IndexInfo, PartInfo, SourceInfo
from declip.search.store import PART_ROWS, Block, IndexedImage, hash64
from declip.search.writer import Writer, describe_model, open_writer

log = logging.getLogger("declip")


def embed(
    model: str | Path | Encoder,
    source: str | Path | PairSource | Items,
    *,
    out: str | Path,
    captions: bool = False,
    dtype: Dtype = "float16",
    batch_size: int = 256,
    workers: int | None = None,
    columns: Columns = DEFAULT,
    device: str = "auto",
    precision: Precision = "auto",
    engine: Engine = "torch",
    loaded_from: str | Path = "",
    part: Part | None = None,
    progress: bool = False,
) -> Index:
    """Write an index: the vectors of the images of a source, with their keys and captions.

    After an interruption the same call continues, bit-exact on the same machine with the same `batch_size`. If the
    index is complete, the call updates it: it embeds new and changed images and removes those that left the source.

    Args:
        source: What `declip.data.sources.open.open_images` opens with the columns; a folder needs no captions.
        captions: Also store the mean vector of the captions of each image, for `over="captions"`.
        workers: Processes that read images; 0: this one; None: one per core, at most 8, and 0 for a Python object.
        precision, engine: As in `declip.load`; a model that is given as an object stays as it is.
        loaded_from: Path or name that `model` was loaded from if it is an object, so that searching can load it.
        part: (3, 8): the third of eight parts of the images, in the folder OUT.part-3-of-8. `Index.join` joins them.

    Examples:
        >>> len(declip.embed("runs/demo", "photos", out="indices/new", workers=0))
        8
    """
    # --- options, source and model
    check_range("batch_size", batch_size, 1)
    if dtype not in get_args(Dtype):
        raise unknown("dtype", dtype, get_args(Dtype))
    folder = Path(out).expanduser() if part is None else part_folder(Path(out).expanduser(), part)
    if not isinstance(source, str | Path):
        source, workers = open_source(source, columns), workers or 0  # the object may not work in another process
    columns = replace(columns, root=stored_path(columns.root, folder) or None)
    saved = SourceInfo(path=stored_path(source, folder), name="", columns=columns)
    images = saved.open(folder) if isinstance(source, str | Path) else ImageSource(source)
    saved.name = images.name
    encoder = load(model, device, precision, engine) if isinstance(model, str | Path) else model
    if captions:
        encoder.tokenize([""])  # a model without a text tower fails now, not after an hour
    # --- compare the source with the index, and write what differs
    made_by = describe_model(encoder, loaded_from or model, folder)
    wanted = IndexInfo(model=made_by, source=saved, dtype=dtype, captions=captions, precision=precision_of(encoder))
    span = span_of(part, len(images), "images")
    wanted.part = part and PartInfo(number=part[0], parts=part[1], images=len(images))
    with open_writer(folder, wanted) as writer:
        try:
            _update(writer, images, span, encoder, batch_size, workers, progress)
        except KeyboardInterrupt:
            log.warning("Stopped. The parts written so far are saved; the same command continues.")
            raise
    return Index.open(folder, model=encoder, source=source)


def _update(
    writer: Writer,
    source: ImageSource,
    span: range,
    model: Encoder,
    batch_size: int,
    workers: int | None,
    progress: bool,
) -> None:
    """Embed what is new or has changed in a span of a source, and drop what has left it."""
    places, gone = find_changes(source, span, writer, progress)
    skipped = _embed_places(writer, source, model, places, batch_size, workers, progress)
    if sum(len(store.ids) for store in writer.stores) == len(gone):
        raise UserError(f"None of the {len(span):,} images of '{source.name}' can be used: {skipped.explanation()}")
    writer.finish(gone, skipped)


def find_changes(
    source: ImageSource, span: range, writer: Writer, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Compare a span of a source with the rows that were embedded of it, by key and stamp (`_stamped`).

    Memory is 8 bytes for a key or a row, whatever their text: they are compared by hashes of 64 bits.

    Returns:
        The places to embed, and the ids of rows to drop, because their image has left the source or has changed.
    """
    keys = np.fromiter((hash64(source.key(place)) for place in span), np.uint64, len(span))
    # Of several images that share key and stamp, each stands for one row, and is told from the others by its place.
    ordered, counts = np.unique(keys, return_counts=True)
    repeated = set(ordered[counts > 1].tolist())
    # --- rows, sorted by the hash of what identifies them
    known, marks = list[np.ndarray](), list[np.ndarray]()
    for store in writer.stores:
        for table in store.tables("key", "stamp", "place"):
            rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
            own = [hash64(key) for key, _, _ in rows]
            known.append(np.array(own, np.uint64))
            named = [row if key in repeated else (*row[:2], None) for key, row in zip(own, rows, strict=True)]
            marks.append(np.array([hash64(row) for row in named], np.uint64))
    ids = np.concatenate([np.zeros(0, np.int64), *(store.ids for store in writer.stores)])
    mark = np.concatenate([np.zeros(0, np.uint64), *marks])
    order = mark.argsort(kind="stable")
    mark, kept = mark[order], np.zeros(len(mark), bool)
    # --- images: each takes a row of its own
    seen, new = np.isin(keys, np.concatenate([np.zeros(0, np.uint64), *known])), np.ones(len(keys), bool)
    with pairs_bar(progress) as bar:
        for at, place in enumerate(bar.track(span, description=f"Looking through {source.name}")):
            if not seen[at]:
                continue
            told_by = place if int(keys[at]) in repeated else None
            wanted = np.uint64(hash64((source.key(place), _stamped(source, place).stamp, told_by)))
            row = int(np.searchsorted(mark, wanted))
            while row < len(mark) and mark[row] == wanted and kept[row]:
                row += 1
            if row < len(mark) and mark[row] == wanted:
                kept[row], new[at] = True, False
    # What follows the last part comes first, so that the batches are those of a call that was not killed.
    places = np.flatnonzero(new) + span.start
    later = places >= writer.reached
    return np.concatenate([places[later], places[~later]]), np.sort(ids[order][~kept])


def _stamped(source: ImageSource, place: int, origin: Origin | None = None, loaded: LazyPair | None = None) -> Origin:
    """The origin with a stamp that changes with the image and its captions: by pixels where a source has none."""
    origin = origin or source.origin(place)
    digest = hashlib.blake2b(origin.stamp.encode(), digest_size=12)
    with suppress(BrokenPair):
        if not origin.stamp:
            loaded = loaded or source.read_lazy(place)
            digest.update(loaded.image.pixels().tobytes())
        digest.update(repr(loaded.captions if loaded else source.captions(place)).encode("utf-8", "replace"))
    return origin._replace(stamp=digest.hexdigest())


def read_row(source: ImageSource, place: int) -> tuple[LazyImage, IndexedImage]:
    """Open an image with the row that it becomes, whose id is not known yet."""
    origin = source.origin(place)  # before the image is read: if the file changes meanwhile, it is embedded again
    loaded = source.read_lazy(place)
    origin = _stamped(source, place, origin, loaded)
    return loaded.image, IndexedImage(-1, source.key(place), loaded.captions, place, origin)


def _embed_places(
    writer: Writer,
    source: ImageSource,
    model: Encoder,
    places: np.ndarray,
    batch_size: int,
    workers: int | None,
    progress: bool,
) -> SkipCounter:
    """Embed images part by part; returns the images that were left out."""
    info, skipped = writer.info, SkipCounter()
    parts = [places[start : start + PART_ROWS] for start in range(0, len(places), PART_ROWS)]
    batches = [part[start : start + batch_size].tolist() for part in parts for start in range(0, len(part), batch_size)]
    stream = encode_batches(model, source, read_row, batches, workers, progress)
    for part in parts:
        rows, vectors = list[IndexedImage](), list[Tensor]()
        # --- vectors and rows of a part, in memory
        for own, read, broken in islice(stream, math.ceil(len(part) / batch_size)):
            vectors.append(own)
            for row in read:
                origin = row.origin._replace(path=relative(row.origin.path, writer.folder))
                rows.append(replace(row, id=info.next_id + len(rows), origin=origin))
            skipped.merge(broken)
        # --- the part on the disk, from where a killed call continues
        if rows:
            images = torch.cat([own for own in vectors if len(own)])  # (n, d)
            captions = _caption_vectors(model, rows, images.shape[1]) if info.captions else None
            writer.add(Block.of(rows, images, captions, info.dtype), int(part[-1]) + 1)
    return skipped


def _caption_vectors(model: Encoder, rows: Sequence[IndexedImage], dimension: int) -> Tensor:
    """Mean vector of each image's captions, (n, d) float32, L2-normalized, zeros where there is none."""
    texts = [text for row in rows for text in row.captions]
    means = torch.zeros(len(rows), dimension)  # sums first; lengths do not matter
    if texts:
        owners = torch.repeat_interleave(torch.tensor([len(row.captions) for row in rows]))
        means.index_add_(0, owners, text_features(model, texts))
    return normalize(means, dim=-1)
