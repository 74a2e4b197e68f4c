"""What tests of whole ways through the package share."""

import os
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own; a program that is started fails the test."""
    inside = tmp_path / "here"
    inside.mkdir()
    monkeypatch.chdir(inside)
    for name in ("Popen", "run", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("a program was started"))
    return inside
