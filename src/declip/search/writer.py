"""Write an index: in parts, which a killed call continues, joined into a new generation at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from declip.data.pair import SkipCounter
from declip.data.sources.stored_paths import resolve
from declip.errors import UserError
from declip.io.atomic import ELSEWHERE, locked_folder, remove, sha256, write_text
from declip.search.info import INFO, FileInfo, IndexInfo, InfoSection
from declip.search.store import Block, Store, write_blocks

UNFINISHED, STATE = ".unfinished", "state.json"  # the folder of the parts, and the file that makes a part count


class State(InfoSection):
    """What an unfinished call has done."""

    info: IndexInfo  # as it will be; `generation` is the one that it started from
    parts: int = 0
    reached: int = 0  # place in the source after the last one that the parts cover


class Writer:
    """Adds parts to an index in a locked folder; readers see nothing of them before `finish`.

    Args:
        wanted: The description of the index to write; raises `UserError` if the folder holds an index, or the parts of
            one, of another model, source or option.
    """

    def __init__(self, folder: Path, wanted: IndexInfo) -> None:
        self.folder, self._unfinished = folder, folder / UNFINISHED
        self.current = IndexInfo.read(folder) if (folder / INFO).is_file() else None
        self._remove_leftovers()
        fresh = wanted.model_copy(deep=True)
        if self.current is not None:
            _check_same(folder, self.current, wanted)
            for name in ("created", "generation", "next_id", "dimension"):
                setattr(fresh, name, getattr(self.current, name))
        self.state = self._read_state() or State(info=fresh)
        _check_same(folder, self.state.info, wanted)
        self.state.info.model = wanted.model  # its path may have changed
        self.state.info.source = wanted.source
        self.stores = [open_files(folder, self.current)] if self.current is not None else []
        for number in range(self.state.parts):
            self.stores.append(Store(self._part(number), folder, self.state.info))

    def add(self, block: Block | None, reached: int) -> None:
        """Write a part; None if none of its images could be read."""
        if block is not None:
            self.state.info.dimension = block.matrices["images"].shape[1]
            self.state.info.next_id += len(block.table)
            path = self._part(self.state.parts)
            write_blocks(path, [block], len(block.table))
            self.state.parts += 1
            self.stores.append(Store(path, self.folder, self.state.info))
        self.state.reached = reached
        write_text(self._unfinished / STATE, self.state.model_dump_json(), durable=True)

    def finish(self, gone: set[int], skipped: SkipCounter) -> None:
        """Join the rows, without those in `gone`, into a new generation, and make it the index."""
        info = self.state.info
        info.skipped = skipped.to_dict()
        kept = [~np.isin(store.ids, list(gone)) for store in self.stores]
        info.rows = int(sum(mask.sum() for mask in kept))
        if self.state.parts or not all(mask.all() for mask in kept):
            info.generation += 1
            target = generation_folder(self.folder, info)
            blocks = chain.from_iterable(map(Store.blocks, self.stores, kept))
            write_blocks(target, blocks, info.rows)
            info.files = {
                path.name: FileInfo(bytes=path.stat().st_size, sha256=sha256(path)) for path in sorted(target.iterdir())
            }
        elif self.current is not None:
            info.files = self.current.files
        info.save(self.folder)  # from here on readers see the new rows
        self.current = info
        self._remove_leftovers()

    def _part(self, number: int) -> Path:
        return self._unfinished / f"part-{number:06d}"

    def _read_state(self) -> State | None:
        path = self._unfinished / STATE
        try:
            return State.model_validate_json(path.read_bytes()) if path.is_file() else None
        except (OSError, ValidationError):
            raise UserError(f"'{path}' is damaged. Remove the folder '{path.parent}' to start again.") from None

    def _remove_leftovers(self) -> None:
        """Remove files that a killed call left: other generations, and parts that were joined already."""
        generation = self.current.generation if self.current is not None else 0
        for path in self.folder.glob("generation-*"):
            if self.current is None or path != generation_folder(self.folder, self.current):
                remove(path)
        state = self._read_state()
        if state is not None and state.info.generation != generation:
            remove(self._unfinished)


@contextmanager
def open_writer(folder: Path, wanted: IndexInfo) -> Iterator[Writer]:
    """Lock the folder of an index, created if missing, and open it for writing."""
    with locked_folder(folder, INFO, ELSEWHERE):
        yield Writer(folder, wanted)


def open_index(folder: Path) -> tuple[IndexInfo, Store]:
    """Open the newest generation of an index, also while another process writes the next one."""
    info = IndexInfo.read(folder)
    while True:
        try:
            return info, open_files(folder, info)
        except FileNotFoundError as error:
            newer = IndexInfo.read(folder)  # the generation was replaced after its name was read
            if newer.generation == info.generation:
                raise UserError(
                    f"A file of the index '{folder}' is missing ({error}). Restore a copy, or embed again into "
                    "another folder."
                ) from error
            info = newer


def open_files(folder: Path, info: IndexInfo) -> Store:
    """Open the files that index.json names, after comparing their sizes."""
    files = generation_folder(folder, info)
    for name, expected in info.files.items():
        size = (files / Path(name).name).stat().st_size
        if size != expected.bytes:
            raise UserError(
                f"'{files / name}' is damaged: {size:,} bytes instead of {expected.bytes:,}. Restore a copy, or embed "
                "again into another folder."
            )
    return Store(files, folder, info)


def generation_folder(folder: Path, info: IndexInfo) -> Path:
    """The folder with the files of a generation."""
    return folder / f"generation-{info.generation}"


def _check_same(folder: Path, before: IndexInfo, now: IndexInfo) -> None:
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
            f"'{folder}' holds an index of another model, source or option: {'; '.join(changed)}. Give the same, or "
            "choose another folder with --out."
        )
