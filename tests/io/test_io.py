"""Files that appear whole, the cache, workers that outlive their process, and progress."""

import errno
import fcntl
import io
import multiprocessing
import os
import re
import resource
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from conftest import read_only, refuses
from declip.api import train
from declip.errors import UserError
from declip.io import pool, progress
from declip.io.atomic import (
    atomic_write,
    cache_folder,
    locked_for,
    remove,
    save_tensors,
    write_text,
)
from declip.io.cache import LOCK, cache_entries, clear_cache, hold, trim_cache
from declip.io.progress import progress_bar
from declip.io.text import join_words
from declip.training.sinks import Bar, RunInfo
from training.starts import recipe_for


@pytest.mark.parametrize(
    ("given", "joined"),
    [([], "nothing"), ("a", "a"), ("ab", "a and b"), (["a", "b", 2_000], "a, b and 2,000")],
)
def test_words_are_joined_for_messages(given, joined):
    assert join_words(given) == joined


def test_the_environment_chooses_the_folder(monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("DECLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/declip")


def test_a_file_or_folder_appears_whole_or_not_at_all(tmp_path):
    with atomic_write(tmp_path / "a/file") as partial:
        partial.write_text("1")
        assert not (tmp_path / "a/file").exists()
    for value in "23":
        with atomic_write(tmp_path / "a/folder") as partial:
            partial.mkdir()
            (partial / "x").write_text(value)
        assert (tmp_path / "a/folder/x").read_text() == value
    with pytest.raises(TypeError), atomic_write(tmp_path / "a/file") as partial:
        partial.write_text("half") / "no path"
    assert (tmp_path / "a/file").read_text() == "1"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["file", "folder"]


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    for name in (".file.1.partial", ".file.2.partial", ".other.1.partial"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - (0 if "2" in name else 90_000),) * 2)
    with atomic_write(tmp_path / "file") as partial:
        partial.write_text("1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".file.2.partial",
        ".other.1.partial",
        "file",
    ]


@pytest.mark.parametrize(
    ("code", "told"), [(errno.ENOSPC, "No room left"), (errno.EROFS, "cannot be written")]
)
def test_a_full_or_forbidden_disk_is_the_users_matter(tmp_path, code, told):
    with pytest.raises(UserError, match=f"{told}.*DECLIP_CACHE"), atomic_write(tmp_path / "file"):
        raise OSError(code, os.strerror(code))


def test_a_link_and_the_permissions_of_a_file_stay(tmp_path):
    (tmp_path / "synced").mkdir()
    (tmp_path / "link").symlink_to("synced/file")
    write_text(tmp_path / "link", "1")
    (tmp_path / "synced/file").chmod(0o664)
    write_text(tmp_path / "link", "2")
    assert ((tmp_path / "synced/file").read_text(), os.readlink(tmp_path / "link")) == (
        "2",
        "synced/file",
    )
    assert stat.S_IMODE((tmp_path / "synced/file").stat().st_mode) == 0o664
    assert len([*tmp_path.rglob("*")]) == 3


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/")):
        refuses(["cannot be replaced", "--out"], write_text, path, "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_read_only_file_system_is_named(tmp_path):
    path = tmp_path / "a.txt"
    read_only(
        tmp_path, lambda: refuses(f"'{path}' cannot be written: Read-only", write_text, path, "x")
    )


def test_tensors_on_a_full_disk_raise_an_os_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        refuses("'.*/a' cannot be written: File too large. .*--save", write_tensors, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*tmp_path.iterdir()] == []


def write_tensors(path):
    with atomic_write(path, "give another --save") as partial:
        save_tensors({"a": torch.ones(1_000)}, partial)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_file_systems_without_locks(cache, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    given = cache / "out", cache / ".lock", "choose another"
    for _ in range(2):
        with locked_for(*given):
            refuses("choose another", locked_for(*given).__enter__)
    assert clear_cache("features") == 4_000
    assert hold(cache / "features/a") is None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Four folders of features of 1,000 bytes, the later ones used later, and a shard and a built-in set."""
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path))
    for number, name in enumerate(
        ("features/a", "features/b", "features/c", "features/d", "shards/e", "emoji/f")
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "rows").write_bytes(bytes(1_000))
        for path in (tmp_path / name / "rows", tmp_path / name):
            os.utime(path, (number + 1, number + 1))
    return tmp_path


def names(cache):
    return {str(entry.path.relative_to(cache)) for entry in cache_entries()}


def test_features_longest_unused_go_first(cache, monkeypatch):
    with FileLock(cache / "features/b" / LOCK):  # of another process
        for limit, left in (("3e-6", "abd"), ("1e-6", "ab")):
            monkeypatch.setenv("DECLIP_CACHE_GB", limit)
            trim_cache("features", keep=[cache / "features/a"])
            assert names(cache) == {"shards/e", "emoji/f", *(f"features/{name}" for name in left)}
    monkeypatch.setenv("DECLIP_CACHE_GB", "much")
    refuses("DECLIP_CACHE_GB is 'much'", trim_cache, "features", keep=())


def test_files_may_vanish_while_entries_are_listed(cache):
    """Another process writes features: SQLite's journal comes and goes with each transaction."""
    folder = cache / "features" / "busy"
    folder.mkdir(parents=True)
    writer = multiprocessing.get_context("fork").Process(target=come_and_go, args=(folder,))
    writer.start()
    try:
        for _ in range(400):
            assert {
                entry.path.name for entry in cache_entries() if entry.path.parent.name == "features"
            } >= {"busy"}
            trim_cache("features", keep=())
    finally:
        writer.kill()
        writer.join()


def come_and_go(folder):
    while True:
        journals = [folder / f"{number}-journal" for number in range(20)]
        for path in journals:
            path.write_bytes(b"journal")
        for path in journals:
            path.unlink()


def test_clear_keeps_what_cannot_be_computed(cache, command):
    shown, wrong = command("cache", "show").out, command("cache", "clear", "nothing")
    assert all(part in shown for part in (str(cache), "features", "shards"))
    assert (wrong.status, "'nothing'" in wrong.err) == (2, True)
    assert clear_cache("shards") == 1_000
    with FileLock(cache / "features/b" / LOCK):  # of another process
        assert command("cache", "clear", "features").out.split()[:2] == ["0.0", "MB"]
        assert names(cache) == {"features/b", "emoji/f"}
    assert clear_cache() == 1_000
    assert names(cache) == {"emoji/f"}


def test_what_another_process_uses_stays(cache):
    code = "from declip.io.cache import *; held = hold(cache_folder() / FEATURES / 'c'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        user.stdout.readline()
        assert clear_cache("features") == 3_000
        assert names(cache) == {"features/c", "shards/e", "emoji/f"}
        assert (cache / "features/c/rows").exists()
        user.communicate(b"\n")
    assert clear_cache("features") == 1_000


def test_a_folder_that_is_used_again_is_another_than_the_removed_one(cache):
    with hold(cache / "features/a") as first:
        pass
    assert clear_cache("features") == 4_000
    with hold(cache / "features/a") as second:
        assert os.path.samestat(os.fstat(second.fileno()), (cache / "features/a" / LOCK).stat())
        assert clear_cache("features") == 0
    assert first.closed


def test_a_folder_that_is_used_while_it_is_removed_is_a_new_one(cache, monkeypatch):
    folder, flock = cache / "features/a", fcntl.flock

    def removed_before(file, kind):
        monkeypatch.setattr("fcntl.flock", flock)
        remove(folder)
        flock(file, kind)

    monkeypatch.setattr("fcntl.flock", removed_before)
    with hold(folder) as held:
        assert os.path.samestat(os.fstat(held.fileno()), (folder / LOCK).stat())
    # --- another process begins to use what is being removed

    def used_while_removed(path):
        if "b" in path.name:
            hold(cache / "features/b").close()
        remove(path)

    monkeypatch.setattr("declip.io.cache.remove", used_while_removed)
    assert clear_cache("features") == 3_000
    assert [path.name for path in (cache / "features").iterdir()] == ["b"]


def test_workers_end_when_the_main_process_was_killed(monkeypatch):
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.2)
    receiving, sending = multiprocessing.Pipe(duplex=False)

    def start_and_wait():
        results = pool.imap(bytes, [1 << 20] * 8, workers=2)
        sending.send(len(next(results)))  # the next ones fill the pipe, and nobody reads them
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=start_and_wait)
    process.start()
    sending.close()
    assert receiving.recv() == 1 << 20
    process.kill()
    process.join()
    assert receiving.poll(20), "its other end is closed when the last worker ends"


TERMS = ("contrastive", "multi_view", "simsiam", "masked_language", "nearest_neighbor")
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_without_a_terminal_a_bar_is_a_line_now_and_then(capfd):
    clock = Clock()
    with progress_bar(*COLUMNS, get_time=clock) as bar:
        task = bar.add_task("Images of cars", total=25)
        for second in range(1, 26):
            clock.now = second
            bar.advance(task)
        bar.update(task, completed=25)
    printed = capfd.readouterr()
    times = ["10/25 0:00:15 left", "20/25 0:00:05 left", "25/25 0:00:00 left"]
    assert [" ".join(line.split()) for line in printed.err.splitlines()] == [
        f"Images of cars {time}" for time in times
    ]
    assert printed.out == ""


@pytest.mark.parametrize(("width", "terms"), [(80, 1), (120, 3), (200, 6)])
def test_a_narrow_terminal_drops_terms_and_keeps_the_step_and_the_time_left(tmp_path, width, terms):
    bar = Bar()
    bar.start(RunInfo(tmp_path, 0, 100_000, 128))
    clock = Clock()
    bar.progress.get_time = bar.progress.tasks[0]._get_time = clock
    bar.progress.start_task(bar.task)
    for step in range(1, 21):
        clock.now = step
        bar.advance(step)
    bar.log(
        20, {"loss": 8.123, "losses": dict.fromkeys(TERMS, 8.123), "samples_per_second": 12_345.0}
    )
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    console.print(bar.progress.get_renderable())
    (line,) = console.file.getvalue().splitlines()
    assert "20/100000" in line
    assert "27:46:20" in line, "99,980 s at a second a step"
    assert line.count(" 8.123") == terms


def test_a_run_without_a_terminal_tells_its_steps_in_lines(table, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress, "LONGEST", 0.0)  # every step
    train(recipe_for(table, "clip"), out=tmp_path, report=False)
    printed = capfd.readouterr().err
    for step in (2, 8):
        assert re.findall(
            rf"training +{step}/8 .*0:00:\d\d elapsed .*loss -?\d+\.\d{{3}}", printed
        ), printed
    assert (
        "Starting: 24 pairs of shapes.jsonl (captions: caption)" in printed,
        "━" in printed,
    ) == (True, False)
    assert "Starting: 24 pairs" in (tmp_path / "log.txt").read_text()
