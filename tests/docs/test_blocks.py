"""Every block of every page runs, or is checked."""

import json
import re

import matplotlib.pyplot as plt
import pytest

from docs.blocks import FENCE, GLOBBED, INDENTED, ROOT, Reader, blocks, lines

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
LANGUAGES = {"python", "shell", "yaml", "text", "csv", "json"}
WIDEST = 84
"""Characters of a shell line; the site's column cuts longer ones off."""

MADE = ("pairs.csv", "heldout.csv", "pictures", "runs/demo", "indices/pictures")
"""What the first two pages make, and all others take for granted."""


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page, here, monkeypatch):
    if page.stem in ("index", "tutorial"):
        for name in MADE:
            (here / name).unlink()
    reader = Reader(monkeypatch)
    reader.follow(page)
    if page.stem == "tutorial":
        assert not reader.left
        assert {path.name for path in here.iterdir()} >= {"pairs.csv", "pairs.html", "result.json"}
        assert (here / "exports/mine/declip.safetensors").is_file()


def test_the_notebook_runs(emoji_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(emoji_cache))
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "first-hour.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    smaller = {"lite2": "lite0", "builtin:clipart": "builtin:emoji", "EVERY = 60, 4": "EVERY = 9, 2"}
    for part, other in smaller.items():
        assert code.count(part) == 1
        code = code.replace(part, other)
    with plt.rc_context({"backend": "agg"}):
        exec(code, {"__name__": "first-hour"})
    assert len(plt.get_fignums()) == 7
    plt.close("all")
    assert (tmp_path / "exports/open_clip/open_clip_model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_is_fenced_and_works_in_bash_and_zsh(page):
    assert {block.kind for block in blocks(page)} <= LANGUAGES
    assert not INDENTED.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    for code in (block.code for block in blocks(page) if block.kind == "shell"):
        assert [line for line in code.splitlines() if len(line) > WIDEST] == []
        assert [line for line in lines(code) if GLOBBED.search(QUOTED.sub("", line))] == []
        assert "#" not in QUOTED.sub("", code)
