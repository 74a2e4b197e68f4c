"""Write an index: in parts, which a killed call continues, joined into a new generation at the end."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np

from declip.data.pair import SkipCounter
from declip.data.sources.shard_files import resolve, stored_path
from declip.errors import UserError
from declip.evaluation.encode import Encoder
from declip.io.atomic import ELSEWHERE, locked_folder, remove
from declip.models.inference import fingerprint
from declip.search.info import INFO, IndexInfo, ModelInfo
from declip.search.store import Block, Store, write_blocks

UNFINISHED = ".unfinished"  # folder of the parts: "part-NUMBER-REACHED", with an index.json as it was when they began


class Writer:
    """Adds parts to an index in a locked folder; readers see nothing of them before `finish`.

    An index, or parts of one, of another model, source or option than wanted are refused.
    """

    def __init__(self, folder: Path, wanted: IndexInfo) -> None:
        self.folder, self._unfinished = folder, folder / UNFINISHED
        self.current = IndexInfo.read(folder) if (folder / INFO).is_file() else None
        self._remove_leftovers()
        # --- go on from the parts of a killed call, or from the index
        self.info, self.precision = wanted.model_copy(deep=True, update={"precision": ""}), wanted.precision
        begun = IndexInfo.read(self._unfinished) if (self._unfinished / INFO).is_file() else self.current
        if begun is not None:
            check_same(folder, begun, wanted)
            for name in ("created", "generation", "next_id", "dimension", "precision"):
                setattr(self.info, name, getattr(begun, name))
        # --- the rows so far; a part's name tells the next free id and the place that it reached
        self.stores = [] if self.current is None else [Store(_files(folder, self.current), folder, self.current)]
        found = self._unfinished.glob("part-*")
        self._parts = sorted(path for path in found if re.fullmatch(r"part-\d+-\d+", path.name))
        for path in self._parts:
            self.info.next_id = int(path.name.split("-")[1])
            self.stores.append(Store(path, folder, self.info))
        self.reached = int(self._parts[-1].name.split("-")[2]) if self._parts else 0

    def add(self, block: Block, reached: int) -> None:
        """Write a part."""
        self.info.dimension = block.matrices["images"].shape[1]
        if not self._parts:
            self.info.save(self._unfinished)
        if self.precision not in self.info.precision.split(", "):
            self.info.precision = ", ".join(filter(None, (self.info.precision, self.precision)))
        self.info.next_id += len(block.table)
        self._parts.append(self._unfinished / f"part-{self.info.next_id:012d}-{reached}")
        write_blocks(self._parts[-1], [block], len(block.table))
        self.stores.append(Store(self._parts[-1], self.folder, self.info))

    def finish(self, gone: np.ndarray, skipped: SkipCounter) -> None:
        """Join the rows, without those in `gone`, into a new generation, and make it the index."""
        kept = [~np.isin(store.ids, gone) for store in self.stores]
        changed = self._parts or not all(mask.all() for mask in kept)
        blocks = chain.from_iterable(map(Store.blocks, self.stores, kept)) if changed else None
        self.replace(blocks, int(sum(mask.sum() for mask in kept)), skipped)

    def replace(self, blocks: Iterable[Block] | None, rows: int, skipped: SkipCounter) -> None:
        """Make blocks of `rows` rows the next generation; None: the present one stays."""
        self.info.rows, self.info.skipped = rows, skipped.to_dict()
        if blocks is not None:
            self.info.generation += 1
            write_blocks(_files(self.folder, self.info), blocks, rows)
        self.info.save(self.folder)  # from here on readers see the new rows
        self.current = self.info
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove files that a killed call left: other generations, and parts that were joined already."""
        for path in self.folder.glob("generation-*"):
            if self.current is None or path != _files(self.folder, self.current):
                remove(path)
        begun = IndexInfo.read(self._unfinished) if (self._unfinished / INFO).is_file() else None
        if begun is None or begun.generation != (0 if self.current is None else self.current.generation):
            remove(self._unfinished)


def describe_model(model: Encoder, path: object, index: Path) -> ModelInfo:
    """Describe a model that was loaded from `path`, or is a Python object, for the index in a folder."""
    stored = stored_path(path, index)
    recipe = getattr(model, "recipe", None)
    name = str(path) if stored else f"{type(model).__name__} {getattr(recipe, 'name', '')}".strip()
    return ModelInfo(path=stored, name=name, fingerprint=fingerprint(model))


@contextmanager
def open_writer(folder: Path, wanted: IndexInfo) -> Iterator[Writer]:
    """Lock the folder of an index, created if missing, and open it for writing."""
    # A call that was killed just before its first index.json leaves parts and the first generation.
    killed = (folder / UNFINISHED / INFO).is_file() and not (folder / INFO).exists()
    with locked_folder(folder, "generation-1" if killed else INFO, ELSEWHERE):
        yield Writer(folder, wanted)


def open_index(folder: Path) -> tuple[IndexInfo, Store]:
    """Open the newest generation of an index, also while another process writes the next one."""
    info = IndexInfo.read(folder)
    while True:
        try:
            return info, Store(_files(folder, info), folder, info)
        except FileNotFoundError as error:
            newer = IndexInfo.read(folder)  # the generation was replaced after its name was read
            if newer.generation == info.generation:
                raise UserError(
                    f"A file of the index '{folder}' is missing ({error}). Embed again into another folder."
                ) from error
            info = newer


def _files(folder: Path, info: IndexInfo) -> Path:
    """The folder with the files of a generation."""
    return folder / f"generation-{info.generation}"


def check_same(folder: Path, before: IndexInfo, now: IndexInfo) -> None:
    """Raise a `UserError` if an index was made by another model, of another source, or with other options."""
    changed = []
    if before.model.fingerprint != now.model.fingerprint:
        changed.append(f"the model was {before.model}, now {now.model}")
    one, other = (
        {
            "the source": resolve(info.source.path, folder) or info.source.name,
            **asdict(info.source.columns_of(folder)),
            "dtype": info.dtype,
            "captions": info.captions,
        }
        for info in (before, now)
    )
    changed += [f"{key} was {one[key]!r}, now {other[key]!r}" for key in one if one[key] != other[key]]
    if changed:
        raise UserError(
            f"'{folder}' holds an index of another model or option: {'; '.join(changed)}. Choose another --out."
        )
