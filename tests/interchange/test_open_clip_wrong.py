"""Models of open_clip's that cannot be loaded as asked: wrong names, files and folders, no network, no package."""

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import declip
from declip.errors import UserError
from interchange.tiny_open_clip import folder_of, random_model, same_weights, saved

pytest.importorskip("open_clip")
from open_clip import pretrained

pytestmark = pytest.mark.usefixtures("open_clip_configs")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ViT-B-31/openai", "Unknown open_clip model 'ViT-B-31'. Did you mean 'ViT-B-32'"),
        ("ViT-B-32", r"does not say which weights.*ViT-B-32/none for random.*Tags: openai, .*laion2b_s34b_b79k"),
        ("tiny-vit", r"does not say which weights.*Tags: no\."),
        ("ViT-B-32/opneai", "Unknown tag or file .*'opneai'. Did you mean 'openai'.*laion2b_s34b_b79k.*none"),
        ("tiny-vit/openai", "Unknown tag or file .*Known: none"),
        ("tiny-vit//missing/weights", "no file '/missing/weights'"),
        ("tiny-vit/missing.safetensors", "no file 'missing.safetensors'"),
        ("local-dir:/missing", "'/missing' is no folder with open_clip_config.json"),
    ],
)
def test_wrong_names(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        declip.load(f"open_clip:{given}")
    assert "\n" not in str(caught.value)


def test_a_torchscript_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch.jit.load was called"))
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-vit", {"first_tag": {"file": str(file)}})
    for given in (f"open_clip:tiny-vit/{file}", "open_clip:tiny-vit/first_tag", str(file)):
        with pytest.raises(UserError, match=r"TorchScript archive.*open_clip:ViT-B-32/openai"):
            declip.load(given)


def test_wrong_folders(tmp_path: Path) -> None:
    folder = folder_of(random_model("tiny-vit"), tmp_path / "model", "tiny-vit", {})
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    given = f"open_clip:local-dir:{folder}"
    assert same_weights(declip.load(folder, device="cpu"), random_model("tiny-vit"))
    stored = json.loads(config.read_text())
    for trust in (True, 1, "yes"):
        changed = copy.deepcopy(stored)
        changed["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": trust}
        config.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"run code of its own \(trust_remote_code\)"):
            declip.load(given)
    for text in ("{", "[]", '{"model_cfg": {}}', '{"model_cfg": {"embed_dim": 8}}', '{"preprocess_cfg": {}}'):
        config.write_text(text)
        with pytest.raises(UserError, match="Cannot load"):
            declip.load(given)
    config.write_text(json.dumps(stored))
    weights.rename(folder / "weights.pt")
    with pytest.raises(UserError, match=r"no folder with .* and weights \(\*\.safetensors"):
        declip.load(given)


@pytest.mark.parametrize("given", ["open_clip:ViT-B-32/openai", "open_clip:hf-hub:owner/name"])
def test_without_network(given: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        logging.getLogger("huggingface_hub").warning("Retrying in 1s")
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(pretrained, "hf_hub_download", unreachable)
    monkeypatch.setattr(pretrained, "download_pretrained_from_url", unreachable)
    with pytest.raises(UserError, match=f"Cannot fetch '{given}': .*not known.*Check the network") as caught:
        declip.load(given)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("there", ["", ".json", ".safetensors"])
def test_a_hub_repository_is_read_like_a_folder_and_never_half(there: str, tmp_path: Path, monkeypatch) -> None:
    theirs = random_model("tiny-vit")
    folder = folder_of(theirs, tmp_path / "model", "tiny-vit", {"mean": [0.5, 0.5, 0.5]})

    def from_folder(repo_id: str, filename: str, **_: Any) -> str:
        if repo_id == "owner/name" and filename.endswith(there):
            return str(folder / filename)
        raise OSError("no such entry")

    monkeypatch.setattr(pretrained, "hf_hub_download", from_folder)
    if there:
        with pytest.raises(UserError, match=r"Cannot fetch .*no such entry"):
            declip.load("open_clip:hf-hub:owner/name", device="cpu")
        return
    model = declip.load("open_clip:hf-hub:owner/name", device="cpu")
    assert same_weights(model, theirs)
    assert tuple(model.preprocessor.config.mean) == (0.5, 0.5, 0.5)


def test_a_file_of_a_model_that_is_published_with_another_preparation(tmp_path: Path, monkeypatch, caplog) -> None:
    file = saved(random_model("tiny-vit"), tmp_path / "weights.pt")
    tags: dict[str, Any] = {}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-vit", tags)

    for tag, mode, warned in ((None, None, False), ("first", "squash", True), ("second", "shortest", False)):
        tags |= {tag: {"resize_mode": mode}} if tag else {}
        caplog.clear()
        declip.load(f"open_clip:tiny-vit/{file}", device="cpu")
        assert ("otherwise for the published tiny-vit" in caplog.text) == warned


def test_the_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs the package transformers\. Install it: pip install transformers"):
        declip.load("open_clip:ViT-B-16-SigLIP/none")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"needs open_clip.*pip install 'declip\[open_clip\]'"):
        declip.load("open_clip:tiny-vit/none")
