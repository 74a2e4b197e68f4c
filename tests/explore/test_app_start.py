import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from declip.cli import app as cli
from declip.interchange.declip_file import write_declip_file
from explore.conftest import tiny_model

pytest.importorskip("starlette", reason="the page needs declip[app]")

from declip.app.start import address_of, is_index, open_gallery, take_port
from declip.errors import UserError


def run(words: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command as a shell starts it; its exit status."""
    monkeypatch.setattr(sys, "argv", ["declip", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_a_source_is_embedded_once_and_an_index_is_opened(
    weights_file: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = open_gallery(str(weights_file), str(table))
    folder = first.index.folder
    assert folder.parent == Path("indices")
    assert folder.name.startswith("shapes-jsonl-")
    assert first.index.manifest.captions
    monkeypatch.setattr("declip.search.embed.write_part", None)  # nothing is left to write
    assert open_gallery(str(weights_file), str(table)).index.folder == folder
    assert is_index(str(folder))
    assert len(open_gallery(str(weights_file), str(folder)).index) == 24
    assert not is_index(str(tmp_path))
    write_declip_file(tiny_model(1), tmp_path / "other.safetensors")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    other = open_gallery(str(tmp_path / "other.safetensors"), str(table))
    assert other.index.folder != folder, "another model's index has a folder of its own"


def test_a_folder_of_images_with_a_manifest_of_its_own_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"files": []}')
    assert not is_index(str(tmp_path))


def test_the_model_is_shown_among_the_runs_where_it_is_one(run_folder: Path, table: Path, tmp_path: Path) -> None:
    gallery = open_gallery(str(run_folder), str(table), tmp_path / "index")
    assert [each.folder.name for each in gallery.runs.look()] == ["tiny"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "TABLE"], "no model at 'nowhere'"),
        (["MODEL", "nowhere"], "no file or folder 'nowhere'"),
        (["MODEL", "TABLE", "--runs", "nowhere"], "There is no folder 'nowhere'"),
        (["OTHER", "INDEX"], "vectors of another model"),
        (["MODEL", "INDEX", "--index", "elsewhere"], "is an index already"),
        (["MODEL", "TABLE", "--port", "TAKEN"], "Choose another one with --port"),
        (["MODEL", "TABLE", "--host", "no.such.host.invalid"], "no address 'no.such.host.invalid'"),
    ],
)
def test_a_mistake_ends_with_one_line(
    words: list[str],
    message: str,
    weights_file: Path,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("declip.app.start.serve", None)  # it comes to that in none of these
    places: dict[str, object] = {"MODEL": weights_file, "TABLE": table}
    if "INDEX" in words:
        places["INDEX"] = open_gallery(str(weights_file), str(table), tmp_path / "index").index.folder
        write_declip_file(tiny_model(1), tmp_path / "other.safetensors")
        places["OTHER"] = tmp_path / "other.safetensors"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places["TAKEN"] = taken.getsockname()[1]
        port = [] if "--port" in words else ["--port", 0]
        assert run(["app", *(places.get(word, word) for word in words), *port, "--quiet"], monkeypatch) == 2
    errors = capfd.readouterr().err
    assert message in errors
    assert errors.startswith("Error: ")
    assert errors.count("\n") == 1


def test_a_missing_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["app", "model", "source"], monkeypatch) == 2
    assert "pip install 'declip[app]'" in capfd.readouterr().err


def test_another_address_is_warned_of_and_a_browser_opened_when_asked_for(
    weights_file: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("declip.app.start.serve", lambda gallery, bound, host, ready: ready())
    words = ["app", weights_file, table, "--index", tmp_path / "index", "--quiet", "--port", 0]
    assert run(words, monkeypatch) == 0
    said = capfd.readouterr().err
    assert "Warning" not in said
    assert "Open http://127.0.0.1:" in said
    assert opened == []
    assert run([*words, "--host", "0.0.0.0", "--browser"], monkeypatch) == 0
    assert "there is no password" in capfd.readouterr().err
    assert opened[0].startswith("http://127.0.0.1:")


def test_the_port_is_held_from_the_start() -> None:
    with take_port("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert address_of(first) == f"http://127.0.0.1:{port}/"
        with pytest.raises(UserError, match="cannot be used"):
            take_port("127.0.0.1", port)


def test_ctrl_c_ends_quietly(weights_file: Path, table: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "declip", "app", weights_file, table, "--index", tmp_path / "index", "--port", "0"]
    with subprocess.Popen([*map(str, words), "--quiet"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = ""
        while not address:
            line = process.stderr.readline()
            assert line, "it ended before it was ready"
            address = line.split()[1] if line.startswith("Open ") else ""
        page = _fetched(address)
        process.send_signal(signal.SIGINT)
        left = process.stderr.read()
    assert "What to look for" in page
    assert process.returncode == 0
    assert left == ""


def _fetched(address: str) -> str:
    for _ in range(200):
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                return str(answer.read().decode())
        except OSError:
            time.sleep(0.05)
    raise AssertionError("no answer")
