import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


def test_embed_search_and_look_after(weights_file: Path, folder: Path, tmp_path: Path, command: Any) -> None:
    index, query = tmp_path / "index", folder / "red-bar.png"
    embed = ["embed", weights_file, folder, "--out", index, "--dtype", "float32", "--quiet"]
    made = command(*embed)
    assert (made.status, made.err) == (0, "")
    assert "24 images, 16 numbers each in float32" in made.out

    found, drawn = tmp_path / "found.json", tmp_path / "found.png"
    search = ["search", index, "--image", query, "-k", 3, "--json", found, "--contact-sheet", drawn]
    assert command(*search).out.splitlines()[1].split()[1:3] == ["1.000", "red-bar.png"]
    hits = json.loads(found.read_text())["hits"]
    assert (hits[0]["key"], hits[0]["path"], len(hits)) == ("red-bar.png", str(query), 3)
    assert Image.open(drawn).mode == "RGB"
    query.unlink()
    assert "23 images" in command(*embed).out
    assert "23 images" in command("index", "show", index, "--check").out


def test_lines_into_a_pipe_are_neither_cut_nor_wrapped(
    weights_file: Path, folder: Path, tmp_path: Path, command: Any
) -> None:
    caption, index = " ".join(["a red circle"] * 60), tmp_path / ("a long name " * 10)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "shapes/red-circle.png", "caption": caption}) + "\n")
    assert command("embed", weights_file, tmp_path / "pairs.jsonl", "--out", index, "--quiet").status == 0
    _, line = command("search", index, "red").out.splitlines()
    assert line.rstrip().endswith(caption)
    assert str(index) in command("index", "show", index).out.splitlines()[0]


def test_a_mistake_is_named_without_a_traceback(
    weights_file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    index = tmp_path / "index"
    command("embed", weights_file, folder, "--out", index, "--quiet")
    mistakes: tuple[tuple[list[object], str], ...] = (
        (["search", index], "--image"),
        (["search", index, "a cat", "--image", "nowhere.png"], "'nowhere.png'"),
        (["search", index, "a cat", "--weights", "1"], "--weights is '1'"),
        (["search", index, "a cat", "--model", "nowhere"], "'nowhere'"),
        (["search", index, "a cat", "--json", "no/where.json"], "'no/where.json'"),
        (["embed", weights_file, "nowhere", "--out", "new"], "'nowhere'"),
    )
    for words, message in mistakes:
        outcome = command(*words)
        assert (outcome.status, message in outcome.err, "Traceback" in outcome.err) == (2, True, False), words
    assert not (tmp_path / "new").exists()


def test_wrong_paths_are_refused_without_torch() -> None:
    program = (
        "import sys, declip.cli.app, declip.search.info; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
