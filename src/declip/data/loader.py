"""An endless iterator of batches from any step on: assembled ahead by worker processes, broken pairs counted."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from declip.data.assembly import Assembler
from declip.data.batch import PairBatch
from declip.data.cached import CachedFeatures, VariantAssembler
from declip.data.pair import SkipCounter
from declip.errors import UserError
from declip.io.pool import leave_signals_to_main, naming_lost_workers
from declip.recipe.schema import Data

if TYPE_CHECKING:
    from declip.data.pair import BrokenPair, PairSource
    from declip.data.plan import Plan
    from declip.data.text.caption_tokenizer import CaptionTokenizer

SEEN_BEFORE_STOPPING = 100
"""Pairs seen before the fraction of broken ones can stop a run: fewer say little about the whole."""


class PairLoader(Iterator[PairBatch]):
    """Yields the batch of step `start_step`, the next, and so on without end.

    A batch is a function of its step alone (see `Assembler`), so any number of workers gives the same batches, and a
    loader started at a step continues bit-exactly where another was stopped. A broken pair is left out, so its batch is
    smaller, possibly empty; it is counted in `skipped` when its batch is yielded.

    Args:
        workers: Processes that assemble batches; 0 does it in this one.
        pin_memory: Put batches into page-locked memory, for accelerators.
        features: Given in place of views and token ids.
    """

    def __init__(
        self,
        source: PairSource,
        tokenizer: CaptionTokenizer,
        plan: Plan,
        *,
        batch_size: int,
        seed: int,
        data: Data | None = None,
        workers: int = 0,
        start_step: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        ranks: int = 1,
        features: CachedFeatures | None = None,
    ) -> None:
        data = data or Data()
        options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "data": data, "rank": rank, "ranks": ranks}
        if features is None:
            self._assembler = Assembler(source, tokenizer, plan, **options)
        else:
            self._assembler = VariantAssembler(
                source, tokenizer, plan, variants=len(features.image_rows), features=features, **options
            )
        self.step = start_step  # of the next batch
        self.skipped = SkipCounter()  # of the batches yielded so far, as is `seen`, which counts all pairs
        self.seen = 0
        self.steps_per_epoch = self._assembler.steps_per_epoch
        self.indices, self.words = self._assembler.indices, self._assembler.words
        self._workers, self._pin_memory = workers, pin_memory
        self._max_broken_fraction = data.max_broken_fraction
        self._batches: Iterator[PairBatch | UserError] | None = None
        self._closed = False

    def __next__(self) -> PairBatch:
        if self._closed:
            raise StopIteration
        if self._batches is None:
            self._batches = self._start()
        with naming_lost_workers(f" at step {self.step}"):
            batch = next(self._batches)
        if isinstance(batch, UserError):
            self.close()
            raise batch
        self.step += 1
        if self._assembler.ranks == 1:
            self.count(len(batch), batch.skipped)
        return batch

    def close(self) -> None:
        """End the workers; nothing more is yielded. Closing twice is harmless."""
        self._closed = True
        # The iterator ends its processes when the last reference to it goes.
        self._batches = None

    def __enter__(self) -> PairLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> Iterator[PairBatch | UserError]:
        loader: DataLoader[PairBatch | UserError] = DataLoader(
            _Steps(self._assembler),
            batch_size=None,
            sampler=itertools.count(self.step),
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            worker_init_fn=leave_signals_to_main,
            # Without its own generator the loader would advance torch's global one.
            generator=torch.Generator(),
            # Forked workers share the source's memory, start at once, and need no `if __name__ == "__main__"` in a
            # user's script. It is safe here: they use one thread each, as every DataLoader worker, so none waits for a
            # thread that the fork left behind, and they never touch an accelerator.
            multiprocessing_context="fork" if self._workers and sys.platform == "linux" else None,
        )
        return iter(loader)

    def count(self, usable: int, skipped: Sequence[BrokenPair]) -> None:
        """Add a batch of `usable` and `skipped` pairs of all ranks; with one rank `__next__` does it."""
        self.seen += usable + len(skipped)
        for broken in skipped:
            self.skipped.add(broken)
        fraction = self.skipped.fraction(self.seen)
        if self.seen < SEEN_BEFORE_STOPPING or fraction <= self._max_broken_fraction:
            return
        self.close()
        raise UserError(
            f"{self.skipped.total} of the {self.seen} pairs seen ({fraction:.1%}) could not be used; "
            f"data.max_broken_fraction allows {self._max_broken_fraction:.1%}. {self.skipped.explanation()} "
            "Fix or remove them, or raise data.max_broken_fraction."
        )


class _Steps(Dataset):
    """The batches by step, as workers make them; a `UserError` is returned, to be raised in the main process."""

    def __init__(self, assembler: Assembler) -> None:
        self.assembler = assembler

    def __getitem__(self, step: int) -> PairBatch | UserError:
        try:
            return self.assembler[step]
        except UserError as error:
            return error
