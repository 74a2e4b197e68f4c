"""Inspection of a source: planted faults, samples, advice, the page, the terminal and the command."""

import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from conftest import refuses, texture, write_rows
from declip.data.pair import BrokenPair, Pair, PairSource
from declip.data.sources.open import open_source
from declip.inspection.results import Fraction
from declip.inspection.scan import inspect_source
from declip.io.text import round_two_digits, sanitize
from declip.reports.inspection import page, sentences, summary


def numbers(captions, side=8):
    return open_source([(texture(number, side), given) for number, given in enumerate(captions)])


def rules(inspection):
    return {finding.rule: finding.number for finding in inspection.findings}


def advice(inspection, rule):
    return next(
        f"{text} {advice}"
        for finding, text, advice in sentences(inspection)
        if finding.rule == rule
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A table of 24 drawings of two captions, and faults of every kind."""
    folder = tmp_path_factory.mktemp("planted")
    rows = []
    for number in range(24):
        texture(number, 300).save(folder / f"good{number}.png")
        captions = [f"a drawing of number {number}", f"number {number}"]
        rows.append((f"good{number}.png", captions))
    for number in range(3):
        shutil.copy(folder / f"good{number}.png", folder / f"same{number}.png")
        rows.append((f"same{number}.png", f"once more {number}"))
    for number in range(3, 7):
        texture(number, 300).resize((150, 150)).save(folder / f"near{number}.jpg", quality=80)
        rows.append((f"near{number}.jpg", "Company  Logo" if number % 2 else "company logo"))
    content = (folder / "near3.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    rows += [("cut.jpg", "cut off"), ("./good0.png", " "), ("./good1.png", " ")]
    Image.new("RGB", (900, 250), "white").save(folder / "blank.png")
    rows.append(("blank.png", "IMG_0001.jpg"))
    table = [{"image": image, "caption": caption} for image, caption in rows]
    return write_rows(folder / "planted.jsonl", table)


def test_planted_faults_are_found(planted):
    found = inspect_source(planted)
    assert (found.total, found.read, found.usable, found.whole) == (35, 35, 32, True)
    empty = found.reasons["empty caption"]
    assert empty == {"count": 2, "examples": ["./good0.png", "./good1.png"]}
    assert found.reasons["truncated image"]["examples"][0].startswith("cut.jpg")
    assert (found.broken.low, found.broken.high) == (3 / 35, 3 / 35), (
        "nothing is estimated when all was read"
    )
    equal, near, captions = found.equal_images, found.near_images, found.equal_captions
    found_groups = [(repeats.members, repeats.groups) for repeats in (equal, near, captions)]
    assert found_groups == [(6, 3), (14, 7), (4, 1)], "captions as the tokenizer sees them"
    assert equal.examples[0].keys == ("good0.png", "same0.png")
    assert [(group.caption, group.size) for group in captions.examples] == [("company logo", 4)]
    assert found.captions.per_pair["mean"] == pytest.approx((24 * 2 + 8) / 32)
    assert found.captions.examples["file name"] == ["IMG_0001.jpg"]
    assert (found.captions.kinds["file name"].count, found.images.smaller.count) == (1, 4)
    assert found.images.aspect["max"] == 3.6
    assert len(found.examples) == 32
    assert [len(row) for row in found.near_examples] == [2, 2, 2, 2]
    expected = {"broken", "equal_images", "near_images", "equal_captions", "odd_captions"}
    assert expected <= {*rules(found)}
    fixes = [finding.fix for finding in found.findings]
    assert fixes == sorted(fixes, reverse=True)


def test_processes_find_what_one_finds(planted):
    one, two = (inspect_source(planted, workers=workers) for workers in (0, 2))
    assert one.to_json() == replace(two, seconds=one.seconds).to_json()


def test_a_sample_says_how_sure_it_is():
    source = numbers([() if number % 10 == 0 else (f"caption {number}",) for number in range(1000)])
    found = inspect_source(source, 200)
    assert (found.read, found.total, found.whole) == (200, 1000, False)
    again, other = (inspect_source(source, 200, seed=seed) for seed in (0, 1))
    first, second, third = ([e.key for e in each.examples] for each in (found, again, other))
    assert first == second != third
    assert found.broken.low < 0.1 < found.broken.high
    assert found.broken.high - found.broken.low < 0.1
    assert "95 %" in advice(found, "broken")


def test_repeated_captions_are_named_where_pairs_share_several():
    words = [*["zebra", "zebu"] * 10, *map(str, range(10))]
    found = inspect_source(numbers([("a drawing", word) for word in words]), None).equal_captions
    groups = [(group.size, group.caption) for group in found.examples]
    assert groups == [(30, "a drawing"), (10, "zebra"), (10, "zebu")]


def test_equal_captions_in_a_batch_are_estimated():
    texts = [
        ("cat",) if number % 4 == 0 else (f"caption {number}", f"text {number}")
        for number in range(400)
    ]
    spelled = numbers([("Cat", "cat"), ("dog", "hound"), ("cat",)])
    variants = inspect_source(spelled, None, batch_size=3)
    assert variants.equal_captions.members == 2, "one text within a pair"
    assert variants.captions.equal_in_batch == pytest.approx(1.0), "of three couples one, always"
    four = numbers([("cat", f"a {n}", f"b {n}", f"c {n}") for n in range(400)])
    several = inspect_source(four, None)
    assert several.captions.equal_in_batch == pytest.approx(128 * 127 / 2 / 16, rel=0.3), (
        "each shows it once in four"
    )
    source, shares = numbers(texts), []
    for seed, count in enumerate([None, *[100] * 8]):
        found = inspect_source(source, count, batch_size=64, seed=seed)
        shares.append(found.captions.equal_in_batch)
    whole, *samples = shares
    assert whole == pytest.approx(64 * 63 / 2 * 100 * 99 / (400 * 399))
    assert np.mean(samples) == pytest.approx(whole, rel=0.15)


def test_one_pair_is_enough_and_none_says_why():
    found = inspect_source(numbers([("a single caption",)]))
    assert (found.usable, len(found.examples)) == (1, 1)
    assert (found.equal_images.groups, found.captions.equal_in_batch) == (0, 0)
    found = inspect_source(numbers([()] * 3))
    assert (found.usable, found.images, found.captions, found.examples) == (0, None, None, ())
    assert found.reasons["empty caption"]["count"] == 3
    assert [(finding.rule, finding.fix) for finding in found.findings] == [("broken", True)]


def test_images_of_a_test_set_are_found(planted):
    found = inspect_source(numbers([("a b",)] * 40, side=300), None, check_leakage=[planted])
    (leak,) = found.leakages
    assert (leak.name, leak.images, leak.matches.count) == ("planted.jsonl", 34, 24)
    assert leak.copies[:2] == (("item 0", 0), ("item 1", 1))
    assert rules(found)["leakage"] == 0.6
    bare = planted.with_name("bare")
    bare.mkdir()
    refuses("bare", inspect_source, planted, None, check_leakage=[bare])
    shutil.copy(next(planted.parent.glob("*.png")), bare / "copy.png")  # without a caption
    (leak,) = inspect_source(planted, None, check_leakage=[bare]).leakages
    assert (leak.images, leak.matches.count > 0) == (1, True)


def test_context_is_the_shortest_that_truncates_little():
    for words, context, rule in (
        (14, 16, "context_length"),
        (15, 24, "context_length"),
        (300, 77, "truncated"),
    ):
        found = inspect_source(numbers([("cat " * words,)] * 3))
        assert found.captions.context_length == context
        assert found.captions.truncated[77].count == (3 if rule == "truncated" else 0)
        assert {"context_length", "truncated"} & set(rules(found)) == {rule}
        assert set(re.findall(r"text.context_length=(\d+)", advice(found, rule))) == {str(context)}


def test_resolution_against_the_training_size():
    large, small, fits = (
        inspect_source(numbers([("a cat",)] * 3, side=side), size=100) for side in (400, 70, 120)
    )
    assert (rules(large)["large_images"], rules(small)["small_images"]) == (4.0, 1.0)
    assert "200 px (examples" in advice(large, "large_images")
    assert "64" in advice(small, "small_images")
    assert not {"small_images", "large_images"} & set(rules(fits))


def test_words_and_scripts():
    for caption, words in (
        (("cat", "tom", "kitty"), "views.text.second_view=caption"),
        (("cat",), "Add words"),
    ):
        assert words in advice(inspect_source(numbers([caption] * 4)), "one_word")
    found = inspect_source(numbers([("белая кошка",)] * 1 + [("a white cat",)] * 3))
    assert rules(found)["other_script"] == 0.25
    assert found.captions.examples == {"not in Latin script": ["белая кошка"]}
    found = inspect_source(numbers([("ein Hund",)] * 1 + [("a white cat",)] * 3))
    assert (rules(found)["foreign"], "ein Hund" in advice(found, "foreign")) == (0.25, True)


def test_keys_that_fine_tuning_refuses_or_is_harmed_by_are_advised_for_training_alone(planted):
    small = numbers(["a red bar"] * 6 + ["cat"] * 4, 40)
    several = numbers([["cat", "tom", "kitty"]] * 4)
    keys = set()
    for pairs in (planted, small, several):
        for _, text, line in sentences(inspect_source(pairs)):
            for sentence in re.split(r"(?<=[.]) ", f"{text} {line}"):
                own = re.findall(r"[a-z_]+(?:\.[a-z_]+)+=", sentence)
                keys |= {*own}
                assert not own or "declip train" in sentence or "train from scratch" in sentence, (
                    sentence
                )
    assert {"image.size=", "text.context_length="} <= keys
    assert {"contrastive.duplicates=", "views.text.second_view="} <= keys


def test_wrong_options_are_refused(planted):
    for name, value in {"sample": 0, "workers": -1, "size": 0, "batch_size": 1, "seed": -1}.items():
        refuses(f"{name} is {value}", inspect_source, planted, **{name: value})


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
        caption = HOSTILE[index % len(HOSTILE)].replace("\ud800", "")
        return Pair.of(f"<u>{index}\udcff", texture(index % 8, 90), [caption])


@pytest.fixture(scope="module")
def hostile():
    return inspect_source(Hostile())


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


def test_the_terminal_shows_markup_as_it_is_and_no_control_characters(hostile):
    console = Console(width=90, record=True, file=io.StringIO(), force_terminal=True)
    console.print(summary(hostile))
    text = console.export_text()
    assert not re.search("\x1b\\[31m|\u202e", text)
    for part in ("[bold red]markup[/]", "Findings", "missing image"):
        assert part in text


def test_numbers_are_written_and_read_back(hostile):
    found = json.loads(hostile.to_json())
    assert (found["total"], found["read"], found["usable"], found["whole"]) == (12, 12, 11, True)
    share = dict.fromkeys(("low", "high", "fraction"), 1 / 12)
    assert found["broken"] == {"count": 1, "of": 12, **share}
    assert (found["images"]["shorter"]["p50"], "examples" in found) == (90.0, False)
    assert found["near_images"]["examples"][0]["keys"][0] == "<u>0\udcff"
    assert found["captions"]["truncated"]["77"]["count"] == hostile.captions.truncated[77].count


def test_numbers_as_words():
    assert Fraction.counted(5, 50, whole=False).low == pytest.approx(0.0434, abs=1e-4)
    rounded = [round_two_digits(number) for number in (1834, 18.34, 0.0512, 0)]
    assert rounded == ["1,800", "18", "0.051", "0"]
    assert sanitize("a\x07b\u202ec" + "d" * 300, 10) == "a\ufffdb\ufffdcdddd…"


def test_the_command_writes_what_is_asked_for(table, rows, tmp_path, command):
    inspect = ["data", "inspect", table]
    words = ["--json", tmp_path / "found.json", "--html", tmp_path / "found.html"]
    outcome = command(*inspect, "--sample", 10, "--quiet", *words)
    assert outcome.status == 0
    assert "10 of 24 pairs were read, sampled with seed 0." in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 100, "a pipe is no wide terminal"
    assert (tmp_path / "found.html").is_file()
    assert json.loads((tmp_path / "found.json").read_text())["read"] == 10
    heldout = table.with_name("heldout.csv")
    copied = [f"{row['image']},1" for row in rows[3:5]]
    heldout.write_text("\n".join(["image,label", *copied]), encoding="utf-8")
    for words in (["--all"], ["--sample", 5, "--without-copies", tmp_path / "rest.pairs"]):
        outcome = command(*inspect, *words, "--check-leakage", heldout)
        assert (outcome.status, "All 24 pairs were read." in outcome.out) == (0, True)
    rest = open_source(tmp_path / "rest.pairs").indices.tolist()
    assert set() < set(rest) <= set(range(24)) - {3, 4}
