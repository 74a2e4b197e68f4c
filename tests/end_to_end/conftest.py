"""What tests of whole ways through the package share."""

import os
import subprocess
from pathlib import Path

import pytest

from conftest import TINY, WEIGHTS, draw
from declip.api import train
from declip.cli import app as cli
from declip.recipe.schema import Recipe
from end_to_end.command import Command, write_recipe


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


@pytest.fixture
def declip(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command as a shell starts it: its exit status and all that it printed, on one line."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["declip", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = " ".join("".join(capfd.readouterr()).split())
        assert "Traceback" not in printed
        return int(caught.value.code or 0), printed

    return run


@pytest.fixture
def wrong_inputs(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a good recipe, `mine.yaml`, and much that is wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    write_recipe(tmp_path / "mine.yaml", table)
    files = {
        "empty.jsonl": "",
        "empty.csv": "",
        "header.csv": "image,caption\n",
        "column.jsonl": '{"image": "a.png", "captoin": "a picture"}\n',
        "text.parquet": "I am text",
        "text.jsonl": "I am text\n",
        "text.txt": "I am text",
        "extends.yaml": "extends: 5\n",
        "tabs.yaml": "train:\n\tsteps: 5\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.yaml").write_bytes("name: café\n".encode("latin-1"))
    for name in ("nothing", "uncaptioned"):
        (tmp_path / name).mkdir()
    for number in range(8):
        draw("red", "circle").save(tmp_path / "uncaptioned" / f"{number}.png")
    return tmp_path


@pytest.fixture(scope="module")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny model."""
    tree = {**TINY, "data": {"source": str(table)}, "loss_weights": WEIGHTS["clip"]}
    return train(Recipe.model_validate(tree), out=tmp_path_factory.mktemp("trained"), quiet=True).folder
