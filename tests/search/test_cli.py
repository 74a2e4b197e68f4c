import json
from pathlib import Path
from typing import Any

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
