"""What is shown of progress: bars on a terminal, where the step never gives way; elsewhere a line now and then."""

import io
import itertools
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from declip.io.progress import LineInterval, progress_bar, status
from declip.training.monitor import Monitor
from declip.training.trainer import train
from training.test_trainer import recipe_for

TERMS = ("contrastive", "multi_view", "simsiam", "masked_language", "nearest_neighbor")
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
LINE = r"step {}/8  loss -?\d+\.\d{{3}}  lr \d\.\d\de[-+]\d\d  [\d,]+ samples/s  0:00:\d\d left"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_first_line_comes_early_and_later_ones_are_rare() -> None:
    clock, lines = Clock(), []
    interval = LineInterval(clock)
    for second in range(1, 3601):
        clock.now = second
        if interval.due():
            lines.append(second)
    waits = [after - before for before, after in itertools.pairwise(lines)]
    assert lines[0] == 10
    assert min(waits) >= 10
    assert max(waits) == 30
    assert len(lines) == 130


def test_without_a_terminal_a_bar_is_a_line_now_and_then(capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress_bar(*COLUMNS, get_time=clock) as bar:
        task = bar.add_task("Images of cars", total=100)
        for second in range(1, 26):
            clock.now = second
            bar.advance(task)
    printed = capfd.readouterr()
    lines = [" ".join(line.split()) for line in printed.err.splitlines()]
    assert lines == ["Images of cars 10/100 0:01:30 left", "Images of cars 20/100 0:01:20 left"]
    assert printed.out == ""


def test_what_takes_long_without_steps_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with status("Timing a step of clip, [declip]"), status("hidden", shown=False):
        pass
    assert capfd.readouterr().err == "Timing a step of clip, [declip] …\n"


@pytest.mark.parametrize(("width", "terms"), [(80, 1), (120, 3), (200, 6)])
def test_a_narrow_terminal_drops_terms_and_keeps_the_step_and_the_time_left(
    tmp_path: Path, width: int, terms: int
) -> None:
    monitor = Monitor(tmp_path, 0, 100_000, 128)
    clock = Clock()
    monitor.progress.get_time = monitor.progress.tasks[0]._get_time = clock
    monitor.progress.start_task(monitor.task)
    for step in range(1, 21):
        clock.now = step
        monitor.advance(step)
    values = dict.fromkeys(("total", *TERMS), 8.123) | {"grad_norm": 1.0}
    monitor.metrics(20, values, 1e-3, 14.0)
    monitor.progress.update(monitor.task, speed="12,345 samples/s")
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    console.print(monitor.progress.get_renderable())
    (line,) = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "20/100000" in line
    assert "27:46:20" in line, "99,980 s at a second a step"
    assert "…" not in line
    assert line.count(" 8.123") == terms


def test_a_run_without_a_terminal_tells_its_steps_there_and_in_its_log(
    table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(recipe_for(table, "clip"), out=tmp_path, report=False)
    printed = capfd.readouterr().err
    for text in (printed, (tmp_path / "log.txt").read_text()):
        assert re.findall(LINE.format(2), text), text
        assert re.findall(LINE.format(8), text), "the last step too"
        assert len(re.findall(r"step \d/8 ", text)) == 2
    assert "━" not in printed


def test_on_a_terminal_the_lines_are_in_the_log_only(
    table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    train(recipe_for(table, "clip"), out=tmp_path, report=False)
    printed = capfd.readouterr().err
    assert "━" in printed
    assert "step 2/8" not in printed
    assert re.findall(LINE.format(2), (tmp_path / "log.txt").read_text())
