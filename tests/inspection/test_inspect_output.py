import json
import re
import shutil

import numpy as np
import pytest
from rich.console import Console

from conftest import texture
from declip.data.pair import BrokenPair, Pair, PairSource
from declip.data.prepare import read_exclusions
from declip.data.sources.open import open_source
from declip.inspection.result import Fraction, spread_of
from declip.inspection.scan import inspect_source
from declip.io.text import about, shown
from declip.reports.inspection import exclusions, page, summary

HOSTILE = (
    "</td><script>alert(1)</script><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m [bold red]markup[/] [/nothing] $x_1$ {{ 7*7 }} {% raw %}",
    "\u202eright to left \ud800 half \x00",
    "word" * 200,
    "猫が窓辺で寝ている写真",
)


class Hostile(PairSource):
    """Captions and keys that try to get out of where they are shown."""

    name = "<b>hostile\x1b[31m"

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 11:
            raise BrokenPair("missing image", f"<i>gone\x1b[1m{index}")
        return Pair(f"<u>{index}\udcff", texture(index % 8, 90), self.captions(index))

    def captions(self, index):
        return (HOSTILE[index % len(HOSTILE)].replace("\ud800", ""),)


@pytest.fixture(scope="module")
def hostile():
    return inspect_source(Hostile(), workers=0)


def test_the_page_escapes_what_comes_from_the_data_loads_nothing_and_shows_every_example(hostile):
    html = page(hostile)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert not re.search(r"<script|<b>hostile|<i>gone|<u>\d|<img src=x", html)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", html)
    assert "{{ 7*7 }}" in html, "a caption is no template"
    html.encode()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|@import|url\(""", html)
    count = len(hostile.examples) + sum(map(len, hostile.near_examples))
    assert html.count('<img src="data:image/') == count == 11 + 6


def printed(inspection):
    console = Console(width=90, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    console.print(summary(inspection))
    return console.export_text()


def test_the_terminal_shows_markup_as_it_is_and_no_control_characters(hostile):
    text = printed(hostile)
    assert not re.search("\x1b\\[31m|\u202e", text)
    assert [part for part in ("[bold red]markup[/]", "Findings", "missing image") if part not in text] == []


def test_numbers_are_written_and_read_back(hostile):
    found = json.loads(hostile.to_json())
    assert (found["total"], found["read"], found["usable"], found["whole"]) == (12, 12, 11, True)
    assert found["broken"] == {"count": 1, "of": 12, "low": 1 / 12, "high": 1 / 12, "fraction": 1 / 12}
    assert (found["images"]["shorter"]["p50"], "examples" in found) == (90.0, False)
    assert found["near_images"]["examples"][0]["keys"][0] == "<u>0\udcff"
    assert found["captions"]["truncated"]["77"]["count"] == hostile.captions.truncated[77].count


def test_numbers_as_words():
    assert Fraction.counted(5, 50, whole=False).low == pytest.approx(0.0434, abs=1e-4)
    assert spread_of(np.arange(101))["p95"] == 95
    assert [about(number) for number in (1834, 18.34, 0.0512, 0)] == ["1,800", "18", "0.051", "0"]
    assert shown("a\x07b\u202ec" + "d" * 300, 10) == "a\ufffdb\ufffdcdddd…"


def test_the_command_writes_what_is_asked_for(table, tmp_path, command):
    inspect = ["data", "inspect", table, "--workers", 0]
    words = ["--json", tmp_path / "found.json", "--html", tmp_path / "found.html"]
    outcome = command(*inspect, "--sample", 10, "--seed", 3, "--quiet", *words)
    assert (outcome.status, "10 of 24 pairs were read, sampled with seed 3." in outcome.out) == (0, True)
    assert max(map(len, outcome.out.splitlines())) < 400, "a pipe is no wide terminal"
    assert (tmp_path / "found.html").is_file()
    assert json.loads((tmp_path / "found.json").read_text())["read"] == 10
    for words in (["--all"], ["--sample", 5, "--exclude", tmp_path / "drop.jsonl"]):
        outcome = command(*inspect, *words, "--check-leakage", table)
        assert (outcome.status, "All 24 pairs were read." in outcome.out) == (0, True)
    assert len(read_exclusions(tmp_path / "drop.jsonl", open_source(table))) == 24


def test_copies_of_a_test_set_become_a_list_to_exclude(table, tmp_path):
    source = open_source(table)
    names = [json.loads(line)["image"] for line in table.read_text(encoding="utf-8").splitlines()[3:5]]
    heldout = tmp_path / "heldout.csv"
    heldout.write_text("\n".join(["image,label", *(f"{name},1" for name in names)]), encoding="utf-8")
    for name in names:
        shutil.copy(table.parent / name, tmp_path / name)
    found = inspect_source(source, None, check_leakage=[heldout], workers=0)
    (tmp_path / "drop.jsonl").write_text(exclusions(found), encoding="utf-8")
    dropped = read_exclusions(tmp_path / "drop.jsonl", source)
    assert set(dropped) == {place for _, place in found.leakages[0].copies} >= {3, 4}


def test_a_source_without_a_usable_pair_ends_with_status_2(tmp_path, command):
    (tmp_path / "pairs.csv").write_text("image,caption\nimages/gone.png,a cat\n", encoding="utf-8")
    outcome = command("data", "inspect", tmp_path / "pairs.csv", "--workers", 0)
    assert outcome.status == 2
    printed = outcome.out.replace("\n", "")
    assert [part for part in ("missing image", "images/gone.png") if part not in printed] == []
    html = page(inspect_source(tmp_path / "pairs.csv", workers=0))
    assert "None of the 1 pair read is usable" in html
    assert "images/gone.png" in html


def test_a_mistake_ends_with_its_message(table, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        ("--html nowhere/page.html", "'nowhere' is not a writable folder"),
        ("--html .", "it is a folder"),
        ("--image-root nowhere", "nowhere"),
    ):
        outcome = command("data", "inspect", table, *words.split())
        assert (outcome.status, "Traceback" in outcome.err) == (2, False)
        assert message in outcome.err.replace("\n", " ")
