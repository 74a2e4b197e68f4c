"""Pushing to a Hub on this machine, and loading from there by name and revision."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

import declip
from declip.errors import UserError
from declip.evaluation.results import RecallAtK, RetrievalResult, ZeroShotResult
from declip.interchange import huggingface
from declip.interchange.model_card import Provenance, model_card
from declip.interchange.read import read_start
from declip.recipe.load import load_recipe
from interchange.hub_server import Hub, serving
from interchange.test_export import features
from interchange.towers import EXACT, build, command, largest


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub at which huggingface_hub looks, with a token for it and an empty cache."""
    with serving() as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server


def same(model: Any, other: Any) -> bool:
    """Whether both give the same features of images and of captions."""
    return all(largest(*pair) <= EXACT for pair in zip(features(model)[1::2], features(other)[1::2], strict=True))


def test_a_model_is_pushed_and_loaded_by_its_revision(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = build("conv"), build("conv")
    with torch.no_grad():
        second.image_tower.proj.weight[0] += 1.0
    declip.export(first, "safetensors", tmp_path / "first")
    words = ["push", str(tmp_path / "first"), "me/conv", "--private", "--license", "mit"]
    assert command(words, monkeypatch) == 0  # open_clip cannot express this tower
    assert f"{hub.endpoint}/me/conv" in capfd.readouterr().out
    revision, files = hub.files("me/conv")
    assert (sorted(files), hub.private) == (["README.md", "declip.safetensors"], {"me/conv"})
    assert b'declip.load("hf-hub:me/conv")' in files["README.md"]
    (card,) = hub.cards
    assert "license: mit" in card
    declip.push(second, "me/conv")
    for name in (f"hf-hub:me/conv@{revision}", f"huggingface:me/conv@{revision}"):
        assert same(declip.load(name, device="cpu"), first)
    assert same(declip.load("hf-hub:me/conv", device="cpu"), second)
    assert not same(first, second)


def test_the_files_of_another_format_are_replaced(hub: Hub) -> None:
    pytest.importorskip("open_clip")
    model = build("vit")
    declip.push(model, "me/vit", format="safetensors")
    revision, files = hub.files("me/vit")
    kept = {"index/embeddings.safetensors": b"mine", "notes.json": b"mine"}
    hub.revisions["me/vit"][revision] = {**files, **kept, "special_tokens_map.json": b"{}"}
    assert declip.push(model, "me/vit") == f"{hub.endpoint}/me/vit"
    names = set(hub.files("me/vit")[1])
    assert {"open_clip_config.json", "open_clip_model.safetensors"} < names
    assert names.isdisjoint({"declip.safetensors", "special_tokens_map.json"})
    assert kept.keys() < names
    assert same(declip.load("hf-hub:me/vit", device="cpu"), model)
    assert read_start("hf-hub:me/vit").whole


def test_a_repository_of_transformers_is_read(hub: Hub, tmp_path: Path) -> None:
    model = build("vit")
    huggingface.write(model, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    hub.revisions["me/hf"] = {"1" * 40: {**files, "pytorch_model.bin": b"a pickle"}}
    for name in ("hf-hub:me/hf", "huggingface:me/hf"):
        assert same(declip.load(name, device="cpu"), model)
    declip.export("huggingface:me/hf", "safetensors", tmp_path / "ours")
    assert same(declip.load(tmp_path / "ours", device="cpu"), model)
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_what_cannot_be_pushed_or_fetched_is_refused_in_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, vit = build("conv"), build("vit")
    hub.revisions["me/open"] = {"0" * 40: {}}
    with pytest.raises(UserError, match=r"me/open' is public.*--private"):
        declip.push(model, "me/open", private=True, format="safetensors")
    with pytest.raises(UserError, match="OWNER/NAME"):
        declip.push(model, "conv")
    with pytest.raises(UserError, match="cannot be exported as open_clip"):
        declip.push(model, "me/conv", format="open_clip")
    with pytest.raises(UserError, match="Cannot fetch 'hf-hub:me/other@v1'"):
        declip.load("hf-hub:me/other@v1")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"Cannot push to 'me/vit'.*401"):
        declip.push(vit, "me/vit", format="safetensors")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    declip.export(model, "safetensors", tmp_path / "model")
    capfd.readouterr()
    assert command(["push", str(tmp_path / "model"), "me/conv"], monkeypatch) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "HF_TOKEN" in line
    assert set(hub.revisions) == {"me/open"}


def test_the_card_has_results_data_and_base_models_as_the_hub_reads_them(tmp_path: Path) -> None:
    recall = RecallAtK(10, 10, 0.5, 0.7, 0.9, 0.1, 0.5, 1.0, 2.0)
    results = (
        ZeroShotResult("builtin:emoji-test", n=100, classes=10, top1=0.31234567, top5=0.8, mean_per_class=float("nan")),
        RetrievalResult("/home/me/shapes.csv", images=10, texts=10, text_to_image=recall, image_to_text=recall),
    )
    keys = {"data.source": "hf://datasets/owner/pairs/data/*.tar", "finetune.pretrained": "builtin:lite0-minilm"}
    recipe = load_recipe("clip", {**keys, "name": "mine"})
    (tmp_path / "README.md").write_text(
        model_card(build("vit"), Provenance(recipe, 4, 100, results), "declip", license="mit"), encoding="utf-8"
    )
    head = metadata_load(tmp_path / "README.md")
    assert head is not None
    name, read = model_index_to_eval_results(head["model-index"])
    assert (name, head["datasets"], head["license"], head["library_name"]) == ("mine", ["owner/pairs"], "mit", "declip")
    assert head["base_model"] == ["timm/tf_efficientnet_lite0.in1k", "sentence-transformers/all-MiniLM-L6-v2"]
    values = {(row.task_type, row.dataset_type, row.metric_type, row.metric_name): row.metric_value for row in read}
    assert values["zero-shot-image-classification", "builtin-emoji-test", "accuracy", "top-1"] == 0.3123
    assert values["image-text-retrieval", "shapes.csv", "recall_at_1", "text → image R@1"] == 0.5
    assert len(values) == 2 + 6  # the mean that is not a number is left out
    assert not re.search(r"/home", (tmp_path / "README.md").read_text(encoding="utf-8"))
