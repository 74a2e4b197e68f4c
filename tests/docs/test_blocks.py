"""Every block of the pages that teach runs; every command of every page exists."""

import re
from pathlib import Path

import pytest

from docs.blocks import ROOT, Reader, blocks, check, declip_commands

DOCS = ROOT / "docs"
TAUGHT = (
    "../README",
    "index",
    "tutorial",
    "choosing",
    "methods/clip",
    "methods/slip",
    "methods/filip",
    "methods/declip",
    "methods/defilip",
    "recipes",
    "search",
    "troubleshooting",
    "api",
)
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
OUTPUT = {"text", "csv", "json", ""}
OWN_PICTURES = ("index", "tutorial")
"""Pages that make what the others take for granted."""


@pytest.mark.parametrize("name", TAUGHT)
def test_a_page_does_what_it_says(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = DOCS / f"{name}.md"
    if name in OWN_PICTURES:
        for each in ("pairs.csv", "heldout.csv", "pictures", "runs/demo", "indices/pictures"):
            (here / each).unlink()
    reader = Reader(monkeypatch)
    reader.follow(page)
    assert reader.ran
    kinds = {block.kind for block in blocks(page)}
    assert kinds <= {"python", "shell", "yaml"} | OUTPUT, "a block of another kind is not run"
    if name == "tutorial":
        assert {path.name for path in here.iterdir()} >= {"pairs.csv", "pairs.html", "prepared", "result.json"}
        assert (here / "exports/mine/declip.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_commands_of_a_page_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in declip_commands(page):
        check(words)


@pytest.mark.parametrize("name", [name for name in TAUGHT if name.startswith("methods/")])
def test_our_numbers_are_those_of_the_results(name: str) -> None:
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    here = (DOCS / f"{name}.md").read_text(encoding="utf-8").split("\n## Here\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `[a-z0-9-]+`[^|]*\| (.*±.*) \|$", here, re.MULTILINE)
    assert rows
    for row in rows:
        assert row in results, f"{name}.md has {row}"


def test_a_wrong_command_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("    declip train clip --outt x\n\n```shell\ndeclip train clip \\\n    train.stepps=3\n```\n")
    misspelt, wrong = declip_commands(page)
    with pytest.raises(Exception, match="No such option"):
        check(wrong)
    with pytest.raises(ValueError, match=r"train\.stepps"):
        check(misspelt)
