import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def test_embed_search_and_look_after(weights_file: Path, folder: Path, tmp_path: Path, command: Any) -> None:
    index, query = tmp_path / "index", folder / "red-bar.png"
    embed = ["embed", weights_file, folder, "--out", index, "--dtype", "float32", "--quiet"]
    made = command(*embed)
    assert (made.status, made.err) == (0, "")
    assert "24 images, 16 numbers each in float32" in made.out
    assert "Without caption: 24" in made.out

    found, drawn = tmp_path / "found.json", tmp_path / "found.png"
    search = ["search", index, "--image", query, "-k", 3, "--json", found, "--contact-sheet", drawn]
    printed = command(*search).out.splitlines()[1]
    assert "red-bar.png" in printed
    assert "1.000" in printed
    hits = json.loads(found.read_text())["hits"]
    assert (hits[0]["key"], hits[0]["path"], len(hits)) == ("red-bar.png", str(query), 3)
    assert np.asarray(Image.open(drawn)).shape[2] == 3

    assert command("index", "remove", index, "red-bar.png").status == 0
    assert "Removed: 1 key," in command("index", "show", index).out
    assert command(*search).status == 0
    assert json.loads(found.read_text())["hits"][0]["key"] != "red-bar.png"
    assert "23 images" in command(*embed).out


def test_lines_into_a_pipe_are_neither_cut_nor_wrapped(
    weights_file: Path, folder: Path, tmp_path: Path, command: Any
) -> None:
    caption, index = " ".join(["a red circle"] * 60), tmp_path / ("a long name " * 10)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "shapes/red-circle.png", "caption": caption}) + "\n")
    assert command("embed", weights_file, tmp_path / "pairs.jsonl", "--out", index, "--quiet").status == 0
    lines = command("search", index, "red").out.splitlines()
    assert len(lines) == 2
    assert lines[1].rstrip().endswith(caption)
    assert str(index) in command("index", "show", index).out.splitlines()[0]


def test_wrong_paths_are_answered_without_torch(tmp_path: Path) -> None:
    script = """
import sys
from declip.cli import app
for words in (["search", "nowhere", "a"], ["embed", "nowhere", ".", "--out", "new"], ["app", "nowhere", "."]):
    sys.argv[1:] = words
    try:
        app.main()
    except SystemExit as end:
        print(end.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "2 False\n" * 3, done.stderr


def test_a_mistake_is_named_without_a_traceback(
    weights_file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    index = tmp_path / "index"
    command("embed", weights_file, folder, "--out", index, "--quiet")
    mistakes: tuple[tuple[list[object], str], ...] = (
        (["search", "nowhere", "a cat"], "'nowhere'"),
        (["search", index], "--image"),
        (["search", index, "a cat", "--image", "nowhere.png"], "'nowhere.png'"),
        (["search", index, "a cat", "--weights", "1"], "--weights is '1'"),
        (["search", index, "a cat", "--model", "nowhere"], "'nowhere'"),
        (["search", index, "a cat", "--json", "no/where.json"], "'no/where.json'"),
        (["embed", weights_file, "nowhere", "--out", "new"], "'nowhere'"),
        (["embed", "nowhere", folder, "--out", "new"], "'nowhere'"),
        (["index", "remove", index, "nothing.png"], "'nothing.png'"),
        (["index", "approximate", index], "39 or more" if find_spec("faiss") else "declip[search]"),
    )
    for words, message in mistakes:
        outcome = command(*words)
        assert outcome.status == 2, words
        assert message in outcome.err
        assert "Traceback" not in outcome.err
    assert not (tmp_path / "new").exists()
