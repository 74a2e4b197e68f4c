"""Loading from a Hub on this machine by name and revision, and the card that the Hub reads."""

import re

import pytest
import torch
from huggingface_hub import constants, metadata_load

import declip
from conftest import refuses
from declip.evaluation.results import RecallAtK, RetrievalResult
from declip.interchange.model_card import Traced, model_card
from declip.interchange.read import read_start
from declip.recipe.load import load_recipe
from interchange.hub_server import serving
from interchange.test_export import features
from interchange.towers import EXACT, build, largest

OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub at which huggingface_hub looks, with an empty cache."""
    with serving() as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield server


def same(model, other):
    """Whether both give the same features of images and of captions."""
    return all(largest(*pair) <= EXACT for pair in zip(features(model)[1::2], features(other)[1::2], strict=True))


def exported(model, form, folder):
    """Files of an export."""
    declip.export(model, form, folder, repo="me/conv")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_is_loaded_by_its_revision(hub, tmp_path):
    first, second = build("conv"), build("conv")
    with torch.no_grad():
        second.image_tower.proj.weight[0] += 1.0
    files = {sha: exported(model, "safetensors", tmp_path / sha) for sha, model in ((OLD, first), (NEW, second))}
    hub.revisions["me/conv"] = files
    assert b'declip.load("hf-hub:me/conv")' in files[OLD]["README.md"]
    for name in (f"hf-hub:me/conv@{OLD}", f"huggingface:me/conv@{OLD}"):
        assert same(declip.load(name, device="cpu"), first)
    assert same(declip.load("hf-hub:me/conv", device="cpu"), second)
    assert not same(first, second)
    refuses("Cannot fetch 'hf-hub:me/other@v1'", declip.load, "hf-hub:me/other@v1")


@pytest.mark.parametrize(
    ("form", "names"), [("open_clip", ["hf-hub:me/vit"]), ("huggingface", ["hf-hub:me/vit", "huggingface:me/vit"])]
)
def test_a_repository_of_another_library_is_read_without_its_pickles(hub, form, names, tmp_path):
    pytest.importorskip("open_clip")
    model = build("vit")
    hub.revisions["me/vit"] = {NEW: {**exported(model, form, tmp_path / "out"), "pytorch_model.bin": b"a pickle"}}
    for name in names:
        assert same(declip.load(name, device="cpu"), model)
        assert read_start(name).whole
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_the_card_has_results_data_and_base_models_as_the_hub_reads_them(tmp_path):
    recall = RecallAtK(10, 10, 0.5, 0.7, 0.9, 0.1, 0.5, 1.0, 2.0)
    results = (RetrievalResult("/home/me/shapes.csv", images=10, texts=10, text_to_image=recall, image_to_text=recall),)
    keys = {"data.source": "hf://datasets/owner/pairs/data/*.tar", "finetune.pretrained": "builtin:lite0-minilm"}
    recipe = load_recipe("clip", {**keys, "name": "mine"})
    card = model_card(Traced(build("vit"), recipe, 4, 100, results), "declip", license="mit")
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    head = metadata_load(tmp_path / "README.md")
    assert (head["datasets"], head["license"], head["library_name"]) == (["owner/pairs"], "mit", "declip")
    assert head["base_model"] == ["timm/tf_efficientnet_lite0.in1k", "sentence-transformers/all-MiniLM-L6-v2"]
    assert "| shapes.csv | retrieval | text → image R@1 | 50.0 %" in card
    assert not re.search(r"/home", card)
