"""Embed the images of a source into an index; vectors that are in the cache are not computed again."""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.data.columns import DEFAULT, Columns
from declip.data.pair import BrokenPair, LazyImage, PairSource, SkipCounter
from declip.data.sources.names import absolute, relative, resolve, stored_path
from declip.data.sources.open import ImageSource, open_images, open_source
from declip.data.sources.python_items import Items
from declip.errors import UserError, check_range, unknown
from declip.evaluation.encode import encode_batches, eval_mode, text_features
from declip.interchange.read import folder_or_name, loaded
from declip.io.pool import pairs_bar
from declip.models.encoder import Encoder
from declip.models.fingerprint import fingerprint
from declip.models.inference import compiled_encoder
from declip.models.precision import Precision, precision_of
from declip.search.index import Index
from declip.search.info import Dtype, IndexInfo, SourceInfo, is_index
from declip.search.store import GROUP_ROWS, Block, IndexedImage
from declip.search.vectors import VectorCache, content_key, stack_rows, stamp_key
from declip.search.writer import check_target, describe_model, new_index

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
    overwrite: bool = False,
    progress: bool = False,
) -> Index:
    """Write an index: the vectors of the images of a source, with their keys and captions.

    Vectors are cached, so the same call after an interruption continues, and later calls embed only
    new and changed images. The folder appears, or replaces the older index of the same model,
    source and options, when the index is complete.

    Args:
        source: What `declip.data.sources.open.open_images` opens with the columns; a folder needs
            no captions.
        captions: Also store the mean vector of the captions of each image, for `over="captions"`.
        workers: Processes that read images; 0: this one; None: one per core, at most 8, and 0 for a
            Python object.
        precision: As in `declip.load`; a model that is given as an object stays as it is.
        loaded_from: Path or name that `model` was loaded from if it is an object, so that searching
            can load it.
        overwrite: Also replace an index of another model, source or option.

    Examples:
        >>> len(declip.embed("runs/demo", "photos", out="indices/new", workers=0))
        8
    """
    check_range("batch_size", batch_size, 1)
    if dtype not in get_args(Dtype):
        raise unknown("dtype", dtype, get_args(Dtype))
    folder = Path(out).expanduser()
    if not isinstance(source, str | Path):
        source = open_source(source, columns)
        workers = workers or 0  # the object may not work in another process
    saved, images = _open_images(source, columns, folder)
    model = folder_or_name(model)
    encoder = loaded(model, device, precision)
    if captions:
        encoder.tokenize([""])  # a model without a text tower fails now, not after an hour
    made_by = describe_model(encoder, loaded_from or model, folder)
    info = IndexInfo(
        model=made_by,
        source=saved,
        dtype=dtype,
        captions=captions,
        precision=precision_of(encoder),
    )
    check_target(folder, info, overwrite)
    # --- vectors, from the cache or computed, and the files
    work = _Embedding(encoder, images, folder, batch_size, workers, progress)
    try:
        with new_index(folder, info) as writer:
            for rows, vectors in work.blocks():
                means = None
                if captions:
                    means = _caption_vectors(encoder, rows, vectors.shape[1])
                writer.add(Block.of(rows, vectors, means, dtype))
            info.skipped = work.skipped.to_dict()
            if not info.rows:
                raise UserError(
                    f"None of the {len(images):,} images of '{images.name}' can be used: {work.skipped.explanation()}"
                )
    except KeyboardInterrupt:
        log.warning("Stopped. What was embedded is cached; the same command continues.")
        raise
    return Index.open(folder, model=encoder, source=source)


@dataclass
class _Embedding:
    """The images of a source on their way into an index."""

    model: Encoder
    source: ImageSource
    folder: Path  # of the index
    batch_size: int
    workers: int | None
    progress: bool
    skipped: SkipCounter = field(default_factory=SkipCounter)  # images that cannot be used

    def blocks(self) -> Iterator[tuple[list[IndexedImage], Tensor]]:
        """Rows and their vectors (n, d), in the order of the source."""
        cache = VectorCache(f"{fingerprint(self.model)[:24]}-{precision_of(self.model)}")
        numbers = range(len(self.source))
        with pairs_bar(self.progress) as bar:
            title = f"Looking through {self.source.name}"
            keys = [self._key(index) for index in bar.track(numbers, description=title)]
        blocks = [numbers[start : start + GROUP_ROWS] for start in numbers[::GROUP_ROWS]]
        batches = list[list[list[int]]]()  # of each block, the images that are not cached
        for block in blocks:
            known = cache.find([keys[index] for index in block])
            missing = [index for index in block if keys[index] not in known]
            starts = range(0, len(missing), self.batch_size)
            batches.append([missing[at : at + self.batch_size] for at in starts])
        # --- one stream of batches, so that the processes that read images start once
        missing_images = list(chain(*batches))
        count = sum(map(len, missing_images))
        with eval_mode(self.model):
            encode = compiled_encoder(self.model, count, self.batch_size)
        stream = encode_batches(
            self.model, self.source, read_image, missing_images, self.workers, self.progress, encode
        )
        for block, own in zip(blocks, batches, strict=True):
            for vectors, indices, broken in islice(stream, len(own)):
                self.skipped.merge(broken)
                if indices:
                    cache.add([keys[index] for index in indices], vectors)
            known = cache.find([keys[index] for index in block])
            usable = [index for index in block if keys[index] in known]
            if usable:
                rows = [self._row(index) for index in usable]
                vectors = stack_rows([known[keys[index]] for index in usable])
                yield rows, vectors

    def _key(self, index: int) -> bytes:
        """By where the image is and when it changed; by its pixels where that is unknown."""
        image = self.source[index]
        origin = image.origin()
        if origin.stamp:
            return stamp_key(origin.stamp)
        try:
            return content_key(image.image())
        except BrokenPair:
            return b""  # it will be found broken again, and counted

    def _row(self, index: int) -> IndexedImage:
        image = self.source[index]
        origin = image.origin()
        origin = origin._replace(path=relative(origin.path, self.folder))
        return IndexedImage(index, image.key, image.captions(), index, origin)


def read_image(source: ImageSource, index: int) -> tuple[LazyImage, int]:
    """Open an image; its index stays with it."""
    return source[index].open(), index


def _caption_vectors(model: Encoder, rows: Sequence[IndexedImage], dimension: int) -> Tensor:
    """Mean vector of each image's captions, (n, d) float32, L2-normalized, zeros where there is none."""
    texts = [text for row in rows for text in row.captions]
    means = torch.zeros(len(rows), dimension)  # sums first; lengths do not matter
    if texts:
        counts = torch.tensor([len(row.captions) for row in rows])
        owners = torch.repeat_interleave(counts)
        means.index_add_(0, owners, text_features(model, texts))
    return normalize(means, dim=-1)


def _open_images(
    source: str | Path | PairSource, columns: Columns, folder: Path
) -> tuple[SourceInfo, ImageSource]:
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
    """Open an index, or embed a source into one, with options of `embed`.

    By default the folder is one below "indices" for each source, its columns, and each model.
    Without captions the index that is there keeps its own.
    """
    if isinstance(source, str | Path) and is_index(Path(source).expanduser()):
        if folder is not None:
            raise UserError(
                f"'{source}' is an index already, so --index '{folder}' is not used. Remove it."
            )
        return Index.open(source, model=model, device=device, precision=precision)
    model = folder_or_name(model)
    encoder = loaded(model, device, precision)
    if folder is None:
        folder = _usual_folder(encoder, source, columns)
    given: str | Path = ""
    if isinstance(model, str | Path):
        given = model
    known = Path(folder).expanduser()
    before = None
    if is_index(known):
        before = IndexInfo.read(known)
    if before is not None and columns.caption is None:
        columns = replace(columns, caption=before.source.columns.caption)
    captions = before is None or before.captions
    options |= {"captions": captions, "columns": columns, "loaded_from": given}
    return embed(encoder, source, out=folder, **options)


def _usual_folder(
    encoder: Encoder, source: str | Path | PairSource | Items, columns: Columns
) -> Path:
    """The folder of the index of a source by a model, below the working folder."""
    if not isinstance(source, str | Path):
        raise UserError(
            "The images are a Python object, which has no path: give the folder of their index."
        )
    read = ""
    if columns != DEFAULT:
        read = f" {columns}"
    text = f"{fingerprint(encoder)} {absolute(source)}{read}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    name = Path(source).name.removeprefix("builtin:")
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "source"
    return Path("indices", f"{plain[:40]}-{digest[:8]}")
