"""An endless iterator of batches from any step on: assembled ahead by worker processes, broken pairs counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from declip.data.assembly import Assembler
from declip.data.batch import PairBatch
from declip.data.pair import SkipCounter
from declip.errors import UserError
from declip.io.pool import computed, naming_lost_workers

if TYPE_CHECKING:
    from declip.data.pair import BrokenPair

SEEN_BEFORE_STOPPING = 100  # pairs, before the fraction of broken ones can stop a run: fewer are too noisy


class PairLoader(Iterator[PairBatch]):
    """Yields the batches of steps `start_step`, `start_step` + 1, and so on without end.

    A batch is a function of its step alone (see `Assembler`), so any number of workers yields the same batches. A
    broken pair is left out of its batch, and counted in `skipped` when the batch is yielded.
    """

    def __init__(
        self,
        assembler: Assembler,
        *,
        start_step: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
        max_broken_fraction: float = 0.05,
    ) -> None:
        self.assembler = assembler
        self.step = start_step  # of the next batch
        self.skipped = SkipCounter()  # of the batches yielded so far, as is `seen`, which counts all pairs
        self.seen = 0
        self.steps_per_epoch = self.assembler.steps_per_epoch
        self.indices = self.assembler.indices
        self._workers, self._pin_memory = workers, pin_memory
        self._max_broken_fraction = max_broken_fraction
        self._batches: Iterator[PairBatch | UserError] | None = None
        self._closed = False

    def __next__(self) -> PairBatch:
        if self._closed:
            raise StopIteration
        if self._batches is None:
            numbers = itertools.count(self.step)
            self._batches = computed(_Steps(self.assembler), numbers, self._workers, self._pin_memory)
        with naming_lost_workers(f" at step {self.step}"):
            batch = next(self._batches)
        if isinstance(batch, UserError):
            self.close()
            raise batch
        self.step += 1
        if self.assembler.ranks == 1:
            self.count(len(batch), batch.skipped)
        return batch

    def close(self) -> None:
        """Stop the workers; no more batches follow. Closing twice has no effect."""
        self._closed = True
        # The iterator stops its processes when the last reference to it is deleted.
        self._batches = None

    def __enter__(self) -> PairLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def count(self, usable: int, skipped: Sequence[BrokenPair]) -> None:
        """Add a batch of `usable` and `skipped` pairs of all ranks; with one rank `__next__` does it."""
        self.seen += usable + len(skipped)
        for broken in skipped:
            self.skipped.add(broken)
        fraction, allowed = self.skipped.total / max(self.seen, 1), self._max_broken_fraction * self.seen
        # Three standard errors are allowed on top: the first pairs may be the broken ones by chance.
        if self.seen < SEEN_BEFORE_STOPPING or self.skipped.total <= allowed + 3 * allowed**0.5:
            return
        self.close()
        raise UserError(
            f"{self.skipped.total} of the {self.seen} pairs seen ({fraction:.1%}) could not be used; "
            f"data.max_broken_fraction allows {self._max_broken_fraction:.1%}. {self.skipped.explanation()} "
            "Fix or remove them, or raise data.max_broken_fraction."
        )


class _Steps(Dataset):
    """Batches by step; a `UserError` is returned and raised in the main process."""

    def __init__(self, assembler: Assembler) -> None:
        self.assembler = assembler

    def __getitem__(self, step: int) -> PairBatch | UserError:
        try:
            return self.assembler[step]
        except UserError as error:
            return error
