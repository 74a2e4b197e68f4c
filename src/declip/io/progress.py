"""Progress on standard error: a bar on a terminal, plain lines in a file or a log; silence of other libraries."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

# seconds before the first plain line, and longest interval between lines
FIRST = 10.0
LONGEST = 30.0
UNITS = {TimeRemainingColumn: " left", TimeElapsedColumn: " elapsed"}


def progress_bar(*columns: Any, progress: bool = True, **options: Any) -> Progress:
    """Create a rich progress bar on standard error, or `PlainProgress` without a terminal."""
    console = Console(stderr=True, quiet=not progress)
    kind = Progress if not progress or console.is_interactive else PlainProgress
    return kind(*columns, console=console, disable=not progress, **options)


def status(text: str, progress: bool = True) -> AbstractContextManager[Any]:
    """Show a spinner with a text on standard error while a block runs, or a line without a terminal."""
    console = Console(stderr=True, quiet=not progress)
    if console.is_interactive:
        return console.status(text)
    print_line(console, f"{text} …")
    return nullcontext()


def print_line(console: Console, text: str) -> None:
    """Print a line without wrapping, colors or markup."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


class PlainProgress(Progress):
    """Prints its columns as a line after 10 s and then at longer intervals, and at the end of a job of 10 s or more."""

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options | {"disable": True})
        self._start = self._printed = self.get_time()
        self._ended: set[TaskID] = set()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        self._print(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print(task_id)

    def _print(self, task_id: TaskID) -> None:
        task = next(task for task in self.tasks if task.id == task_id)
        now = self.get_time()
        last = task.finished and self._printed > self._start and task_id not in self._ended
        interval = min(LONGEST, max(FIRST, (now - self._start) / 10))
        if last or now - self._printed >= interval:
            self._printed = now
            if task.finished:
                self._ended.add(task_id)
            shown = [
                (column, str(column(task)))
                for column in self.columns
                if not isinstance(column, BarColumn | str)
            ]
            words = [
                text + UNITS.get(type(column), "")
                for column, text in shown
                if text and not text.startswith("-:")
            ]
            print_line(self.console, "  ".join(words))


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Show only errors of a library's loggers, and prevent it from adding a handler to the root logger."""
    handler = logging.NullHandler()
    logger = logging.getLogger(library)
    level = logger.level
    logging.root.addHandler(handler)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        logger.setLevel(level)
