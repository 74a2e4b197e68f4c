"""Full or read-only disks, through the command: it ends with a message that says what to do; no traceback."""

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import pytest

from declip.cli import app as cli
from declip.runs.folder import read_rows
from end_to_end.command import Command


@pytest.fixture
def here(wrong_inputs: Path) -> Path:
    return wrong_inputs


@pytest.mark.parametrize(
    ("largest", "says"),
    [(500, ("'run'", "--out")), (4_000, ("--resume",)), (20_000, ("checkpoints/step-00000030",))],
    ids=["recipe", "metrics", "checkpoint"],
)
def test_a_full_disk_is_reported_and_the_run_continues_once_there_is_room(
    largest: int, says: tuple[str, ...], here: Path, declip: Command
) -> None:
    """No file may grow beyond `largest` bytes; the error differs from a full disk's only in its number."""
    words = ["train", "mine.yaml", "train.steps=30", "train.log_every=1", "train.checkpoint_every=100"]
    # Without loader processes: their shared memory is files too.
    words += ["data.workers=0", "--out", "run", "--quiet", "--resume"]
    status, printed = on_a_full_disk(words, largest)
    assert [part for part in ("File too large", *says) if part not in printed] == [], printed
    assert status == 2, printed
    assert "Traceback" not in printed
    assert declip(*words)[0] == 0
    assert [row["step"] for row in read_rows(here / "run" / "metrics.jsonl")] == list(range(1, 31))


def test_a_result_that_does_not_fit_on_the_disk(table: Path, trained: Path, here: Path) -> None:
    words = ["evaluate", str(trained), "--dataset", str(table), "--task", "retrieval", "--json", "result.json"]
    status, printed = on_a_full_disk(words, 10)
    assert status == 2
    assert "R@1" in printed
    assert "'result.json'" in printed
    assert "--json" in printed


def on_a_full_disk(words: list[str], largest: int) -> tuple[int | None, str]:
    """The command in a process of its own whose files are limited; its exit status and all that it printed."""
    fork = multiprocessing.get_context("fork")
    reader, writer = os.pipe()
    process = fork.Process(target=_limited, args=(words, largest, writer))
    process.start()
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        printed = " ".join(file.read().split())
    process.join()
    return process.exitcode, printed


def _limited(words: list[str], largest: int, writer: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then raises, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.stdout = sys.stderr = os.fdopen(writer, "w", encoding="utf-8")
    sys.argv = ["declip", *words]
    cli.main()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(13, "Permission denied", "secret.yaml"), ("'secret.yaml'", "Permission denied")),
        (OSError(30, "Read-only file system", "run"), ("'run'", "Read-only", "another path")),
        (OSError(28, "No space left on device"), ("No space left", "--resume")),
    ],
)
def test_a_disk_that_refuses_is_no_traceback(
    error: OSError, says: tuple[str, ...], declip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised by hand: to root, who may run the tests, nothing is forbidden."""

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("declip.recipe.load.load_recipe", refuse)
    status, printed = declip("train", "clip")
    assert (status, [part for part in says if part not in printed]) == (2, []), printed


def test_a_folder_that_cannot_be_read_is_not_called_empty(
    here: Path, declip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refuse(path: str | Path) -> object:
        if str(path) == "uncaptioned":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    status, printed = declip("train", "mine.yaml", "data.source=uncaptioned")
    assert status == 2
    assert "'uncaptioned' cannot be read: Permission denied" in printed
