import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from declip.cli import app as cli
from declip.interchange.declip_file import write_declip_file
from declip.models.dual_encoder import DualEncoder
from explore.conftest import tiny_model


@pytest.fixture
def weights(model: DualEncoder, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_declip_file(model, path)
    return path


def run(words: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command as a shell starts it; its exit status."""
    monkeypatch.setattr(sys, "argv", ["declip", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_embed_search_and_look_after(
    weights: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    index, query = tmp_path / "index", folder / "red-bar.png"
    embed = ["embed", weights, folder, "--out", index, "--dtype", "float32", "--quiet"]
    assert run(embed, monkeypatch) == 0
    said = capfd.readouterr()
    assert "24 images, 16 numbers each in float32" in said.out
    assert "Without caption: all of them" in said.out
    assert said.err == ""

    found, drawn = tmp_path / "found.json", tmp_path / "found.png"
    words = ["search", index, "--image", query, "-k", 3, "--json", found, "--contact-sheet", drawn]
    assert run(words, monkeypatch) == 0
    printed = capfd.readouterr().out
    assert "red-bar.png" in printed
    assert "1.000" in printed
    hits = json.loads(found.read_text())["hits"]
    assert hits[0]["key"] == "red-bar.png"
    assert (hits[0]["path"], hits[0]["size"]) == (str(query), query.stat().st_size)
    assert len(hits) == 3
    assert np.asarray(Image.open(drawn)).shape[2] == 3

    assert run(["index", "remove", index, "red-bar.png"], monkeypatch) == 0
    assert run(["index", "show", index], monkeypatch) == 0
    assert "Hidden: 1 removed" in capfd.readouterr().out
    assert run(words, monkeypatch) == 0
    assert json.loads(found.read_text())["hits"][0]["key"] != "red-bar.png"
    assert run(["index", "compact", index], monkeypatch) == 0
    assert run(["index", "restore", index, "red-bar.png"], monkeypatch) == 0
    assert run(embed, monkeypatch) == 0
    assert "24 images" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "nowhere", "a cat"], "'nowhere' is not there, so it is no index"),
        (["search", "INDEX", ""], "text to search for is empty"),
        (["search", "INDEX"], "nothing to search for"),
        (["search", "INDEX", "a cat", "-k", "0"], "k is 0"),
        (["search", "INDEX", "a cat", "--image", "nowhere.png"], "cannot be used: missing image"),
        (["search", "INDEX", "a cat", "--weights", "1"], "--weights is '1'"),
        (["search", "INDEX", "a cat", "--model", "OTHER"], "vectors of another model"),
        (["search", "INDEX", "a cat", "--json", "no/where.json"], "no folder 'no'"),
        (["embed", "OTHER", "FOLDER", "--out", "INDEX"], "vectors of another model"),
        (["embed", "OTHER", "nowhere", "--out", "new"], "no file or folder 'nowhere'"),
        (["embed", "nowhere", "FOLDER", "--out", "new"], "no model at 'nowhere'"),
        (["index", "remove", "INDEX", "nothing.png"], "'nothing.png' is not in the index"),
        (["index", "approximate", "INDEX"], "needs 1,000 or more"),
    ],
)
def test_a_mistake_ends_with_its_message_and_no_traceback(
    words: list[str],
    message: str,
    weights: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if words[0] == "index":
        pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    other, index = tmp_path / "other.safetensors", tmp_path / "index"
    write_declip_file(tiny_model(1), other)
    run(["embed", weights, folder, "--out", index, "--quiet"], monkeypatch)
    capfd.readouterr()
    places = {"INDEX": index, "OTHER": other, "FOLDER": folder}
    assert run([places.get(word, word) for word in words], monkeypatch) == 2
    errors = capfd.readouterr().err
    assert message in errors.replace("\n", " ")
    assert "Traceback" not in errors
    assert errors.startswith("Error: ")
    assert not (tmp_path / "new").exists()


def test_a_stopped_embed_says_how_to_go_on(
    weights: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("declip.search.embed.write_part", stopped)
    assert run(["embed", weights, folder, "--out", tmp_path / "index", "--quiet"], monkeypatch) == 130
    assert "the same command goes on" in capfd.readouterr().err.replace("\n", " ")
