"""Raw files: each says how it was made, and a page or the list of raw files links it."""

import json
import re

import pytest

from docs.blocks import ROOT

RESULTS = ROOT / "benchmarks" / "results"
JSONL = sorted(RESULTS.rglob("*.jsonl"))
OTHERS = [path for path in sorted(RESULTS.rglob("*.*")) if path.suffix in (".json", ".md")]


@pytest.mark.parametrize("path", JSONL, ids=lambda path: path.stem)
def test_the_first_line_says_how_the_numbers_were_made(path):
    header, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows
    assert header["command"]
    assert header["processor"]
    assert re.fullmatch(r"202\d-\d\d-\d\d", header["date"])
    commit = header.get("commit") or header["recorded_in"]
    assert re.match(r"[0-9a-f]{7,40}\b", commit)


def test_every_raw_file_is_linked():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *RESULTS.rglob("*.md")]
    linked = set()
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            linked.add((page.parent / target).resolve())
    files = {path for path in (*JSONL, *OTHERS) if path.name != "README.md"}
    assert files - linked == set()
