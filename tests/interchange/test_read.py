"""Weights by name: runs, timm's files, and a Hub on this machine by revision."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import constants, metadata_load
from safetensors.torch import save_file

import declip
from conftest import draw, refuses
from declip.errors import UserError
from declip.evaluation.results import RecallAtK, RetrievalResult
from declip.interchange.export import Traced, model_card
from declip.interchange.read import read_checkpoint, read_start
from declip.models.image_tower import ImageTower
from declip.recipe.load import load_recipe
from declip.runs.checkpoint import WEIGHTS, list_checkpoints, step_of
from interchange.test_export import features
from interchange.towers import EXACT, build, largest
from training.starts import recipe_for, trainer_of


def test_a_loaded_run_gives_the_features_of_the_trained_model(table, tmp_path):
    trainer = trainer_of(recipe_for(table), tmp_path)
    trainer.train()
    expected = trainer.parts.model.eval()
    for where in (tmp_path, list_checkpoints(tmp_path)[-1]):
        model = declip.load(where, device="cpu")
        assert not model.training
        images, words = model.preprocess([draw("red", "circle")]), model.tokenize("a red circle")
        with torch.no_grad():
            assert torch.equal(model.encode_image(images), expected.encode_image(images))
            assert torch.equal(model.encode_text(words), expected.encode_text(words))
        assert model.encode_image(images).norm(dim=-1).item() == pytest.approx(1, abs=1e-5)


def test_what_is_not_a_model_is_named(table, tmp_path):
    refuses("Cannot find the model", declip.load, tmp_path / "missing")
    refuses("not a run folder", declip.load, tmp_path)
    with pytest.raises(UserError):
        declip.load(table)
    trainer_of(recipe_for(table), tmp_path / "run")
    refuses("no checkpoint yet", declip.load, tmp_path / "run")


def test_damaged_checkpoints_and_their_weights_alone_are_named(table, tmp_path, caplog):
    plain = recipe_for(table, steps=4, checkpoint_every=1, keep_checkpoints=4, evaluate_every=1)
    evaluation = plain.evaluation.model_copy(update={"retrieval": (str(table),)})
    train = plain.train.model_copy(update={"patience": 9})
    watched = plain.model_copy(update={"evaluation": evaluation, "train": train})
    trainer_of(watched, tmp_path).train()
    best = (tmp_path / "checkpoints/best").resolve()
    kept = list_checkpoints(tmp_path)
    (best / WEIGHTS).write_bytes(b"half")
    good = next(folder for folder in reversed(kept) if folder != best)
    assert read_checkpoint(tmp_path).step == step_of(good)
    assert re.search(rf"{best.name}/{WEIGHTS} is damaged.*step {step_of(good)}", caplog.text)
    folder = list_checkpoints(tmp_path)[-1]
    refuses("by its folder", declip.load, folder / WEIGHTS)
    for folder in list_checkpoints(tmp_path):
        (folder / WEIGHTS).write_bytes(b"half")
    refuses("damaged", declip.load, tmp_path)


def test_timms_image_tower_alone_gives_its_pooled_feature(tmp_path):
    trunk = timm.create_model("test_vit", num_classes=0).eval()
    save_file(trunk.state_dict(), tmp_path / "vit.safetensors")
    model = declip.load(f"timm:test_vit/{tmp_path / 'vit.safetensors'}", device="cpu")
    pixels = model.preprocess([draw("red", "circle")])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_backbone(pixels), trunk(pixels))
        torch.testing.assert_close(model.encode_image(pixels), F.normalize(trunk(pixels), dim=-1))
    refuses("image tower alone", model.tokenize, "a cat")


@pytest.mark.parametrize("change", ["more", "fewer", "statistics", "other"])
def test_timms_weights_of_another_architecture_are_refused(tmp_path, change):
    name = "test_resnet" if change == "statistics" else "test_vit"
    state = timm.create_model(name).state_dict()
    classifier = [key for key in state if key.startswith(("fc.", "head."))]
    assert classifier
    if change == "more":
        state |= {key.replace("blocks.0", "blocks.9"): t.clone() for key, t in state.items() if "blocks.0" in key}
    elif change == "other":
        state = timm.create_model("test_resnet").state_dict()
    else:
        state = {key: t for key, t in state.items() if "running_mean" not in key and "norm1.bias" not in key}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=f"not those of {name}: (Missing|Unexpected) key") as caught:
        declip.load(f"timm:{name}/{tmp_path / 'w.safetensors'}")
    assert len(str(caught.value)) < 400
    whole = timm.create_model(name).state_dict()
    save_file(whole, tmp_path / "w.safetensors")
    declip.load(f"timm:{name}/{tmp_path / 'w.safetensors'}")


def test_a_tower_that_pools_two_tokens_gives_timms_feature():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    trunk = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=0, **options).eval()
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter)
    sizes = {key: value for key, value in options.items() if key != "img_size"}
    tower = ImageTower("deit_tiny_distilled_patch16_224", 32, 8, sizes, weights=trunk.state_dict()).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(tower.pool(pixels), trunk(pixels))


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


class Hub(ThreadingHTTPServer):
    """The server and what it holds."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.revisions = {}  # by repository and id, oldest first: files
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """The requests of huggingface_hub."""

    server: Hub
    protocol_version = "HTTP/1.1"
    info: ClassVar[re.Pattern[str]] = re.compile(
        r"/api/models/([\w.-]+/[\w.-]+)(?:/(?:revision|tree)/([^/?]+))?(?:\?.*)?"
    )
    resolve: ClassVar[re.Pattern[str]] = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/([^?]+)")

    def log_message(self, *_):
        pass

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def do_GET(self):
        asked, wanted = self.info.fullmatch(self.path), self.resolve.match(self.path)
        match = asked or wanted
        commits = self.server.revisions.get(match[1], {}) if match else {}
        if match is None or not commits:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        sha = list(commits)[-1] if match[2] in (None, "main") else match[2]
        files = commits[sha]
        if "/tree/" in self.path:
            self.say([{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files])
        elif asked:
            self.say({"id": match[1], "sha": sha, "siblings": [{"rfilename": name} for name in files]})
        elif match[3] in files:
            etag = hashlib.sha1(files[match[3]]).hexdigest()
            self.answer(200, files[match[3]], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET


@contextmanager
def serving():
    """A running Hub."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
