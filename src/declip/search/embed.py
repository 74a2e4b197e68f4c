"""Embedding a source: the vectors of its pictures, written in parts, so that a killed call goes on where it stopped."""

import logging
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from declip.data.checks import check_range
from declip.data.pair import PairSource, SkipCounter, printable
from declip.data.sources.image_source import ImageSource
from declip.data.sources.shard_names import is_url, names_shards
from declip.errors import UserError, unknown
from declip.evaluation.encode import Encoder
from declip.interchange.load import load
from declip.io.pool import in_order, naming_lost_workers, pairs_bar
from declip.search.approximate import EXACT_UP_TO, import_faiss
from declip.search.changes import Changes, find_changes
from declip.search.encoding import (
    Batches,
    Loaded,
    caption_encoder,
    caption_vectors,
    fingerprint,
    image_vectors,
)
from declip.search.index import Index
from declip.search.maintenance import PART_ROWS, next_number, refresh_approximate
from declip.search.manifest import MANIFEST, Dtype, Manifest, ModelOf, Precision, Source, Update, held
from declip.search.parts import NUMBERS, Row, batch_of, write_part
from declip.search.store import Store

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
    batch: int = 256,
    workers: int = 0,
    image_column: str = "image",
    caption_column: str | None = "caption",
    image_root: str | Path | None = None,
    device: str = "auto",
    loaded_from: str | Path = "",
    progress: bool = False,
) -> Index:
    """Write the vectors of a source's pictures, with their keys and captions, to a folder that can be searched.

    Called again with the same arguments it goes on after the last whole part, to the same last bit if the machine,
    the threads and `batch` are the same. Once done, a further call embeds only what is new or has changed in the
    source (by key, size and time of change) and hides what is there no longer.

    Args:
        model: A model, or what `declip.load` opens.
        source: What `declip.data.sources.image_source.open_images` opens, or a source: a folder needs no captions.
        out: The folder of the index.
        captions: Also store a vector of each picture's captions, their mean, to search in.
        dtype: Of the stored numbers, "float16" or "float32".
        precision: "bf16" runs the towers in autocast, or "fp32".
        approximate: Whether to make an approximate index, which needs faiss; None does beyond a million pictures.
        batch: Pictures a pass.
        workers: Processes that read pictures; 0 does it in this one.
        image_column: For tables.
        caption_column: For tables; None or empty for one without captions.
        image_root: For tables: the folder that paths are relative to and may not leave.
        device: Where a model is loaded to: "auto", "cpu", "cuda" …
        loaded_from: What a model that is given as an object was loaded from, for later calls to load it again.
        progress: Show progress bars.

    Returns:
        The index, opened.

    Raises:
        UserError: There is no such source or model, not one picture can be used, an option is out of its range, or
            the folder holds something else, an index of another model, source or option, or cannot be written to.
    """
    check_range("batch", batch, 1)
    check_range("workers", workers, 0)
    if dtype not in NUMBERS:
        raise unknown("dtype", dtype, NUMBERS)
    if precision not in get_args(Precision):
        raise unknown("precision", precision, get_args(Precision))
    if approximate:
        import_faiss()
    at = Source(
        spec=_spec(source),
        name="",
        image_column=image_column,
        caption_column=caption_column or None,
        image_root=None if image_root is None else _spec(image_root),
    )
    opened = at.open() if isinstance(source, str | Path) else ImageSource(source)
    at.name = opened.name
    encoder = load(model, device) if isinstance(model, str | Path) else model
    if captions:
        encoder.tokenize([""])  # an image tower alone says so now, not after an hour
    wanted = Manifest(
        model=ModelOf(
            spec=_spec(model) or _spec(loaded_from or None), fingerprint=fingerprint(encoder), precision=precision
        ),
        source=at,
        dtype=dtype,
        captions=captions,
    )
    with held(Path(out).expanduser(), new=True) as folder:
        if not (folder / MANIFEST).exists():
            wanted.save(folder)
        store = Store(folder, check=False)
        _check_same(store.manifest, wanted, folder)
        _Embedding(store, opened, encoder, batch, workers, progress).run()
        _approximate(Store(folder, check=False), encoder, approximate)
    index = Index.open(folder, model=encoder, source=source, check=False)
    if not len(index):
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in sorted(index.manifest.skipped.counts.items()))
        raise UserError(f"None of the {len(opened):,} pictures of '{opened.name}' can be used: {reasons}.")
    return index


class _Embedding:
    """One call of `embed`."""

    def __init__(
        self, store: Store, source: ImageSource, model: Encoder, batch: int, workers: int, progress: bool
    ) -> None:
        self.store, self.manifest, self.source, self.model = store, store.manifest, source, model
        self.batch, self.workers, self.progress = batch, workers, progress

    def run(self) -> None:
        """Embed what has to be."""
        last = self.manifest.update
        changes = None
        if last is not None and not last.finished:
            changes = self._changes(last.first_id)
            if changes.digest != last.digest:  # the source has changed since: what there is stays, the rest is new
                changes = last = None
        if changes is None or last is None:
            changes = self._changes(self.manifest.next_id)
            last = Update(first_id=self.manifest.next_id, digest=changes.digest, total=len(changes.places))
            self.manifest.update = last
            self.manifest.save(self.store.folder)
        self._embed(changes.places[last.done :], last)
        self.manifest.gone = sorted({*self.manifest.gone, *changes.gone} - changes.back)
        last.finished = True
        self.manifest.save(self.store.folder)

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
        """Embed the images at these places, a part after the other."""
        parts = [places[start : start + PART_ROWS] for start in range(0, len(places), PART_ROWS)]
        batches = [[part[at : at + self.batch].tolist() for at in range(0, len(part), self.batch)] for part in parts]
        jobs = Batches(self.source, self.model, [own for part in batches for own in part])
        # The workers start here, before the bar's own thread does: a fork copies no thread.
        stream = in_order(jobs, len(jobs), self.workers)
        with naming_lost_workers(), pairs_bar(self.progress, "images") as bar:
            task = bar.add_task(f"Images of {self.source.name}", total=update.total, completed=update.done)
            for part, own in zip(parts, batches, strict=True):
                read: list[Loaded] = []
                vectors: list[Tensor] = []
                for loaded, each in zip(islice(stream, len(own)), own, strict=True):
                    if loaded.pixels is not None:
                        vectors.append(image_vectors(self.model, loaded.pixels, self.manifest.model.precision))
                    loaded.pixels = None
                    read.append(loaded)
                    bar.advance(task, len(each))
                self._keep(read, vectors, update, len(part))

    def _keep(self, read: Sequence[Loaded], vectors: Sequence[Tensor], update: Update, count: int) -> None:
        """Write a part, then the manifest that names it."""
        manifest = self.manifest
        skipped, uncaptioned = SkipCounter.from_dict(update.skipped), SkipCounter.from_dict(update.uncaptioned)
        for loaded in read:
            skipped.merge(loaded.skipped)
            uncaptioned.merge(loaded.uncaptioned)
        if vectors:
            rows = [
                Row(manifest.next_id + number, *fields)
                for number, fields in enumerate(fields for loaded in read for fields in loaded.rows())
            ]
            found = torch.cat(list(vectors))
            _check_finite(found, rows)
            manifest.dimension = found.shape[1]
            of_captions = None
            if manifest.captions:
                texts = [row.captions for row in rows]
                of_captions = caption_vectors(self.model, texts, manifest.dimension, manifest.model.precision)
            batch = batch_of(manifest, rows, found, of_captions)
            manifest.parts = [*manifest.parts, write_part(self.store.folder, next_number(manifest), batch)]
            manifest.next_id += len(rows)
        update.done += count
        update.skipped, update.uncaptioned = skipped.to_dict(), uncaptioned.to_dict()
        manifest.save(self.store.folder)


def _check_finite(vectors: Tensor, rows: Sequence[Row]) -> None:
    wrong = ~vectors.isfinite().all(1)
    if wrong.any():
        key = printable(rows[int(wrong.nonzero()[0, 0])].key)
        raise UserError(
            f"The model gives no number for '{key}' and {int(wrong.sum()) - 1:,} more: its weights or the precision "
            "are at fault. Try --precision fp32, or another checkpoint."
        )


def _approximate(store: Store, model: Encoder, wanted: bool | None) -> None:
    """Make the approximate index, or bring the one there up to date, where that is asked for or due."""
    there = store.manifest.approximate
    if wanted is False or (there is not None and there.covered == store.manifest.next_id):
        return
    if wanted is None and there is None:
        if len(store.live) <= EXACT_UP_TO:
            return
        try:
            import_faiss()
        except UserError as error:
            log.warning("All search is exact. %s", error)
            return
    refresh_approximate(store, caption_encoder(model))


def _check_same(there: Manifest, wanted: Manifest, folder: Path) -> None:
    """Refuse an index of something else."""
    if there.model.fingerprint != wanted.model.fingerprint:
        raise UserError(
            f"'{folder}' holds vectors of another model ('{there.model.spec or 'a Python object'}'). Vectors of two "
            "models cannot be compared. Give that model, or choose another folder with --out."
        )
    pairs = (
        ("source", there.source.spec or there.source.name, wanted.source.spec or wanted.source.name),
        ("image_column", there.source.image_column, wanted.source.image_column),
        ("caption_column", there.source.caption_column, wanted.source.caption_column),
        ("image_root", there.source.image_root, wanted.source.image_root),
        ("dtype", there.dtype, wanted.dtype),
        ("precision", there.model.precision, wanted.model.precision),
        ("captions", there.captions, wanted.captions),
    )
    if changed := [f"{name} was {old!r}, now {new!r}" for name, old, new in pairs if old != new]:
        raise UserError(
            f"'{folder}' holds an index of another source or option: {'; '.join(changed)}. Give the same, or choose "
            "another folder with --out."
        )


def _spec(given: object) -> str:
    """What will mean the same from another folder: whole paths, else the word as given; empty for an object."""
    if not isinstance(given, str | Path):
        return ""
    path = Path(given).expanduser()
    if path.exists():
        return str(path.resolve())
    if names_shards(str(given)):
        return "::".join(each if is_url(each) else os.path.abspath(each) for each in str(given).split("::"))
    return str(given)
