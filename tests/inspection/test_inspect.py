import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from conftest import refuses, texture
from declip.data.pair import BrokenPair, Pair, PairSource
from declip.inspection.scan import inspect_source, sample_places
from declip.reports.inspection import sentences


class Numbers(PairSource):
    """Pairs whose captions are given; the image is a color by its number."""

    name = "numbers"

    def __init__(self, captions, side=8):
        self.given, self.side = captions, side

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        return Pair(f"pair {index}", self.image(index), self.captions(index))

    def image(self, index):
        return texture(index, self.side)

    def captions(self, index):
        if not self.given[index]:
            raise BrokenPair("empty caption", f"pair {index}")
        return self.given[index]


def rules(inspection):
    return {finding.rule: finding.number for finding in inspection.findings}


def advice(inspection, rule):
    """Both sentences of a finding."""
    return next(f"{text} {advice}" for finding, text, advice in sentences(inspection) if finding.rule == rule)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A table of 24 drawings of two captions, and faults of every kind."""
    folder = tmp_path_factory.mktemp("planted")
    rows = []
    noisy = Numbers([("",)] * 30, side=300)
    for number in range(24):
        noisy.image(number).save(folder / f"good{number}.png")
        rows.append({"image": f"good{number}.png", "caption": [f"a drawing of number {number}", f"number {number}"]})
    for number in range(3):
        shutil.copy(folder / f"good{number}.png", folder / f"same{number}.png")
        rows.append({"image": f"same{number}.png", "caption": f"once more {number}"})
    for number in range(3, 7):
        noisy.image(number).resize((150, 150)).save(folder / f"near{number}.jpg", quality=80)
        rows.append({"image": f"near{number}.jpg", "caption": "Company  Logo" if number % 2 else "company logo"})
    content = (folder / "near3.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    rows.append({"image": "cut.jpg", "caption": "cut off"})
    rows += [{"image": f"./good{number}.png", "caption": " "} for number in range(2)]
    Image.new("RGB", (900, 250), "white").save(folder / "blank.png")
    rows.append({"image": "blank.png", "caption": "IMG_0001.jpg"})
    path = folder / "planted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_planted_faults_are_found(planted):
    found = inspect_source(planted, workers=0)
    assert (found.total, found.read, found.usable, found.whole) == (35, 35, 32, True)
    assert found.reasons["empty caption"] == {"count": 2, "examples": ["./good0.png", "./good1.png"]}
    assert found.reasons["truncated image"]["examples"][0].startswith("cut.jpg")
    assert (found.broken.low, found.broken.high) == (3 / 35, 3 / 35), "nothing is estimated when all was read"
    equal, near, captions = found.equal_images, found.near_images, found.equal_captions
    assert (equal.members, equal.groups) == (6, 3)
    assert equal.examples[0].keys == ("good0.png", "same0.png")
    assert (near.members, near.groups) == (14, 7)
    assert (captions.members, captions.groups) == (4, 1), "as the tokenizer sees them"
    assert [(group.caption, group.size) for group in captions.examples] == [("company logo", 4)]
    assert found.captions.per_pair["mean"] == pytest.approx((24 * 2 + 8) / 32)
    assert found.captions.kinds["file name"].count == 1
    assert found.captions.examples["file name"] == ["IMG_0001.jpg"]
    assert found.images.smaller.count == 4
    assert found.images.aspect["max"] == 3.6
    assert len(found.examples) == 32
    assert [len(row) for row in found.near_examples] == [2, 2, 2, 2]
    assert {"broken", "equal_images", "near_images", "equal_captions", "odd_captions"} <= {*rules(found)}
    assert [finding.fix for finding in found.findings] == sorted((f.fix for f in found.findings), reverse=True)


def test_processes_find_what_one_finds(planted):
    one, two = (inspect_source(planted, workers=workers).to_dict() for workers in (0, 2))
    del one["seconds"], two["seconds"]
    assert one == two


def test_a_sample_says_how_sure_it_is():
    source = Numbers([() if number % 10 == 0 else (f"caption {number}",) for number in range(1000)])
    found = inspect_source(source, 200, workers=0)
    assert (found.read, found.total, found.whole) == (200, 1000, False)
    places = [sample_places(1000, 200, seed).tolist() for seed in (0, 0, 1)]
    assert places[0] == places[1] != places[2]
    assert places[0] == sorted(set(places[0]))
    assert found.broken.low < 0.1 < found.broken.high
    assert found.broken.high - found.broken.low < 0.1
    assert "95 %" in advice(found, "broken")


def test_repeated_captions_are_named_where_pairs_share_several():
    texts = [("a drawing", ("zebra", "zebu")[number % 2] if number < 20 else f"{number}") for number in range(30)]
    found = inspect_source(Numbers(texts), None, workers=0).equal_captions
    assert [(group.size, group.caption) for group in found.examples] == [(30, "a drawing"), (10, "zebra"), (10, "zebu")]


def test_equal_captions_in_a_batch_are_estimated():
    texts = [("cat",) if number % 4 == 0 else (f"caption {number}", f"text {number}") for number in range(400)]
    variants = inspect_source(Numbers([("Cat", "cat"), ("dog", "hound"), ("cat",)]), None, batch_size=3, workers=0)
    assert variants.equal_captions.members == 2, "one text within a pair"
    assert variants.captions.equal_in_batch == pytest.approx(1.0), "of three couples one, always"
    several = inspect_source(Numbers([("cat", f"a {n}", f"b {n}", f"c {n}") for n in range(400)]), None, workers=0)
    assert several.captions.equal_in_batch == pytest.approx(128 * 127 / 2 / 16, rel=0.3), "each shows it once in four"
    whole, *samples = (
        inspect_source(Numbers(texts), count, batch_size=64, seed=seed, workers=0).captions.equal_in_batch
        for seed, count in enumerate([None, *[100] * 8])
    )
    assert whole == pytest.approx(64 * 63 / 2 * 100 * 99 / (400 * 399))
    assert np.mean(samples) == pytest.approx(whole, rel=0.15)


def test_one_pair_is_enough_and_none_says_why():
    found = inspect_source(Numbers([("a single caption",)]), workers=0)
    assert (found.usable, found.equal_images.groups, found.captions.equal_in_batch, len(found.examples)) == (1, 0, 0, 1)
    found = inspect_source(Numbers([()] * 3), workers=0)
    assert (found.usable, found.images, found.captions, found.examples) == (0, None, None, ())
    assert found.reasons["empty caption"]["count"] == 3
    assert [(finding.rule, finding.fix) for finding in found.findings] == [("broken", True)]


def test_images_of_a_test_set_are_found(planted):
    found = inspect_source(Numbers([("a b",)] * 40, side=300), None, check_leakage=[planted], workers=0)
    (leak,) = found.leakages
    assert (leak.name, leak.images, leak.found.count) == ("planted.jsonl", 34, 24)
    assert leak.copies[:2] == (("pair 0", 0), ("pair 1", 1))
    assert rules(found)["leakage"] == 0.6
    bare = planted.with_name("bare")
    bare.mkdir()
    refuses("bare", inspect_source, planted, None, check_leakage=[bare], workers=0)
    shutil.copy(next(planted.parent.glob("*.png")), bare / "copy.png")  # without a caption
    (leak,) = inspect_source(planted, None, check_leakage=[bare], workers=0).leakages
    assert (leak.images, leak.found.count > 0) == (1, True)


def test_one_word_captions_lead_to_another_second_view():
    for caption, words in ((("cat", "tom", "kitty"), "views.text.second_view=caption"), (("cat",), "Add words")):
        assert words in advice(inspect_source(Numbers([caption] * 4), workers=0), "one_word")


@pytest.mark.parametrize(("words", "context"), [(14, 16), (15, 24), (300, 77)])
def test_context_is_the_shortest_that_truncates_little(words, context):
    found = inspect_source(Numbers([("cat " * words,)] * 3), workers=0)
    assert found.captions.context_length == context
    assert found.captions.truncated[77].count == (3 if words + 2 > 77 else 0)
    (rule,) = {"context_length", "truncated"} & set(rules(found))
    assert rule == ("truncated" if words + 2 > 77 else "context_length")
    assert set(re.findall(r"text.context_length=(\d+)", advice(found, rule))) == {str(context)}, "one recommendation"


def test_resolution_against_the_training_size():
    large, small, fits = (
        inspect_source(Numbers([("a cat",)] * 3, side=side), size=100, workers=0) for side in (400, 70, 120)
    )
    assert rules(large)["large_images"] == 4.0
    assert "--size 200`: 4 times fewer" in advice(large, "large_images")
    assert rules(small)["small_images"] == 1.0
    assert "such as 64" in advice(small, "small_images")
    assert not {"small_images", "large_images"} & set(rules(fits))


def test_scripts_and_queue():
    found = inspect_source(Numbers([("белая кошка",)] * 1 + [("a white cat",)] * 3), workers=0)
    assert rules(found)["other_script"] == 0.25
    assert found.captions.examples == {"not in Latin script": ["белая кошка"]}
    thousands = inspect_source(Numbers([(f"caption {n}",) for n in range(1453)]), 20, workers=0)
    assert "queue_size=256" in advice(thousands, "queue")


def test_wrong_options_are_refused(planted):
    for name, value in {"sample": 0, "workers": -1, "size": 0, "batch_size": 1, "seed": -1}.items():
        refuses(f"{name} is {value}", inspect_source, planted, **{name: value})
    refuses(r"nowhere\.jsonl", inspect_source, planted, check_leakage=["nowhere.jsonl"])
