"""Signals that stop a run after a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from declip.runs.folder import log

# Exit status of a run that was stopped from outside and should be queued again (EX_TEMPFAIL of sysexits.h). Under
# torchrun it is 0, because torchrun restarts a run after any other status.
TRY_AGAIN = 75

# Windows has no SIGUSR1.
STOPS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


class StopRequest:
    """Whether the run should stop, and by which signal; 0 for none."""

    def __init__(self) -> None:
        self.asked, self.signal = False, 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals `STOPS`; after the first one, Ctrl-C ends the process at once.

        Further SIGTERM and SIGUSR1 are ignored: a scheduler signals all processes of a job, and torchrun forwards them
        too.
        """

        def catch(number: int, frame: FrameType | None) -> None:
            if self.signal:
                return
            self.asked, self.signal = True, number
            log.info(
                "Stopping after this step and saving; Ctrl-C from now on stops at once, without saving."
            )
            signal.signal(signal.SIGINT, earlier[signal.SIGINT])

        can_catch = threading.current_thread() is threading.main_thread()
        earlier: dict[int, Any] = {
            number: signal.signal(number, catch) for number in (STOPS if can_catch else ())
        }
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
