"""Embed a source: write the vectors of its images in parts, so that a killed call continues where it stopped."""

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from declip.data.pair import BrokenPair, PairSource, SkipCounter, printable
from declip.data.sources.image_source import ImageSource
from declip.data.sources.origin import Origin
from declip.data.sources.shard_names import is_url, names_shards
from declip.errors import UserError, check_range, unknown
from declip.evaluation.encode import Encoder, measuring, text_features
from declip.interchange.read import load
from declip.io.pool import in_order, naming_lost_workers, pairs_bar
from declip.search.approximate import EXACT_UP_TO, import_faiss, refresh
from declip.search.index import Index, fingerprint, image_vectors, text_encoder
from declip.search.manifest import MANIFEST, Dtype, Manifest, ModelEntry, Precision, SourceEntry, Update, locked_index
from declip.search.store import PART_ROWS, IndexedImage, KnownImage, Store, batch_of, write_part

log = logging.getLogger("declip")


def embed(
    model: str | Path | Encoder,
    source: str | Path | PairSource,
    *,
    out: str | Path,
    captions: bool = False,
    dtype: Dtype = "float16",
    precision: Precision = "fp32",
    approximate: bool | None = None,
    batch_size: int = 256,
    workers: int = 0,
    image_column: str = "image",
    caption_column: str | None = "caption",
    image_root: str | Path | None = None,
    device: str = "auto",
    loaded_from: str | Path = "",
    progress: bool = False,
) -> Index:
    """Write the vectors of a source's images, with their keys and captions, to a folder that can be searched.

    Called again with the same arguments it continues after the last complete part, bit-exact if the machine, the
    threads and `batch_size` are the same. Once done, a further call embeds only what is new or has changed in the
    source (by key, size and modification time) and hides what has left it.

    Args:
        model: A model, or what `declip.load` opens.
        source: What `declip.data.sources.image_source.open_images` opens, or a source: a folder needs no captions.
        out: The folder of the index.
        captions: Also store the mean vector of each image's captions, to search in.
        dtype: Type of the stored vectors, "float16" or "float32".
        precision: "bf16" runs the towers in autocast, or "fp32".
        approximate: Whether to make an approximate index, which needs faiss; None does beyond a million images.
        workers: Processes that read images; 0 reads in this one.
        caption_column: Column of a table; None or empty for a table without captions.
        image_root: Folder that a table's paths are relative to and may not leave.
        device: Where a model is loaded to: "auto", "cpu", "cuda" …
        loaded_from: Where a model given as an object was loaded from, so that later calls can load it again.
        progress: Show progress bars.

    Raises:
        UserError: There is no such source or model, no image can be used, an option is out of its range, or the folder
            holds something else, an index of another model, source or option, or cannot be written to.
    """
    check_range("batch_size", batch_size, 1)
    check_range("workers", workers, 0)
    for name, value, allowed in (("dtype", dtype, get_args(Dtype)), ("precision", precision, get_args(Precision))):
        if value not in allowed:
            raise unknown(name, value, allowed)
    if approximate:
        import_faiss()
    entry = SourceEntry(
        spec=_spec(source),
        name="",
        image_column=image_column,
        caption_column=caption_column or None,
        image_root=None if image_root is None else _spec(image_root),
    )
    images = entry.open() if isinstance(source, str | Path) else ImageSource(source)
    entry.name = images.name
    encoder = load(model, device) if isinstance(model, str | Path) else model
    if captions:
        encoder.tokenize([""])  # an image tower alone fails now, not after an hour
    made_by = ModelEntry(spec=_spec(model) or _spec(loaded_from), fingerprint=fingerprint(encoder), precision=precision)
    wanted = Manifest(model=made_by, source=entry, dtype=dtype, captions=captions)
    with locked_index(Path(out).expanduser(), new=True) as folder:
        if not (folder / MANIFEST).exists():
            wanted.save(folder)
        store = Store(folder, check=False)
        _check_same(store.manifest, wanted, folder)
        _Embedding(store, images, encoder, batch_size, workers, progress).run()
        _refresh_approximate(Store(folder, check=False), encoder, approximate)
    index = Index.open(folder, model=encoder, source=source, check=False)
    if not len(index):
        reasons = index.manifest.skipped.explanation()
        raise UserError(f"None of the {len(images):,} images of '{images.name}' can be used: {reasons}")
    return index


@dataclass
class Changes:
    """The difference between a source and the rows of an index.

    Attributes:
        places: (n,) int64, the images to embed, in the order of the source.
        digest: SHA-256 of their keys: the same for the same work.
        gone: Ids of rows to hide: their image has left the source, or is to be embedded again.
        back: Ids of hidden rows whose image is there again as it was.
    """

    places: np.ndarray
    digest: str
    gone: set[int]
    back: set[int]


def find_changes(
    source: ImageSource,
    places: Iterable[int],
    known: Iterable[KnownImage],
    *,
    removed: Set[int] = frozenset(),
    gone: Set[int] = frozenset(),
    excluded: Set[str] = frozenset(),
) -> Changes:
    """Compare a source with the rows that were embedded of it.

    An image is recognized by its key and its stamp. One that the user removed is recognized by its key alone, so that
    it stays out when its file is written again. Of several images that share a key each stands for one row.

    Args:
        places: All places of the source in order, perhaps with a progress bar.
        known: The rows of the index in the order of their ids.
        removed: Ids that the user removed.
        gone: Ids that are hidden already.
        excluded: Keys that stay out.
    """
    rows: dict[str, list[KnownImage]] = defaultdict(list)
    for row in known:
        rows[row.key].append(row)
    todo: list[int] = []
    digest = hashlib.sha256()
    back: set[int] = set()
    for place in places:
        key = source.key(place)
        if key in excluded:
            continue
        stamp = source.origin(place).stamp if key in rows else ""
        same = [row for row in rows.get(key, ()) if row.id in removed or row.stamp == stamp]
        if not same:
            todo.append(place)
            digest.update(repr(key).encode())
            continue
        row = min(same, key=lambda row: (row.id in gone, row.id in removed, row.id))  # a live row first
        rows[key].remove(row)
        if row.id in gone:
            back.add(row.id)
    left = {row.id for remaining in rows.values() for row in remaining}
    return Changes(np.array(todo, np.int64), digest.hexdigest(), left - removed - gone, back)


@dataclass
class ImageBatch:
    """A batch as a worker reads it: pixels (n, 3, S, S), and the fields of `IndexedImage` after the id."""

    pixels: Tensor | None = None
    rows: list[tuple[str, tuple[str, ...], int, Origin]] = field(default_factory=list)
    skipped: SkipCounter = field(default_factory=SkipCounter)
    uncaptioned: SkipCounter = field(default_factory=SkipCounter)


class ImageBatches(Dataset[ImageBatch]):
    """Batches of images by number; `places` holds the images of each batch."""

    def __init__(self, source: ImageSource, model: Encoder, places: Sequence[Sequence[int]]) -> None:
        self.source, self.places = source, places
        # `preprocessor` stays on the host, where a worker may use it; `preprocess` moves to the device.
        self.preprocess = getattr(model, "preprocessor", model.preprocess)

    def __getitem__(self, number: int) -> ImageBatch:
        batch, images = ImageBatch(), []
        for place in self.places[number]:
            # Before the image is read: if the file changes meanwhile, the next call embeds it again.
            origin = self.source.origin(place)
            try:
                loaded = self.source[place]
            except BrokenPair as broken:
                batch.skipped.add(broken)
                continue
            if loaded.uncaptioned is not None:
                batch.uncaptioned.add(loaded.uncaptioned)
            images.append(loaded.image)
            batch.rows.append((self.source.key(place), loaded.captions, place, origin))
        if images:
            batch.pixels = self.preprocess(images)
        return batch


class _Embedding:
    """One call of `embed` on a locked index."""

    def __init__(
        self, store: Store, source: ImageSource, model: Encoder, batch_size: int, workers: int, progress: bool
    ) -> None:
        self.store, self.manifest, self.source, self.model = store, store.manifest, source, model
        self.batch_size, self.workers, self.progress = batch_size, workers, progress

    def run(self) -> None:
        """Embed what is new, continuing an unfinished call if the source is still the same."""
        manifest, changes = self.manifest, None
        update = manifest.update
        if update is not None and not update.finished:
            changes = self._changes(update.first_id)
            if changes.digest != update.digest:  # the source has changed: finished parts stay, the rest is new
                changes = None
        if changes is None or update is None:
            changes = self._changes(manifest.next_id)
            update = Update(first_id=manifest.next_id, digest=changes.digest, total=len(changes.places))
            manifest.update = update
            manifest.save(self.store.folder)
        self._embed(changes.places[update.done :], update)
        manifest.gone = sorted({*manifest.gone, *changes.gone} - changes.back)
        update.finished = True
        manifest.save(self.store.folder)

    def _changes(self, before: int) -> Changes:
        with pairs_bar(self.progress, "images") as bar:
            return find_changes(
                self.source,
                bar.track(range(len(self.source)), description=f"Looking through {self.source.name}"),
                self.store.known(before),
                removed=set(self.manifest.removed),
                gone=set(self.manifest.gone),
                excluded=set(self.manifest.excluded),
            )

    def _embed(self, places: np.ndarray, update: Update) -> None:
        """Embed the images at these places, part by part."""
        parts = [places[start : start + PART_ROWS].tolist() for start in range(0, len(places), PART_ROWS)]
        size = self.batch_size
        batches = [[part[start : start + size] for start in range(0, len(part), size)] for part in parts]
        jobs = ImageBatches(self.source, self.model, [batch for part in batches for batch in part])
        # The workers start here, before the bar's own thread does: a fork copies no thread.
        stream = in_order(jobs, len(jobs.places), self.workers)
        with naming_lost_workers(), pairs_bar(self.progress, "images") as bar:
            task = bar.add_task(f"Images of {self.source.name}", total=update.total, completed=update.done)
            for part, part_batches in zip(parts, batches, strict=True):
                read: list[ImageBatch] = []
                vectors: list[Tensor] = []
                for batch, batch_places in zip(islice(stream, len(part_batches)), part_batches, strict=True):
                    if batch.pixels is not None:
                        vectors.append(image_vectors(self.model, batch.pixels, self.manifest.model.precision))
                    batch.pixels = None
                    read.append(batch)
                    bar.advance(task, len(batch_places))
                self._keep(read, vectors, update, len(part))

    def _keep(self, read: Sequence[ImageBatch], vectors: Sequence[Tensor], update: Update, count: int) -> None:
        """Write a part, then the manifest that names it."""
        manifest = self.manifest
        skipped, uncaptioned = SkipCounter.from_dict(update.skipped), SkipCounter.from_dict(update.uncaptioned)
        for batch in read:
            skipped.merge(batch.skipped)
            uncaptioned.merge(batch.uncaptioned)
        if vectors:
            fields = [row for batch in read for row in batch.rows]
            rows = [IndexedImage(id, *row) for id, row in enumerate(fields, manifest.next_id)]
            images = torch.cat(list(vectors))
            _check_finite(images, rows)
            manifest.dimension = images.shape[1]
            captions = self._caption_vectors([row.captions for row in rows]) if manifest.captions else None
            part = write_part(self.store.folder, manifest.next_part, batch_of(manifest, rows, images, captions))
            manifest.parts = [*manifest.parts, part]
            manifest.next_id += len(rows)
        update.done += count
        update.skipped, update.uncaptioned = skipped.to_dict(), uncaptioned.to_dict()
        manifest.save(self.store.folder)

    def _caption_vectors(self, captions: Sequence[tuple[str, ...]]) -> Tensor:
        """Mean vector of each image's captions, (n, d) float32, L2-normalized, zeros where there is none."""
        texts = [text for texts_of_image in captions for text in texts_of_image]
        means = torch.zeros(len(captions), self.manifest.dimension)
        if texts:
            owners = torch.repeat_interleave(torch.tensor([len(texts_of_image) for texts_of_image in captions]))
            half = self.manifest.model.precision == "bf16"
            with measuring(self.model) as device, torch.autocast(device.type, torch.bfloat16, enabled=half):
                means.index_add_(0, owners, text_features(self.model, texts))
        return normalize(means, dim=-1)


def _check_finite(vectors: Tensor, rows: Sequence[IndexedImage]) -> None:
    wrong = ~vectors.isfinite().all(1)
    if wrong.any():
        key = printable(rows[int(wrong.nonzero()[0, 0])].key)
        raise UserError(
            f"The model gives no number for '{key}' and {int(wrong.sum()) - 1:,} more: its weights or the precision "
            "are at fault. Try --precision fp32, or another checkpoint."
        )


def _refresh_approximate(store: Store, model: Encoder, wanted: bool | None) -> None:
    """Make the approximate index, or bring it up to date, where that is asked for or due."""
    old = store.manifest.approximate
    if wanted is False or (old is not None and old.covered == store.manifest.next_id):
        return
    if wanted is None and old is None:
        if len(store.live) <= EXACT_UP_TO:
            return
        try:
            import_faiss()
        except UserError as error:
            log.warning("All search is exact. %s", error)
            return
    refresh(store, text_encoder(model))


def _check_same(old: Manifest, new: Manifest, folder: Path) -> None:
    """Refuse to continue an index of another model, source or option."""
    if old.model.fingerprint != new.model.fingerprint:
        raise UserError(
            f"'{folder}' holds vectors of another model ('{old.model.spec or 'a Python object'}'). Vectors of two "
            "models cannot be compared. Give that model, or choose another folder with --out."
        )
    before, now = (
        {
            "source": manifest.source.spec or manifest.source.name,
            **manifest.source.model_dump(exclude={"spec", "name"}),
            **manifest.model_dump(include={"dtype", "captions"}),
            "precision": manifest.model.precision,
        }
        for manifest in (old, new)
    )
    if changed := [f"{name} was {before[name]!r}, now {now[name]!r}" for name in now if before[name] != now[name]]:
        raise UserError(
            f"'{folder}' holds an index of another source or option: {'; '.join(changed)}. Give the same, or choose "
            "another folder with --out."
        )


def _spec(given: object) -> str:
    """A name that means the same in another working directory: absolute paths; empty for an object."""
    if not isinstance(given, str | Path) or not str(given):
        return ""
    path = Path(given).expanduser()
    if path.exists():
        return str(path.resolve())
    if names_shards(str(given)):
        return "::".join(part if is_url(part) else os.path.abspath(part) for part in str(given).split("::"))
    return str(given)
