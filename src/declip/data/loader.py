"""Batches in order, for ever, from any step: assembled ahead by worker processes, broken pairs counted."""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from declip.data.assembly import Assembler, SecondText
from declip.data.batch import PairBatch
from declip.data.checks import check_range
from declip.data.pair import SkipCounter
from declip.errors import UserError

if TYPE_CHECKING:
    from declip.data.images.crops import ImageViews
    from declip.data.pair import BrokenPair, PairSource
    from declip.data.text.caption_tokenizer import CaptionTokenizer

SEEN_BEFORE_STOPPING = 100
"""Pairs seen before the share of broken ones can stop a run: fewer say little about the whole."""


class PairLoader(Iterator[PairBatch]):
    """Yields the batch of step `start_step`, the next, and so on without end.

    A batch is a function of its step alone (see `Assembler`), so any number of workers gives the same batches,
    and a loader started at a step continues bit for bit where another was stopped. A pair that cannot be used
    is left out, so its batch is smaller, possibly empty; it is counted in `skipped` when its batch is yielded.

    Args:
        source: Where pairs come from; it is shared with, or pickled to, the workers.
        tokenizer: Makes ids of captions.
        image_views: Draws the image views; its `finish` completes the images of a batch.
        batch: Pairs a step.
        seed: Not negative.
        image_view_count: 1 or 2, and one more with a base view.
        text_view_count: 1, or 2 with the EDA augmentation.
        mask: Whether to corrupt the caption for masked-language modelling.
        mask_probability: Share of the tokens chosen for it.
        eda_alpha: Share of the words that the augmentation changes.
        keyword_append_prob: Share of the captions that some of the pair's keywords are appended to.
        keyword_only_prob: Share of the captions that some of the pair's keywords replace.
        second_text: What the second text view is, see `Assembler`.
        workers: Processes that assemble batches; 0 does it in this one.
        max_broken_fraction: Largest share of pairs that may be broken, once 100 were seen.
        start_step: The first step to yield.
        pin_memory: Put the batches into page-locked memory, for faster copies to an accelerator.
        base_view: Draws the first view instead, of the same size: SLIP's milder one for the contrast.
        shuffle_buffer: Pairs that are shuffled at a time, see `Assembler`.
        resample: Whether each step draws its pairs anew.
        scaled_decode: Whether a JPEG may be decoded no larger than its crops need, see `Assembler`.
        rank, ranks: Which part of each batch to yield, of how many; with several, `count` is for the caller to call.

    Raises:
        UserError: An option is out of its range, an epoch shows fewer pairs than a batch; while iterating,
            when too many pairs are broken, or a worker was lost.
    """

    def __init__(
        self,
        source: PairSource,
        tokenizer: CaptionTokenizer,
        image_views: ImageViews,
        *,
        batch: int,
        seed: int,
        image_view_count: int = 2,
        text_view_count: int = 2,
        mask: bool = True,
        mask_probability: float = 0.15,
        eda_alpha: float = 0.1,
        keyword_append_prob: float = 0.0,
        keyword_only_prob: float = 0.0,
        second_text: SecondText = "eda",
        workers: int = 0,
        max_broken_fraction: float = 0.05,
        start_step: int = 0,
        pin_memory: bool = False,
        base_view: ImageViews | None = None,
        shuffle_buffer: int | None = None,
        resample: bool = False,
        scaled_decode: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        check_range("workers", workers, 0)
        check_range("max_broken_fraction", max_broken_fraction, 0, 1)
        check_range("start_step", start_step, 0)
        self._assembler = Assembler(
            source,
            tokenizer,
            image_views,
            batch=batch,
            seed=seed,
            image_view_count=image_view_count,
            text_view_count=text_view_count,
            mask=mask,
            mask_probability=mask_probability,
            eda_alpha=eda_alpha,
            keyword_append_prob=keyword_append_prob,
            keyword_only_prob=keyword_only_prob,
            second_text=second_text,
            base_view=base_view,
            shuffle_buffer=shuffle_buffer,
            resample=resample,
            scaled_decode=scaled_decode,
            rank=rank,
            ranks=ranks,
        )
        self.step = start_step
        """The step of the batch that comes next."""
        self.skipped = SkipCounter()
        """The broken pairs of the batches yielded so far."""
        self.seen = 0
        """The pairs of the batches yielded so far, broken ones included."""
        self._workers, self._pin_memory = workers, pin_memory
        self._max_broken_share = max_broken_fraction
        self._batches: Iterator[PairBatch | UserError] | None = None
        self._closed = False

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the source."""
        return self._assembler.steps_per_epoch

    def __next__(self) -> PairBatch:
        """Yield the batch of `step` and count its broken pairs."""
        if self._closed:
            raise StopIteration
        if self._batches is None:
            self._batches = self._start()
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or "Traceback" in str(error):
                raise
            self.close()
            raise UserError(
                f"A process that loads data was lost at step {self.step}: {error} Most often memory, or shared "
                "memory, ran out. Use fewer workers (0 loads in the training process) or a smaller batch."
            ) from error
        if isinstance(batch, UserError):
            self.close()
            raise batch
        self.step += 1
        if self._assembler.ranks == 1:
            self.count(len(batch), batch.skipped)
        return batch

    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step's batch, (batch,) int64 places in the source."""
        return self._assembler.indices(step)

    def words(self, tag: int, view: int) -> str:
        """The text that the pair `tag` (epoch * len(source) + index) showed as text view 0 or 1.

        Raises:
            UserError: There is no such view.
            BrokenPair: The pair can no longer be read.
        """
        return self._assembler.words(tag, view)

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
            worker_init_fn=_leave_interrupts_to_the_main_process,
            # Without a generator of its own the loader would draw from torch's global one.
            generator=torch.Generator(),
            # Forked workers share the source's memory, start at once, and need no `if __name__ == "__main__"` in
            # a user's script. It is safe here: they use one thread each, as every DataLoader worker, so none
            # waits for a thread that the fork left behind; and they never touch an accelerator.
            multiprocessing_context="fork" if self._workers and sys.platform == "linux" else None,
        )
        return iter(loader)

    def count(self, usable: int, skipped: Sequence[BrokenPair]) -> None:
        """Add a batch to the counts; on one process a batch is counted when it is yielded, on many by the trainer.

        Args:
            usable: Pairs of all ranks' parts of the batch that can be used.
            skipped: The others.

        Raises:
            UserError: Too many pairs are broken.
        """
        self.seen += usable + len(skipped)
        for broken in skipped:
            self.skipped.add(broken)
        share = self.skipped.share(self.seen)
        if self.seen < SEEN_BEFORE_STOPPING or share <= self._max_broken_share:
            return
        self.close()
        reasons = "; ".join(
            f"{row['count']} x {reason}, such as {', '.join(row['examples'])}"
            for reason, row in self.skipped.to_dict()["reasons"].items()
        )
        raise UserError(
            f"{self.skipped.total} of the {self.seen} pairs seen ({share:.1%}) could not be used, more than "
            f"max_broken_fraction = {self._max_broken_share:.1%} allows: {reasons}. Mend or remove them, or allow a "
            "larger share as data.max_broken_fraction."
        )


class _Steps(Dataset):
    """The batches by step, as the workers make them; a user's mistake is handed over, not raised over there."""

    def __init__(self, assembler: Assembler) -> None:
        self.assembler = assembler

    def __getitem__(self, step: int) -> PairBatch | UserError:
        try:
            return self.assembler[step]
        except UserError as error:
            return error


def _leave_interrupts_to_the_main_process(_: int) -> None:
    """Ignore Ctrl-C in a worker: the main process gets it too, finishes its step and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
