"""Signals that ask a run to end: heard after the current step, so that it can be saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from declip.runs.folder import log

TRY_AGAIN = 75
"""Exit status of a run that was stopped from outside and wants to be queued again (EX_TEMPFAIL of sysexits.h).

Under torchrun it is 0: torchrun would take any other for a failure and start the run again."""

STOP = "stop"
"""A file of this name in the run folder ends the run as SIGTERM does, on every machine that it runs on."""

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stopping_politely(ask: Callable[[int], None]) -> Iterator[None]:
    """Hear Ctrl-C, SIGTERM and SIGUSR1 by calling `ask` with the number; after the first, Ctrl-C acts as before.

    SIGTERM and SIGUSR1 may come again: a scheduler signals all processes of a job, and torchrun passes its own on.
    Only a process's main thread can hear signals; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def heard(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            ask(number)
            log.info("Stopping after this step and saving; Ctrl-C from now on stops at once, without saving.")
            signal.signal(signal.SIGINT, earlier[signal.SIGINT])

    earlier: dict[int, Any] = {each: signal.getsignal(each) for each in STOPS}
    for each in earlier:
        signal.signal(each, heard)
    try:
        yield
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)
