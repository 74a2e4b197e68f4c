import os
import signal
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from declip.app.server import default_folder, open_state
from declip.cli.serve import take_port
from declip.interchange.declip_file import write_declip_file
from indices import tiny_model


def test_a_source_is_embedded_once_and_an_index_is_opened(
    weights_file: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = open_state(str(weights_file), str(table))
    folder = first.index.folder
    assert str(folder).startswith("indices/shapes-jsonl-")
    assert first.index.manifest.captions
    monkeypatch.setattr("declip.search.embed.write_part", None)  # nothing is left to write
    assert open_state(str(weights_file), str(table)).index.folder == folder
    assert len(open_state(str(weights_file), str(folder)).index) == 24
    assert default_folder("1" * 64, str(table)) != default_folder("2" * 64, str(table)), "each model has its own"


def test_a_mistake_ends_with_one_line(
    state: Any, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.setattr("declip.app.server.serve", None)  # it comes to that in none of these
    other, index = tmp_path / "other.safetensors", state.index.folder
    write_declip_file(tiny_model(1), other)
    with take_port("127.0.0.1", 0) as taken:  # held from here on, before the server listens
        mistakes: tuple[tuple[list[object], str], ...] = (
            (["nowhere", index], "'nowhere'"),
            ([run_folder, "nowhere"], "'nowhere'"),
            ([other, index], "another model"),
            ([run_folder, index, "--index", "elsewhere"], "--index"),
            ([run_folder, index, "--port", taken.getsockname()[1]], "--port"),
            ([run_folder, index, "--host", "no.such.host.invalid"], "'no.such.host.invalid'"),
        )
        for words, message in mistakes:
            outcome = command("app", "--port", 0, *words, "--quiet")
            assert (outcome.status, outcome.err.count("\n")) == (2, 1), words
            assert message in outcome.err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    outcome = command("app", run_folder, index)
    assert outcome.status == 2
    assert "pip install 'declip[app]'" in outcome.err


def test_a_browser_is_opened_ctrl_c_ends_quietly_and_another_address_is_warned_of(
    run_folder: Path, state: Any, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    pages: list[str] = []

    def visit(address: str) -> None:
        with urllib.request.urlopen(address, timeout=60) as answer:
            pages.append(answer.read().decode())
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("webbrowser.open", lambda address: threading.Thread(target=visit, args=(address,)).start())
    words = ["app", run_folder, state.index.folder, "--port", 0, "--quiet"]
    outcome = command(*words, "--browser")
    assert "What to look for" in pages[0]
    assert outcome.status == 0
    assert [line.split()[0] for line in outcome.err.splitlines()] == ["24", "Open"]
    monkeypatch.setattr("declip.app.server.serve", lambda state, bound, host: None)
    assert "no password" in command(*words, "--host", "0.0.0.0").err
