"""Exports for open_clip that lie on the Hub, or have a text encoder of transformers'."""

import json
import shutil

import pytest
import torch

import declip
from declip.errors import UserError
from interchange.test_export import features, same_until_the_end
from interchange.towers import CAPTIONS, EXACT, build, export_exactly, largest, pictures
from text_encoders import bert, distilbert, roberta

PLAIN = ["a red circle", "Two GREEN squares, on white!", "日本語 and 😀 [SEP]", "!", " ".join(["nought"] * 40)]
"""Captions that open_clip's cleaning leaves as they are."""


@pytest.mark.parametrize("repo", ["owner/name", None])
def test_a_repository_named_by_its_owner_loads_from_the_hub_too(repo, tmp_path, caplog, command):
    """Of a folder open_clip takes the tokenizer that lies there; of a repository the one that the name says."""
    open_clip = pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    model, out = build("vit"), tmp_path / "out"
    declip.export(model, "safetensors", tmp_path / "model")
    words = ["export", str(tmp_path / "model"), "--format", "open_clip", "--out", str(out)]
    assert command(*words, *(["--repo", repo] if repo else [])).status == 0
    config = json.loads((out / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == (repo or "tokenizer.json")
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    tokens = model.tokenize(CAPTIONS)
    assert same_until_the_end(open_clip.get_tokenizer(f"local-dir:{out}")(CAPTIONS), tokens, model.tokenizer.end)


@pytest.mark.parametrize(
    ("encoder", "kind", "pooling"), [(bert, "timm-vit", "cls"), (roberta, "vit", "mean"), (roberta, "resnet", "auto")]
)
def test_open_clip_reads_a_text_encoder_of_transformers(encoder, kind, pooling, tmp_path):
    """As its CustomTextCLIP, from the folder alone: the encoder's own folder is gone."""
    open_clip = pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    keys = {"text.hf_model": str(encoder(tmp_path / "encoder")), "text.pooling": pooling, "text.context_length": 16}
    model, out = build(kind, **keys), tmp_path / "out"
    shutil.rmtree(tmp_path / "encoder")
    export_exactly(model, "open_clip", out)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    assert type(theirs).__name__ == "CustomTextCLIP"
    theirs_tokens = open_clip.get_tokenizer(f"local-dir:{out}")(PLAIN)
    _, images, _, _ = features(model)
    tokens = model.tokenize(PLAIN)
    assert torch.equal(theirs_tokens[:, : tokens.shape[1]], tokens)
    with torch.no_grad():
        texts = model.encode_text(tokens)
        found = theirs.eval().encode_image(torch.stack([transform(each) for each in pictures()]), normalize=True)
        difference = largest(found, images), largest(theirs.encode_text(theirs_tokens, normalize=True), texts)
    assert max(difference) <= EXACT
    read = declip.load(out, device="cpu")
    kept = [row for row, caption in enumerate(PLAIN) if "[SEP]" not in caption]  # which open_clip's own spell out
    with torch.no_grad():
        assert largest(read.encode_text(read.tokenize([PLAIN[row] for row in kept])), texts[kept]) <= EXACT


@pytest.mark.parametrize(
    ("encoder", "keys", "reason"),
    [
        (bert, {"text.pooling": "eos"}, "eos pooling"),
        (bert, {"text.projection_bias": True}, "a bias after its projection"),
        (distilbert, {}, "is a distilbert"),
    ],
)
def test_a_text_encoder_that_open_clip_has_no_words_for_is_refused(encoder, keys, reason, tmp_path):
    pytest.importorskip("transformers")
    model = build("vit", **{"text.hf_model": str(encoder(tmp_path / "encoder")), "text.context_length": 16, **keys})
    for form, words in (("open_clip", reason), ("huggingface", "text tower is a HuggingfaceTextTower.*text.hf_model")):
        with pytest.raises(UserError, match=f"as {form}: .*{words}.*Formats that can: onnx and safetensors"):
            declip.export(model, form, tmp_path / "out")


def test_a_text_encoder_of_the_hub_keeps_its_name(tmp_path):
    """The name leads to the configuration; where the encoder has none, the repository's own does."""
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    model = build("vit", **{"text.hf_model": str(bert(tmp_path / "bert")), "text.context_length": 16})

    def written(repo):
        declip.export(model, "open_clip", tmp_path / "out", repo=repo, overwrite=True)
        config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
        return config["model_cfg"]["text_cfg"]["hf_model_name"]

    assert written(None) == str(tmp_path / "out")
    assert written("owner/name") == "owner/name"
    text = model.recipe.text.model_copy(update={"hf_model": "huggingface:google-bert/bert-base-uncased"})
    model.recipe = model.recipe.model_copy(update={"text": text})
    assert written("owner/name") == "google-bert/bert-base-uncased"
