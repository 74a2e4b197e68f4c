"""What an image and a query both resemble."""

import json

import torch
from torch.nn.functional import normalize

import declip
from conftest import read_table, refuses, texture
from declip.runs.fitted import HEADS, KNOWN
from declip.search.explain import anchor_names, resembled
from indices import START


def test_the_names_are_those_whose_products_of_neighbors_are_largest(explained):
    hits = explained.explain("an orange", explained.search("an orange", k=4))
    model = explained.model
    names = anchor_names(START)
    assert len(names) == 1_000
    image_side, text_side = model.image_tower.proj.side, model.text_tower.text_projection.side
    with torch.no_grad():
        pooled = model.text_tower.pool(model.tokenize(["an orange"]))[0]
        text = normalize(pooled - text_side.mean, dim=0) @ text_side.anchors.mT
        for hit in hits:
            image = model.image_tower.pool(model.preprocess(explained.image(hit.id)))[0]
            shared = normalize(image - image_side.mean, dim=0) @ image_side.anchors.mT
            near = [set(cosines.topk(50).indices.tolist()) for cosines in (text, shared)]
            both = sorted(near[0] & near[1], key=lambda row: -(text[row] * shared[row]))
            assert list(hit.resembles) == [names[row] for row in both[:3]]
    assert {hit.resembles for hit in hits} != {()}


def test_the_command_prints_and_writes_them(explained, tmp_path, command):
    files = "--json", tmp_path / "hits.json", "--out", tmp_path / "hits.csv"
    printed = command("search", explained.folder, "an orange", "--why", *files).out
    hits = json.loads((tmp_path / "hits.json").read_text())["hits"]
    expected = explained.explain("an orange", explained.search("an orange"))
    assert [tuple(hit["resembles"]) for hit in hits] == [hit.resembles for hit in expected]
    named = [row["both resemble"] for row in read_table(tmp_path / "hits.csv")]
    assert named == ["; ".join(hit.resembles) for hit in expected]
    first = next(hit.resembles[0] for hit in expected if hit.resembles)
    assert first in printed
    assert "both resemble" in printed
    picture = tmp_path / "orange.png"
    texture(0).save(picture)
    command.refused(["Give a text"], "search", explained.folder, "--image", picture, "--why")


def test_a_name_of_several_pairs_is_said_once(explained):
    hits = explained.explain("an orange", explained.search("an orange"))
    images = [next(explained.image(hit.id) for hit in hits if len(hit.resembles) > 1)]
    (first,) = resembled(explained.model, explained.known_names, "an orange", images, 2)
    doubled = ["both" if name in first else name for name in explained.known_names]
    (found,) = resembled(explained.model, doubled, "an orange", images, 2)
    assert len(first) == 2
    assert found[0] == "both"
    assert "both" not in found[1:]


def test_anchors_of_a_fit_are_its_captions(tmp_path):
    (tmp_path / HEADS).touch()
    (tmp_path / KNOWN).write_text('key,caption\na.png,"red, or green"\n,tench\n')
    assert anchor_names(tmp_path) == ["red, or green", "tench"]
    assert anchor_names(tmp_path / "other") == []


def test_a_model_without_neighbors_is_refused(weights_file, tmp_path):
    (tmp_path / "pictures").mkdir()
    texture(0).save(tmp_path / "pictures/0.png")
    index = declip.embed(weights_file, tmp_path / "pictures", out=tmp_path / "index")
    refuses("no known pairs or classes.*--why", index.explain, "red", index.search("red"))
