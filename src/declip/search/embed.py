"""Embed a source: copy the rows of images that an index has, and write those of new and changed images."""

import hashlib
import logging
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.data.columns import DEFAULT, Columns
from declip.data.pair import BrokenPair, LazyImage, LazyPair, Origin, PairSource, SkipCounter
from declip.data.sources.names import absolute, relative, resolve, stored_path
from declip.data.sources.open import ImageSource, open_images, open_source
from declip.data.sources.python_items import Items
from declip.errors import UserError, check_range, unknown
from declip.evaluation.encode import Encoder, encode_batches, text_features
from declip.interchange.read import folder_or_name, loaded
from declip.io.pool import pairs_bar
from declip.models.fingerprint import fingerprint
from declip.models.precision import Precision, precision_of
from declip.search.index import Index
from declip.search.info import INFO, Dtype, IndexInfo, SourceInfo
from declip.search.store import BLOCK_ROWS, Block, IndexedImage, Store, Writer, describe_model, hash64, open_writer

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
    loaded_from: str | Path = "",
    progress: bool = False,
) -> Index:
    """Write an index: the vectors of the images of a source, with their keys and captions.

    After an interruption the same call continues, bit-exact on the same machine with the same `batch_size`. If the
    index is complete, the call updates it: it embeds new and changed images and removes those that left the source.

    Args:
        source: What `declip.data.sources.open.open_images` opens with the columns; a folder needs no captions.
        captions: Also store the mean vector of the captions of each image, for `over="captions"`.
        workers: Processes that read images; 0: this one; None: one per core, at most 8, and 0 for a Python object.
        precision: As in `declip.load`; a model that is given as an object stays as it is.
        loaded_from: Path or name that `model` was loaded from if it is an object, so that searching can load it.

    Examples:
        >>> len(declip.embed("runs/demo", "photos", out="indices/new", workers=0))
        8
    """
    check_range("batch_size", batch_size, 1)
    if dtype not in get_args(Dtype):
        raise unknown("dtype", dtype, get_args(Dtype))
    folder = Path(out).expanduser()
    if not isinstance(source, str | Path):
        source, workers = open_source(source, columns), workers or 0  # the object may not work in another process
    saved, images = _open_images(source, columns, folder)
    model = folder_or_name(model)
    encoder = loaded(model, device, precision)
    if captions:
        encoder.tokenize([""])  # a model without a text tower fails now, not after an hour
    # --- compare the source with the index, and write what differs
    made_by = describe_model(encoder, loaded_from or model, folder)
    wanted = IndexInfo(model=made_by, source=saved, dtype=dtype, captions=captions, precision=precision_of(encoder))
    with open_writer(folder, wanted) as writer:
        try:
            known = find_rows(images, writer.stores(), progress)
            positions, skipped = _embed_missing(writer, images, encoder, known, batch_size, workers, progress)
        except KeyboardInterrupt:
            log.warning("Stopped. What was embedded is saved; the same command continues.")
            raise
        if (positions < 0).all():
            raise UserError(
                f"None of the {len(images):,} images of '{images.name}' can be used: {skipped.explanation()}"
            )
        writer.finish(positions, skipped)
    return Index.open(folder, model=encoder, source=source)


def _open_images(source: str | Path | PairSource, columns: Columns, folder: Path) -> tuple[SourceInfo, ImageSource]:
    """Open the images, and describe them for the index in a folder."""
    columns = replace(columns, root=stored_path(columns.root, folder) or None)
    saved = SourceInfo(path=stored_path(source, folder), name="", columns=columns)
    given = source if isinstance(source, PairSource) else resolve(saved.path, folder)
    images = open_images(given, saved.columns_of(folder))
    saved.name = images.name
    return saved, images


def open_or_embed(
    model: str | Path | Encoder,
    source: str | Path | PairSource | Items,
    folder: str | Path | None = None,
    *,
    columns: Columns = DEFAULT,
    device: str = "auto",
    precision: Precision = "auto",
    **options: Any,
) -> Index:
    """Open an index, or embed a source into one, with options of `embed`; later calls embed only what is new.

    By default the folder is one below "indices" for each source, its columns, and each model. Without captions the
    index that is there keeps its own.
    """
    if isinstance(source, str | Path) and (Path(source).expanduser() / INFO).is_file():
        if folder is not None:
            raise UserError(f"'{source}' is an index already, so --index '{folder}' is not used. Remove it.")
        return Index.open(source, model=model, device=device, precision=precision)
    model = folder_or_name(model)
    encoder = loaded(model, device, precision)
    if folder is None:
        if not isinstance(source, str | Path):
            raise UserError("The images are a Python object, which has no path: give the folder of their index.")
        read = "" if columns == DEFAULT else f" {columns}"
        digest = hashlib.sha256(f"{fingerprint(encoder)} {absolute(source)}{read}".encode("utf-8", "surrogateescape"))
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(source).name.removeprefix("builtin:")).strip("-") or "source"
        folder = Path("indices") / f"{name[:40]}-{digest.hexdigest()[:8]}"
    given = model if isinstance(model, str | Path) else ""
    known = Path(folder).expanduser()
    before = IndexInfo.read(known) if (known / INFO).is_file() else None
    if before is not None and columns.caption is None:
        columns = replace(columns, caption=before.source.columns.caption)
    captions = before is None or before.captions
    return embed(encoder, source, out=folder, captions=captions, columns=columns, loaded_from=given, **options)


def find_rows(source: ImageSource, stores: Iterable[Store], progress: bool = False) -> np.ndarray:
    """(n,) int64, the position in a source of the image of each stored row; -1 if it has left or has changed.

    An image and a row belong together by key and stamp (`_stamped`), compared by hashes of 64 bits to save memory.
    """
    tables = (table for store in stores for table in store.tables("key", "stamp"))
    rows = chain.from_iterable(zip(*(column.to_pylist() for column in table.columns), strict=True) for table in tables)
    hashes = ((hash64(key), hash64((key, stamp))) for key, stamp in rows)
    known, stored = np.fromiter(hashes, np.dtype((np.uint64, 2))).T
    # --- images whose key is known: a stamp may cost as much as the pixels
    keys = np.fromiter((hash64(source.key(at)) for at in range(len(source))), np.uint64, len(source))
    candidates = np.flatnonzero(np.isin(keys, known))
    with pairs_bar(progress) as bar:
        shown = bar.track(candidates, description=f"Looking through {source.name}")
        marks = (hash64((source.key(at), _stamped(source, at).stamp)) for at in map(int, shown))
        given = np.fromiter(marks, np.uint64, len(candidates))
    # --- the nth of several equal rows belongs to the nth of several equal images
    by_row, by_image = (np.argsort(values, kind="stable") for values in (stored, given))
    stored, given = stored[by_row], given[by_image]
    nth = np.arange(len(stored)) - np.searchsorted(stored, stored)
    at = np.searchsorted(given, stored) + nth
    same = at < len(given)
    same[same] = given[at[same]] == stored[same]
    positions = np.full(len(stored), -1)
    positions[by_row[same]] = candidates[by_image[at[same]]]
    return positions


def _stamped(source: ImageSource, index: int, origin: Origin | None = None, loaded: LazyPair | None = None) -> Origin:
    """The origin with a stamp that changes with the image and its captions: by pixels where a source has none."""
    origin = origin or source.origin(index)
    digest = hashlib.blake2b(origin.stamp.encode(), digest_size=12)
    with suppress(BrokenPair):
        if not origin.stamp:
            loaded = loaded or source.read_lazy(index)
            digest.update(loaded.image.pixels().tobytes())
        if not source.source.stamps_captions:
            digest.update(repr(loaded.captions if loaded else source.captions(index)).encode("utf-8", "replace"))
    return origin._replace(stamp=digest.hexdigest())


def read_row(source: ImageSource, index: int) -> tuple[LazyImage, IndexedImage]:
    """Open an image with the row that it becomes, whose id is not known yet."""
    origin = source.origin(index)  # before the image is read: if the file changes meanwhile, it is embedded again
    loaded = source.read_lazy(index)
    origin = _stamped(source, index, origin, loaded)
    return loaded.image, IndexedImage(-1, source.key(index), loaded.captions, index, origin)


def _embed_missing(
    writer: Writer,
    source: ImageSource,
    model: Encoder,
    known: np.ndarray,
    batch_size: int,
    workers: int | None,
    progress: bool,
) -> tuple[np.ndarray, SkipCounter]:
    """Embed images without a stored row, block by block.

    Returns:
        The positions in the source of all stored rows, `known` (n,) being those of earlier ones; images left out.
    """
    # --- blocks as if no call had been killed, so that batches are the same; then without what is stored
    missing = np.setdiff1d(np.arange(len(source)), known[: writer.indexed])
    blocks, stored = np.split(missing, range(BLOCK_ROWS, len(missing), BLOCK_ROWS)), np.zeros(len(source), bool)
    stored[known[known >= 0]] = True
    blocks = [block[~stored[block]] for block in blocks]
    batches = [block[at : at + batch_size].tolist() for block in blocks for at in range(0, len(block), batch_size)]
    stream = encode_batches(model, source, read_row, batches, workers, progress)
    positions, skipped = [known], SkipCounter()
    for block in blocks:
        rows, vectors = list[IndexedImage](), list[Tensor]()
        # --- vectors and rows, in memory
        for own, read, broken in islice(stream, math.ceil(len(block) / batch_size)):
            vectors.append(own)
            for row in read:
                origin = row.origin._replace(path=relative(row.origin.path, writer.folder))
                rows.append(replace(row, id=len(rows), origin=origin))
            skipped.merge(broken)
        # --- on the disk, from where a killed call continues
        if rows:
            images = torch.cat([own for own in vectors if len(own)])  # (n, d)
            captions = _caption_vectors(model, rows, images.shape[1]) if writer.info.captions else None
            writer.add(Block.of(rows, images, captions, writer.info.dtype))
            positions.append(np.array([row.place for row in rows]))
    return np.concatenate(positions), skipped


def _caption_vectors(model: Encoder, rows: Sequence[IndexedImage], dimension: int) -> Tensor:
    """Mean vector of each image's captions, (n, d) float32, L2-normalized, zeros where there is none."""
    texts = [text for row in rows for text in row.captions]
    means = torch.zeros(len(rows), dimension)  # sums first; lengths do not matter
    if texts:
        owners = torch.repeat_interleave(torch.tensor([len(row.captions) for row in rows]))
        means.index_add_(0, owners, text_features(model, texts))
    return normalize(means, dim=-1)
