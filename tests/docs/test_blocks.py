"""Every block of every page runs, or is checked."""

import re
import shutil
from pathlib import Path

import pytest

from docs.blocks import FENCE, GLOBBED, INDENTED, ROOT, Reader, blocks, lines
from docs.conftest import MIXED

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
LANGUAGES = {"python", "shell", "yaml", "text", "csv", "json"}
WIDEST = 84
"""Characters of a shell line; the site's column cuts longer ones off."""

OWN_IMAGES = ("index", "tutorial")
"""Pages that make what the others take for granted."""


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem in OWN_IMAGES:
        for each in ("pairs.csv", "heldout.csv", "pictures", "runs", "indices"):
            shutil.rmtree(here / each) if each in MIXED else (here / each).unlink()
    reader = Reader(monkeypatch)
    reader.follow(page)
    if page.stem == "tutorial":
        assert not reader.left
        assert {path.name for path in here.iterdir()} >= {"pairs.csv", "pairs.html", "shards", "result.json"}
        assert (here / "exports/mine/declip.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_is_fenced_and_named_so_that_it_is_run(page: Path) -> None:
    assert {block.kind for block in blocks(page)} <= LANGUAGES
    assert not INDENTED.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    shell = [line for block in blocks(page) if block.kind == "shell" for line in block.code.splitlines()]
    assert [line for line in shell if len(line) > WIDEST] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_shell_lines_work_in_bash_and_zsh(page: Path) -> None:
    shell = [line for block in blocks(page) if block.kind == "shell" for line in lines(block.code)]
    assert [line for line in shell if GLOBBED.search(QUOTED.sub("", line))] == []
    assert not [block for block in blocks(page) if block.kind == "shell" and "#" in QUOTED.sub("", block.code)]


@pytest.mark.parametrize("name", ["clip", "slip", "filip", "declip", "defilip"])
def test_our_numbers_are_those_of_the_results(name: str) -> None:
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    here = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8").split("\n## Here\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `[a-z0-9-]+`[^|]*\| (.*±.*) \|$", here, re.MULTILINE)
    assert rows
    for row in rows:
        assert row in results, f"{name}.md has {row}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("declip train clip --outt x", "No such option"),
        ("declip train clip train.stepps=3", r"train\.stepps"),
        ("python benchmarks/stepp.py", "stepp"),
        ("make benchh", "benchh"),
        ("pip install 'declip[searchh]'", "searchh"),
        ("pytest tests/interchange/test_exportt.py", "test_exportt"),
        ("declip evaluate runs/none --dataset builtin:emoji-test", "ended with 2"),
        ("false", "returned non-zero"),
    ],
)
def test_a_wrong_line_is_seen(line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"```shell\n# what it does\n{line}\n```\n", encoding="utf-8")
    with pytest.raises(Exception, match=message):
        Reader(monkeypatch).follow(page)
