"""Checkpoints written by a thread, so that training waits for a copy in memory and not for the disk."""

import logging
from pathlib import Path
from threading import Thread
from types import TracebackType

from declip.errors import UserError
from declip.runs.checkpoint import Checkpoint, snapshot, write_snapshot

log = logging.getLogger("declip")


class CheckpointWriter:
    """Writes checkpoints in a thread; at most one is under way.

    It holds one copy of the checkpoint in host memory, used again each time. Writing and hashing leave Python's lock
    to the training thread. Python waits for the thread before it exits, so a normal end loses nothing.

    Args:
        run: The run folder.
        keep: How many checkpoints stay, at least 1.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self._run, self._keep = run, keep
        self._memory: Checkpoint | None = None
        self._thread: Thread | None = None
        self._failed: Exception | None = None

    def write(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint into host memory and start to write it; waits for the one before.

        Raises:
            UserError: what the writing of the one before met; the new one is not written then.
        """
        self.wait()
        self._memory = snapshot(checkpoint, self._memory)
        self._thread = Thread(target=self._save, args=(self._memory,), name=f"checkpoint of step {checkpoint.step}")
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was given is on the disk.

        Raises:
            UserError: it could not be written; see `write_snapshot`. It is raised once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def close(self) -> None:
        """Wait for the disk and let go of the memory; another `write` may follow.

        Raises:
            UserError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._memory = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except UserError as failed:
            if error is None:
                raise
            log.error("%s", failed)  # what ended the block matters more

    def _save(self, kept: Checkpoint) -> None:
        try:
            write_snapshot(self._run, kept, self._keep)
        except Exception as error:  # whatever it is, it belongs to the training thread
            self._failed = error
