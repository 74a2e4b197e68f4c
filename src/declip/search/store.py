"""The rows of an index as they lie on the disk: which are alive, where each is, and their vectors."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from declip.errors import UserError
from declip.search.changes import Known
from declip.search.exact import Block
from declip.search.manifest import read_manifest
from declip.search.parts import OpenPart, Row

CHECKED_BYTES = 2 << 30
"""Of all parts together, up to which their checksums are looked at: two seconds or so. Beyond, only their sizes are."""

Over = Literal["images", "captions"]


class Store:
    """An index's rows, mapped into memory.

    Args:
        folder: The index.
        check: Whether the checksums of the parts are looked at; None where they are small enough, `CHECKED_BYTES`.

    Attributes:
        manifest: Its manifest.
        ids: (rows,) int64 of all rows, rising.
        dead: (rows,) bool, those that no search finds.

    Raises:
        UserError: There is no index, or it is damaged.
    """

    def __init__(self, folder: Path, check: bool | None = None) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        if check is None:
            check = sum(part.bytes for part in self.manifest.parts) <= CHECKED_BYTES
        self.parts = [OpenPart(folder, self.manifest, part, check) for part in self.manifest.parts]
        self.ids = np.concatenate([np.empty(0, np.int64), *(part.ids for part in self.parts)])
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])
        if (np.diff(self.ids) <= 0).any() or (self.ids >= self.manifest.next_id).any():
            raise UserError(f"The index '{folder}' is damaged: its parts do not follow each other. Bring back a copy.")
        hidden = np.array([*self.manifest.removed, *self.manifest.gone], np.int64)
        self.dead = np.isin(self.ids, hidden)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def live(self) -> np.ndarray:
        """(n,) int64, positions of the rows that a search finds."""
        return np.flatnonzero(~self.dead)

    def blocks(self, over: Over = "images", first: int = 0) -> list[Block]:
        """What exact search goes through: images' or captions' vectors of the rows whose id is `first` or more."""
        found = []
        for part, start in zip(self.parts, self._starts, strict=False):
            skipped = int(np.searchsorted(part.ids, first))
            vectors = self._vectors(part, over)
            if skipped < len(part):
                dead = torch.from_numpy(self.dead[start + skipped : start + len(part)])
                if over == "captions":  # a row without captions has zeros, which no search may find
                    dead = dead | ~vectors[skipped:].any(1)
                ids = torch.from_numpy(np.array(part.ids[skipped:]))
                found.append(Block(ids, vectors[skipped:], dead if bool(dead.any()) else None))
        return found

    def positions(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) int64, where rows are.

        Raises:
            UserError: One does not exist, or is hidden.
        """
        wanted = np.asarray(ids, np.int64)
        found = np.searchsorted(self.ids, wanted).clip(0, max(0, len(self) - 1))
        for id_, position in zip(wanted.tolist(), found.tolist(), strict=True):
            if not len(self) or self.ids[position] != id_ or self.dead[position]:
                raise UserError(f"The index '{self.folder}' has no image with the id {id_}.")
        return found

    def vectors(self, positions: np.ndarray, over: Over = "images") -> Tensor:
        """(n, d) float32."""
        found = torch.empty(len(positions), self.manifest.dimension)
        owners = np.searchsorted(self._starts, positions, "right") - 1
        for number in np.unique(owners):
            mine = np.flatnonzero(owners == number)
            rows = torch.from_numpy(positions[mine] - self._starts[number])
            found[torch.from_numpy(mine)] = self._vectors(self.parts[number], over)[rows].float()
        return found

    def row(self, position: int) -> Row:
        """The row at a position."""
        number = int(np.searchsorted(self._starts, position, "right")) - 1
        return self.parts[number].row(int(position - self._starts[number]))

    def first_captions(self) -> list[str]:
        """Of the rows that a search finds, each one's first caption, empty where it has none."""
        columns = (part.batch.column("captions") for part in self.parts)
        texts = [own[0].as_py() if len(own) else "" for column in columns for own in column]
        return [texts[position] for position in self.live.tolist()]

    def keys(self) -> list[str]:
        """Of the rows that a search finds, in order."""
        keys = [key for part in self.parts for key in part.batch.column("key").to_pylist()]
        return [keys[position] for position in self.live.tolist()]

    def known(self, before: int) -> Iterator[Known]:
        """The rows whose id is below `before`."""
        for part in self.parts:
            columns = (part.batch.column(name).to_pylist() for name in ("id", "key", "stamp"))
            yield from (Known(*row) for row in zip(*columns, strict=True) if row[0] < before)

    def ids_of(self, keys: Sequence[str]) -> dict[str, list[int]]:
        """The ids of all rows with these keys, hidden ones too; a key that no row has is not in it."""
        wanted, found = set(keys), dict[str, list[int]]()
        for part in self.parts:
            for id_, key in zip(part.ids.tolist(), part.batch.column("key").to_pylist(), strict=True):
                if key in wanted:
                    found.setdefault(key, []).append(id_)
        return found

    def _vectors(self, part: OpenPart, over: Over) -> Tensor:
        if over == "images":
            return part.vectors
        if part.captions is None:
            raise UserError(
                f"The index '{self.folder}' has no vectors of captions. Embed with --captions, into another folder."
            )
        return part.captions
