"""A process that takes runs of a comparison until none is left: `python -m declip.comparison.worker FOLDER THREADS`."""

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from filelock import FileLock, Timeout

from declip.comparison.study import Cell, Study, read_study
from declip.comparison.trial import CELLS, folder_of, read_cell, run_cell
from declip.errors import UserError

FAILURE = "failure.txt"
TUNING, RUNS = "tuning", "runs"


def work(folder: Path, part: str, threads: int | None = None) -> bool:
    """Take every run that is neither done nor taken by another process; a run that fails is left with its reason.

    Args:
        folder: The comparison's folder, with its plan.
        part: `TUNING` or `RUNS`.
        threads: Of torch.

    Returns:
        False when asked to stop.
    """
    study = read_study(folder)
    assert study is not None, "the comparison writes its plan before it starts a worker"
    (folder / CELLS).mkdir(exist_ok=True)
    return all(_take(study, cell, folder, threads) for cell in cells_of(study, part))


def cells_of(study: Study, part: str) -> list[Cell]:
    """The runs of a part of the study."""
    return study.tuning_cells() if part == TUNING else study.cells()


def failure(folder: Path, cell: Cell) -> str | None:
    """Why a run failed, None when it did not."""
    path = folder_of(folder, cell) / FAILURE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _take(study: Study, cell: Cell, folder: Path, threads: int | None) -> bool:
    """Run a cell unless it is done or taken. The lock goes with the process, so a killed one leaves none behind."""
    own = folder_of(folder, cell)
    try:
        with FileLock(f"{own}.lock", blocking=False):
            if read_cell(folder, cell) is not None:
                return True
            (own / FAILURE).unlink(missing_ok=True)
            try:
                return run_cell(study, cell, folder, threads)
            except UserError as error:
                _leave_reason(own, str(error))
            except Exception:
                _leave_reason(own, traceback.format_exc())
    except Timeout:
        pass
    return True


def _leave_reason(own: Path, reason: str) -> None:
    own.mkdir(parents=True, exist_ok=True)
    (own / FAILURE).write_text(reason, encoding="utf-8")


def _stop_with_parent(parent: int) -> None:
    """Ask for a polite stop when the process that started this one is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Read the arguments, work, and end with status 130 when asked to stop."""
    folder, part, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # between two runs; during one the trainer's own counts
    threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        finished = work(folder, part, threads)
    except KeyboardInterrupt:
        finished = False
    sys.exit(0 if finished else 130)


if __name__ == "__main__":
    main()
