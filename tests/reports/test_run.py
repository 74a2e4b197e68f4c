"""The page as a whole: it parses, stands alone, escapes what it is given, and says what it cannot show."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from declip.data.loader import PairLoader
from declip.data.text.tokenizer import Tokenizer
from declip.evaluation.datasets import open_dataset
from declip.evaluation.results import RecallAtK, RetrievalResult, ZeroShotResult
from declip.recipe.schema import Recipe
from declip.reports.run import write_report
from declip.supervision.nearest_neighbor import Queue
from reports.conftest import plan
from reports.pages import Page

NAMES = ("red", "green", "blue", "yellow", "cyan", "magenta", "white")
SECTIONS = ("numbers", "curves", "to-images", "to-texts", "confused", "neighbors", "views", "skipped", "recipe")


def _objective(queue: Queue | None) -> SimpleNamespace:
    return SimpleNamespace(queue=queue, terms={})


def _run_folder(folder: Path, steps: int = 30) -> Path:
    """A finished run with every file."""
    recipe = Recipe.model_validate({"name": "declip-tiny", "loss_weights": {"contrastive": 0.4, "simsiam": 0.2}})
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(10, steps + 1, 10):
            terms = {"contrastive": 4 / step, "simsiam": -0.5}
            row = {"step": step, "samples_seen": 64 * step, "loss": 1 / step, "losses": terms, "seconds": 65.0}
            row |= {"lr": 1e-3, "logit_scale": 14.3, "grad_norm": 1.0, "samples_per_second": 987.0}
            file.write(json.dumps(row) + "\n")
    recall = RecallAtK(30, 20, 0.4321, 0.6, 0.8, 0.05, 0.25, 0.5, 2.0)
    results = [
        ZeroShotResult("painted", 200, 7, top1, top5, 0.5, skipped={"truncated image": 3})
        for top1, top5 in ((0.21, 0.6), (0.5432, 0.8765))
    ]
    with (folder / "evaluations.jsonl").open("w") as file:
        for step, result in zip((10, 30), results, strict=True):
            file.write(json.dumps({"step": step} | result.to_dict()) + "\n")
        retrieval = RetrievalResult("painted", 20, 30, recall, recall)
        file.write(json.dumps({"step": 30} | retrieval.to_dict()) + "\n")
    skipped = {"reasons": {"empty caption": {"count": 17, "examples": ["row <5>"]}}, "seen": 1920}
    (folder / "skipped.json").write_text(json.dumps(skipped))
    return folder


@pytest.fixture
def whole(model, painted, tmp_path):
    """Everything that a report can be given."""
    model.tokenizer = Tokenizer(context=16, merges=500)
    colors = [NAMES[row % 7] for row in range(21)]
    captions = [(f'{color} <script>alert("{row}")</script> & co',) for row, color in enumerate(colors)]
    source = painted(colors, captions, classes=NAMES)
    source.labels[:5] = (source.labels[:5] + 1) % 7  # wrong labels, so that there are confusions
    source.credit = "Colors by <nobody>"
    views = plan((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    queue = Queue(16, 3)
    queue.push(torch.rand(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) * 2)
    loader = PairLoader(source, model.tokenizer, views, batch_size=8, seed=0)
    training = SimpleNamespace(source=source, plan=views, shown_loader=loader, objective=_objective(queue))
    return _run_folder(tmp_path), model, {"heldout": source, "training": training}


def _read(path: Path) -> tuple[str, Page]:
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_the_whole_report(whole) -> None:
    folder, model, given = whole
    path = write_report(folder, model, **given)
    assert path == folder / "report.html"
    html, page = _read(path)
    assert [each for each in page.ids if each in SECTIONS] == list(SECTIONS)
    numbers = page.texts["numbers"]
    for figure in ("54.3 %", "87.6 %", "14.3 %", "43.2 %", "1,920", "987", "3.8", "3 min 15 s"):
        assert figure in numbers
    assert "± 6.8 points" in numbers  # Wilson, of 0.5432 in 200
    assert "54.3 %" in page.texts["head"]  # the sentence at the top
    assert html.count("<svg") == 1 + 3 + 3
    assert "chance 14.3 %" in page.texts["curves"]
    assert 'class="absent"' not in html
    assert "17" in page.texts["skipped"]
    assert "3 × truncated image" in page.texts["skipped"]
    assert "contrastive: 0.4" in page.texts["recipe"]
    assert len(html.encode()) < 3_000_000
    for section in ("to-images", "to-texts"):
        assert {"✓", "✗"} <= set(page.texts[section])
    # It loads nothing from elsewhere.
    assert page.resources
    assert all(resource.startswith("data:image/") for resource in page.resources)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?:|url\((?!#)|@import|<link", html)
    assert all(alt for alt in page.alts)
    # Captions, keys and credits are escaped.
    assert "<script" not in html
    assert '<script>alert("' in page.texts["to-images"]
    assert "row <5>" in page.texts["skipped"]
    assert "Colors by &lt;nobody&gt;" in html


def test_the_same_seed_shows_the_same_and_a_large_source_is_sampled(whole) -> None:
    folder, model, given = whole

    def body() -> str:
        training = given["training"]
        training.shown_loader = PairLoader(training.source, model.tokenizer, training.plan, batch_size=8, seed=0)
        path = write_report(folder, model, **given, limit=10)
        return re.sub("Written by declip [^<]*", "", path.read_text())

    html = body()
    assert html == body()
    assert "10 of the 21 held-out pairs of painted" in Page(html).texts["to-images"]
    assert max(size for kind, size, *_ in model.passes if kind == "image") == 10


def test_a_run_that_has_only_begun(model, tmp_path) -> None:
    model.tokenizer = Tokenizer(context=16, merges=500)
    html, page = _read(write_report(tmp_path, model))
    assert [each for each in page.ids if each in SECTIONS] == list(SECTIONS)
    assert "Nothing has been measured" in page.texts["numbers"]
    assert "No step has been logged yet" in page.texts["curves"]
    for section in ("to-images", "to-texts", "confused"):
        assert "names no source under `evaluation`" in page.texts[section]
    for section in ("neighbors", "views"):
        assert "were not at hand" in page.texts[section]
    assert "Not written yet" in page.texts["skipped"]
    assert "no recipe.yaml" in page.texts["recipe"]
    assert "<svg" not in html


def test_a_run_before_its_first_evaluation_and_held_out_pairs_without_classes(whole, painted) -> None:
    folder, model, given = whole
    (folder / "evaluations.jsonl").unlink()
    captions = [("word " * 3000,), ("green",)]
    given["heldout"], given["training"].objective = painted(["red", "green"], captions), _objective(None)
    html, page = _read(write_report(folder, model, **given))
    assert "Nothing has been measured" in page.texts["numbers"]
    assert "1,920" in page.texts["numbers"]
    assert "nothing has been measured yet" in page.texts["head"]
    assert html.count("<svg") == 3 + 3
    assert "not finished: step 30 of 1,000" in page.texts["head"]
    assert "✓" in page.texts["to-images"]  # the galleries need the model alone
    assert "word…" in page.texts["to-images"]
    assert "word " * 40 not in html
    assert "has no classes" in page.texts["confused"]
    assert "keeps no queue" in page.texts["neighbors"]


def test_held_out_pairs_that_are_not_there_and_a_queue_without_tags(whole) -> None:
    folder, model, given = whole
    queue = Queue(4, 3)
    queue.push(torch.eye(3))
    given["heldout"], given["training"].objective = str(folder / "gone.csv"), _objective(queue)
    _, page = _read(write_report(folder, model, **given))
    assert "gone.csv" in page.texts["to-images"]
    assert "54.3 %" in page.texts["numbers"]
    assert "no entry that names its pair" in page.texts["neighbors"]


@pytest.mark.parametrize(("measured", "chosen"), [("painted", "painted"), ("test", "test"), ("", "new")])
def test_the_recipe_chooses_what_is_shown(whole, monkeypatch, measured: str, chosen: str) -> None:
    folder, model, given = whole
    opened = []
    monkeypatch.setattr("declip.reports.run.open_dataset", lambda name: opened.append(name) or open_dataset(heldout))
    evaluation = {"zero_shot": ["painted"], "final_zero_shot": ["builtin:emoji-test", "new", "test"]}
    recipe = Recipe.model_validate({"name": "x", "loss_weights": {"contrastive": 1}, "evaluation": evaluation})
    rows = (folder / "evaluations.jsonl").read_text()
    (folder / "evaluations.jsonl").write_text(rows.replace('"painted"', f'"{measured}"') if measured else "")
    heldout = given["heldout"]
    write_report(folder, model, recipe=recipe)
    assert opened == [chosen]
