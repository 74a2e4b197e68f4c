"""The complete page: it parses, loads nothing, escapes its input, and names what it cannot show."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import write_rows
from declip.data.images.thumbnails import thumbnails_of
from declip.evaluation.datasets import open_dataset
from declip.evaluation.results import RecallAtK, RetrievalResult, ZeroShotResult
from declip.models.encoder import as_encoder
from declip.recipe.schema import Recipe
from declip.reports import page
from declip.reports.retrieval import retrieval
from declip.reports.run import write_report
from evaluation.conftest import features_of
from reports.pages import Page

NAMES = ("red", "green", "blue", "yellow", "cyan", "magenta", "white")
SECTIONS = ("numbers", "curves", "retrieval", "views", "skipped", "recipe")


def _run_folder(folder):
    recipe = Recipe(
        name="declip-tiny",
        loss_weights={"contrastive": 0.4, "simsiam": 0.2},
        evaluation={"zero_shot": ["builtin:emoji-test"], "final_zero_shot": ["painted"]},
        train={"batch_size": 64},
    )
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    rows = []
    for step in (10, 20, 30):
        terms = {"contrastive": 4 / step, "simsiam": -0.5}
        row = {"step": step, "samples_seen": 64 * step, "loss": 1 / step, "losses": terms}
        row |= {"lr": 1e-3, "logit_scale": 14.3, "grad_norm": 1.0}
        rows.append(row | {"seconds": 65.0, "samples_per_second": 987.0})
    write_rows(folder / "metrics.jsonl", rows)
    recall = RecallAtK(30, 20, 0.4321, 0.6, 0.8, 0.05, 0.25, 0.5, 2.0)
    rows = [{"step": 30} | RetrievalResult("painted", 20, 30, recall, recall).to_dict()]
    broken = {"truncated image": 3}
    for step, top1, top5 in ((10, 0.21, 0.6), (30, 0.5432, 0.8765)):
        result = ZeroShotResult("painted", 200, 7, top1, top5, 0.5, skipped=broken)
        rows.append({"step": step} | result.to_dict())
    write_rows(folder / "evaluations.jsonl", rows)
    skipped = {"reasons": {"empty caption": {"count": 17, "examples": ["row <5>"]}}, "seen": 1920}
    (folder / "skipped.json").write_text(json.dumps(skipped))
    thumbnail = {"src": "data:image/png;base64,iVBORw0KGgo=", "alt": "a cat"}
    examples = {
        "source": {"name": "pairs <of> red", "pairs": 21, "credit": "Colors by <nobody>"},
        "losses": {
            "contrastive": {"title": "contrastive loss", "explanation": "Text.", "chance": 4.1589}
        },
        "view_sheet": {"picture": thumbnail, "texts": [{"masked": "a [mask: cat] <sat>"}]},
    }
    (folder / "examples.json").write_text(json.dumps(examples))
    return folder


@pytest.fixture
def whole(model, painted, tmp_path, monkeypatch):
    """A finished run folder, its model, and its held-out source, which a test may replace."""
    colors = NAMES * 3
    captions = [(f'{color} <script>alert("1")</script> & co',) for color in colors]
    held_out = [painted(colors, captions, classes=NAMES)]
    monkeypatch.setattr(
        "declip.reports.run.HeldOutSets.test", lambda *_: open_dataset(held_out[0]).split("test")
    )
    return _run_folder(tmp_path), model, held_out


def _read(path):
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_the_whole_report(whole):
    folder, model, _ = whole
    path = write_report(folder, as_encoder(model))
    assert path == folder / "report.html"
    html, page = _read(path)
    assert [each for each in page.ids if each in SECTIONS] == list(SECTIONS)
    for section, *parts in (
        # ± by Wilson, of 0.5432 in 200
        ("numbers", "54.3 %", "87.6 %", "14.3 %", "43.2 %", "± 6.8 points"),
        ("numbers", "1,920", "987", "3.8", "3 min 15 s"),
        ("head", "54.3 %", "21 training pairs of pairs <of> red"),
        ("curves", "chance 14.3 %", "Weight 0.4. Chance level 4.16."),
        ("skipped", "17", "3 × truncated image", "row <5>"),
        ("recipe", "contrastive: 0.4"),
        ("views", "a [mask: cat] <sat>"),
        ("retrieval", "✓", "✗", '<script>alert("'),
    ):
        assert [part for part in parts if part not in page.texts[section]] == []
    assert html.count("<svg") == 1 + 3 + 3
    assert "top-1 from 21.0 % to 54.3 %; top-5 from 60.0 % to 87.6 %" in html
    assert 'class="absent"' not in html
    assert len(html.encode()) < 3_000_000
    # It loads nothing from elsewhere.
    assert {resource[:11] for resource in page.resources} == {"data:image/"}
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?:|url\((?!#)|@import|<link", html)
    assert all(alt for alt in page.alts)
    # Captions, keys and credits are escaped.
    assert "<script" not in html
    assert "Colors by &lt;nobody&gt;" in html


def test_the_same_run_shows_the_same_and_a_large_source_is_sampled(whole):
    folder, model, _ = whole

    def body():
        report = write_report(folder, as_encoder(model), limit=10)
        return re.sub("Written by declip [^<]*", "", report.read_text())

    html = body()
    assert html == body()
    assert "10 images (of 21) of painted" in Page(html).texts["retrieval"]
    assert max(size for kind, size, *_ in model.passes if kind == "image") == 10


def test_without_evaluation_examples_and_classes_there_are_no_such_sections(whole, painted):
    folder, model, held_out = whole
    for name in ("evaluations.jsonl", "examples.json"):
        (folder / name).unlink()
    held_out[0] = painted(["red", "green"], [("word " * 3000,), ("green",)])
    html, page = _read(write_report(folder, as_encoder(model)))
    for section, part in (
        ("numbers", "No evaluation"),
        ("head", "no evaluation yet"),
        ("retrieval", "word…"),
    ):
        assert part in page.texts[section]
    assert html.count("<svg") == 3 + 3
    assert ("word " * 40 in html, "views" in page.ids) == (False, False)


def test_held_out_pairs_that_are_gone_are_left_out_with_a_warning(whole, caplog):
    folder, model, held_out = whole
    held_out[0] = str(folder / "gone.csv")
    _, page = _read(write_report(folder, as_encoder(model)))
    assert "gone.csv" in caplog.text
    assert "54.3 %" in page.texts["numbers"]
    assert "retrieval" not in page.ids


COLORS = ["red", "green", "blue", "cyan", "yellow", "white"]
RNG = np.random.default_rng


def test_captions_found_and_not_found(painted):
    """Six pairs; the captions of the last three point at their left neighbors."""
    texts, captions = torch.eye(6), [(f"{color} thing",) for color in COLORS]
    texts[3:] = torch.eye(6)[2:5] + 0.5 * torch.eye(6)[3:]
    source = painted(COLORS, captions)
    queries, right_fraction = retrieval(source, features_of(torch.eye(6), captions, texts), each=2)
    assert [query["rank"] for query in queries] == [1, 1, 2, 2]
    assert right_fraction == 0.5
    for query in queries:
        own, hits = COLORS.index(query["caption"].split()[0]), query["hits"]
        assert [hit["correct"] for hit in hits] == [
            hit["caption"] == query["caption"] for hit in hits
        ]
        assert hits[query["rank"] - 1]["image"] == thumbnails_of(source)(own)
    assert not queries[2]["hits"][0]["correct"]


def test_an_image_with_the_same_caption_is_right(painted):
    captions = [("a cat",), ("a cat",), ("a dog",)]
    features = features_of(torch.eye(3), captions, torch.eye(3)[[0, 0, 2]])
    queries, _ = retrieval(painted(COLORS[:3], captions), features)
    cat = min(queries, key=lambda query: query["caption"])
    assert (cat["caption"], cat["rank"]) == ("a cat", 1)
    assert [hit["caption"] for hit in cat["hits"] if hit["correct"]] == ["a cat"] * 2


def test_a_class_of_the_style_sheet_has_one_rule():
    """A second rule of the same name, for another element, would change the first one's."""
    style = (Path(page.__file__).parent / "templates" / "style.css").read_text()
    always = re.sub(r"(?s)/\*.*?\*/|@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", style)
    rules = [rule.strip() for rule in re.findall(r"([^{}]+)\{", always)]
    classes = [rule for rule in rules if re.fullmatch(r"\.[\w-]+", rule)]
    assert len(classes) > 20
    assert [name for name in set(classes) if classes.count(name) > 1] == []
