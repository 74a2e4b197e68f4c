"""Long work beside the server: done once, one piece after the other, with its progress to be asked for."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from declip.errors import UserError

log = logging.getLogger("declip")

Progress = Callable[[float], None]
"""Takes the share that is done, 0 to 1."""


@dataclass
class Job:
    """A piece of work.

    Attributes:
        share: Done, 0 to 1.
        result: Once it is there.
        error: Why there will be none.
    """

    share: float = 0.0
    result: Any = None
    error: str = ""

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self.result is not None

    def state(self) -> dict[str, Any]:
        """As the page shows it."""
        return {"state": "failed" if self.error else "ready" if self.done else "working", "share": self.share,
                "error": self.error}  # fmt: skip


class Stopped(Exception):
    """The server ends, so the work does."""


class Jobs:
    """Work by name: started when it is first asked for."""

    def __init__(self) -> None:
        self._jobs: dict[object, Job] = {}
        self._lock, self._turn, self._stop = threading.Lock(), threading.Lock(), threading.Event()

    def get(self, name: object, work: Callable[[Progress], Any]) -> Job:
        """The job of a name; it is begun if it was not yet.

        Args:
            name: Anything hashable.
            work: Does it, tells how far it is, and returns something other than None.
        """
        with self._lock:
            if name not in self._jobs:
                self._jobs[name] = Job()
                threading.Thread(target=self._run, args=(self._jobs[name], work), daemon=True).start()
            return self._jobs[name]

    def stop(self) -> None:
        """End what runs when it next tells its progress."""
        self._stop.set()

    def _run(self, job: Job, work: Callable[[Progress], Any]) -> None:
        def tell(share: float) -> None:
            if self._stop.is_set():
                raise Stopped
            job.share = share

        try:
            with self._turn:
                tell(0.0)
                job.result = work(tell)
        except Stopped:
            job.error = "The server has ended."
        except UserError as error:
            job.error = str(error)
        except Exception:
            log.exception("The work was cut short.")
            job.error = "Something went wrong; the terminal says what."
