"""Progress: bars on a terminal, where the step is never dropped; elsewhere a line from time to time."""

import io
import re

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from declip.api import train
from declip.io import progress
from declip.io.progress import progress_bar
from declip.training.sinks import Bar, RunInfo
from training.starts import recipe_for

TERMS = ("contrastive", "multi_view", "simsiam", "masked_language", "nearest_neighbor")
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
LINE = r"training +{}/8 .*0:00:\d\d elapsed .*loss -?\d+\.\d{{3}}"


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
    lines = [" ".join(line.split()) for line in printed.err.splitlines()]
    times = ["10/25 0:00:15 left", "20/25 0:00:05 left", "25/25 0:00:00 left"]
    assert lines == [f"Images of cars {time}" for time in times]
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
    bar.log(20, {"loss": 8.123, "losses": dict.fromkeys(TERMS, 8.123), "samples_per_second": 12_345.0})
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
    assert re.findall(LINE.format(2), printed), printed
    assert re.findall(LINE.format(8), printed), "the last step too"
    assert "━" not in printed
    assert "Starting: 24 pairs" in printed
    assert "Starting: 24 pairs" in (tmp_path / "log.txt").read_text()
