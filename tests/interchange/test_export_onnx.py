"""Both towers in onnxruntime at several batch sizes and lengths, with their tokenizer and card."""

import json
import re
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

import declip
from conftest import Lazy, refuses
from declip.models.posteriors import PosteriorProjection
from interchange.test_export import run_card, same_until_the_end
from interchange.towers import CAPTIONS, EXACT, TYPED, build, largest, pictures

onnx, onnxruntime = Lazy("onnx"), Lazy("onnxruntime")


def test_onnxruntime_gives_our_features_at_any_batch_and_length(onnx_clip):
    model, exported = onnx_clip
    about = json.loads((exported / "config.json").read_text())
    image, text = (
        onnxruntime.InferenceSession(exported / name / "model.onnx")
        for name in ("visual", "textual")
    )
    tokenizer = Tokenizer.from_file(str(exported / "textual" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    pixels = model.preprocess(pictures())
    for given in (pixels[:1], pixels[:2], pixels):
        found = torch.tensor(image.run(None, {"image": given.numpy()})[0])
        assert largest(found, model.encode_image(given)) <= EXACT
    for captions in (CAPTIONS[:1], ["!", "a"], CAPTIONS):
        tokens = model.tokenize(captions)
        found = torch.tensor(text.run(None, {"text": tokens.int().numpy()})[0])
        assert largest(found, model.encode_text(tokens)) <= EXACT
        rows = torch.zeros(len(captions), 16, dtype=torch.int64)
        for row, encoded in zip(rows, tokenizer.encode_batch(captions), strict=True):
            row[: len(encoded.ids)] = torch.tensor(encoded.ids)
        assert same_until_the_end(rows, tokens, about["text_cfg"]["end"])
    written = onnx.load(exported / "textual" / "model.onnx")
    assert [entry.version for entry in written.opset_import if not entry.domain] == [about["opset"]]
    names = [dimension.dim_param for dimension in written.graph.input[0].type.tensor_type.shape.dim]
    assert names == ["batch", "length"]
    assert about["logit_scale"] == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    assert (
        about["vision_cfg"]["image_size"],
        about["text_cfg"]["context_length"],
        about["embed_dim"],
    ) == (32, 16, 16)
    assert about["preprocess_cfg"]["mean"] == [0.5, 0.4, 0.3]
    prepared = json.loads((exported / "visual" / "preprocess_cfg.json").read_text())
    assert {"size", "interpolation", "mean", "std", "resize_mode"} <= prepared.keys()


def test_the_code_in_the_card_works_as_it_is(onnx_clip, monkeypatch, capfd):
    model, exported = onnx_clip
    printed = run_card(exported, monkeypatch, capfd)
    with torch.no_grad():
        image = model.encode_image(model.preprocess(Image.new("RGB", (320, 240), "orange")))
        texts = model.encode_text(model.tokenize(["an orange square", "a cat"]))
    expected = (model.logit_scale.exp() * image @ texts.T).softmax(dim=-1)[0].tolist()
    assert [float(word) for word in re.findall(r"\d\.\d+", printed)] == pytest.approx(
        expected, abs=1e-4
    )


def test_onnx_has_class_posteriors_and_neighbors(onnx_roberta):
    model, folder = onnx_roberta
    assert isinstance(model.image_tower.proj.projection, PosteriorProjection)
    pixels, tokens = model.preprocess(pictures()), model.tokenize(CAPTIONS)
    given = {"image": pixels.numpy(), "text": tokens.int().numpy()}
    expected = {"image": model.encode_image(pixels), "text": model.encode_text(tokens)}
    for tower, name in (("visual", "image"), ("textual", "text")):
        session = onnxruntime.InferenceSession(folder / tower / "model.onnx")
        found = torch.tensor(session.run(None, {name: given[name]})[0])
        assert largest(found, expected[name]) <= EXACT


def test_onnx_has_the_encoders_tokenizer_and_padding(onnx_roberta):
    model, folder = onnx_roberta
    about = json.loads((folder / "config.json").read_text())["text_cfg"]
    assert (about["padding"], about["context_length"]) == (1, 24)  # RoBERTa's padding
    library = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
    library.encode_special_tokens = True
    library.enable_padding(pad_id=about["padding"])
    captions = ["a red circle", "Blue </s> square " * 9, *TYPED]
    ids = torch.tensor([each.ids for each in library.encode_batch(captions)])
    assert ids.tolist() == model.tokenize(captions).tolist()
    special = json.loads((folder / "textual" / "tokenizer_config.json").read_text())
    assert library.token_to_id(special["pad_token"]) == about["padding"]


def test_a_traced_module_has_the_weights_of_one_tower(tmp_path, monkeypatch):
    model, export = build("vit"), Mock()
    monkeypatch.setattr(torch.onnx, "export", export)
    refuses("cannot read the export", declip.export, model, "onnx", tmp_path / "out")
    found = [{*call.args[0].parameters()} for call in export.call_args_list]
    assert found == [{*model.image_tower.parameters()}, {*model.text_tower.parameters()}]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("gone", name="onnxscript"),
            r"needs onnxscript.*pip install 'declip\[onnx\]'",
        ),
        (
            RuntimeError("data-dependent\n  branch"),
            "cannot export the visual tower: data-dependent branch",
        ),
    ],
)
def test_without_its_packages_or_for_what_it_cannot_trace_it_says_so(
    error, message, tmp_path, monkeypatch
):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(torch.onnx, "export", fails)
    refuses(message, declip.export, build("vit"), "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())
