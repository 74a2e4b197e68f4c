"""Run files of benchmarks/ and scripts/ as commands."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripts(monkeypatch):
    for folder in ("benchmarks", "scripts"):
        monkeypatch.syspath_prepend(str(ROOT / folder))

    def imported(name):
        # The folder tests/search is a module too
        if getattr(sys.modules.get(name), "__file__", None) is None:
            monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    return imported


@pytest.fixture
def call(scripts, monkeypatch, capsys):
    """Run a file as a command; give its exit status and the lines that it printed."""

    def called(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        status = 0
        try:
            scripts(name).main()
        except SystemExit as ended:
            status = ended.code or 0
        printed = capsys.readouterr()
        return status, (printed.out or printed.err).splitlines()

    return called
