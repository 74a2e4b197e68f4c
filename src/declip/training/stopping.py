"""Early ends of a run: by a signal, or because its evaluations no longer improve."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from types import FrameType
from typing import Any

from declip.evaluation.results import Result, RetrievalResult, ZeroShotResult
from declip.recipe.schema import Evaluation
from declip.runs.folder import log

# Exit status of a run that was stopped from outside and should be queued again (EX_TEMPFAIL of sysexits.h). Under
# torchrun it is 0, because torchrun restarts a run after any other status.
TRY_AGAIN = 75

# Windows has no SIGUSR1.
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """Whether the run should stop, and by which signal; 0 for none."""

    def __init__(self) -> None:
        self.asked, self.signal = False, 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals `STOPS`; after the first one, Ctrl-C ends the process at once.

        Further SIGTERM and SIGUSR1 are ignored: a scheduler signals all processes of a job, and torchrun forwards them
        too. Only the main thread can catch signals; in another thread this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def catch(number: int, frame: FrameType | None) -> None:
            if self.signal:
                return
            self.asked, self.signal = True, number
            log.info("Stopping after this step and saving; Ctrl-C from now on stops at once, without saving.")
            signal.signal(signal.SIGINT, earlier[signal.SIGINT])

        earlier: dict[int, Any] = {number: signal.signal(number, catch) for number in STOPS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)


@dataclass
class BestEvaluation:
    """The best evaluation of a run, which ends after `train.patience` others that were not better.

    R@1 decides, and the loss where it is equal: on few pairs the loss is lowest long before retrieval is best.
    """

    step: int = -1  # steps done before it; 0 for the pretrained weights
    score: float = -1.0
    loss: float = 0.0
    stale: int = 0  # evaluations since

    def update(self, step: int, results: Sequence[Result], evaluation: Evaluation) -> bool:
        """Record an evaluation; return whether it is the best so far.

        Its score is the mean R@1 of both directions on the recipe's retrieval sets or, without one, the mean top-1.
        """
        found = [r for r in results if isinstance(r, RetrievalResult) and r.dataset in evaluation.retrieval]
        classified = [r for r in results if isinstance(r, ZeroShotResult) and r.dataset in evaluation.zero_shot]
        score, loss = (
            fmean(r.headline.value for r in found or classified),
            fmean([r.loss or 0.0 for r in found] or [0.0]),
        )
        if better := (score, -loss) > (self.score, -self.loss):
            self.step, self.score, self.loss, self.stale = step, score, loss, 0
        else:
            self.stale += 1
        return better
