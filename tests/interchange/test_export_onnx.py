"""Both towers in onnxruntime at several batch sizes and lengths, with their tokenizer and card."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer

import declip
from conftest import refuses
from interchange.test_export import run_card, same_until_the_end
from interchange.towers import CAPTIONS, EXACT, VIT, build, export_exactly, largest, pictures
from text_encoders import roberta

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ONE_BLOCK = {"image.model_kwargs": {**VIT["image.model_kwargs"], "depth": 1}, "text.layers": 1}
"""Keys of smaller towers: the exporter takes a second for each block."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The export of a model whose text projection has a bias; torch's exporter takes seconds."""
    return export_exactly(build("vit-bias", **ONE_BLOCK), "onnx", tmp_path_factory.mktemp("onnx") / "out")


def test_onnxruntime_gives_our_features_at_any_batch_and_length(exported):
    import onnx

    model, about = build("vit-bias", **ONE_BLOCK), json.loads((exported / "declip_onnx.json").read_text())
    image, text = (onnxruntime.InferenceSession(exported / name) for name in ("image.onnx", "text.onnx"))
    tokenizer = Tokenizer.from_file(str(exported / about["text"]["tokenizer"]))
    tokenizer.encode_special_tokens = True
    pixels, differences = model.preprocess(pictures()), {"images": 0.0, "texts": 0.0}
    for batch in (1, 2, len(pixels)):
        given = pixels[:batch]
        found = torch.tensor(image.run(None, {"pixel_values": given.numpy()})[0])
        with torch.no_grad():
            differences["images"] = max(differences["images"], largest(found, model.encode_image(given)))
    for captions in (CAPTIONS[:1], ["!", "a"], CAPTIONS):
        tokens = model.tokenize(captions)
        found = torch.tensor(text.run(None, {"input_ids": tokens.numpy()})[0])
        with torch.no_grad():
            differences["texts"] = max(differences["texts"], largest(found, model.encode_text(tokens)))
        rows = torch.zeros(len(captions), 16, dtype=torch.int64)
        for row, encoded in zip(rows, tokenizer.encode_batch(captions), strict=True):
            row[: len(encoded.ids)] = torch.tensor(encoded.ids)
        assert same_until_the_end(rows, tokens, about["text"]["end"])
    print(f"onnx vit-bias: {differences}")
    assert max(differences.values()) <= EXACT
    written = onnx.load(exported / "text.onnx")
    assert [entry.version for entry in written.opset_import if not entry.domain] == [about["opset"]]
    names = [dimension.dim_param for dimension in written.graph.input[0].type.tensor_type.shape.dim]
    assert names == ["batch", "length"]
    assert about["logit_scale"] == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    assert (about["image"]["size"], about["text"]["context"], about["embed_dim"]) == (32, 16, 16)
    assert about["image"]["mean"] == [0.5, 0.4, 0.3]


def test_the_code_in_the_card_works_as_it_is(exported, monkeypatch, capfd):
    printed = run_card(exported, monkeypatch, capfd)
    model = build("vit-bias", **ONE_BLOCK)
    from PIL import Image

    with torch.no_grad():
        image = model.encode_image(model.preprocess(Image.new("RGB", (320, 240), "orange")))
        texts = model.encode_text(model.tokenize(["an orange square", "a cat"]))
    expected = (model.logit_scale.exp() * image @ texts.T).softmax(dim=-1)[0].tolist()
    assert [float(word) for word in re.findall(r"\d\.\d+", printed)] == pytest.approx(expected, abs=1e-4)


def test_onnx_has_the_encoders_tokenizer_and_padding(tmp_path):
    pytest.importorskip("transformers")
    model = build(
        "vit", **{**ONE_BLOCK, "text.hf_model": str(roberta(tmp_path / "roberta")), "text.context_length": 24}
    )
    folder = export_exactly(model, "onnx", tmp_path / "onnx")
    about = json.loads((folder / "declip_onnx.json").read_text())["text"]
    assert (about["padding"], about["context"]) == (1, 24)  # RoBERTa's padding
    library = Tokenizer.from_file(str(folder / about["tokenizer"]))
    library.encode_special_tokens = True
    library.enable_padding(pad_id=about["padding"])
    captions = ["a red circle", "Blue </s> square " * 9]
    ids = torch.tensor([each.ids for each in library.encode_batch(captions)])
    assert ids.tolist() == model.tokenize(captions).tolist()
    session = onnxruntime.InferenceSession(folder / "text.onnx")
    found = torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])
    torch.testing.assert_close(found, model.encode_text(ids).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("gone", name="onnxscript"), r"needs onnxscript.*pip install 'declip\[onnx\]'"),
        (RuntimeError("data-dependent\n  branch"), "cannot export this tower to image.onnx: data-dependent branch"),
    ],
)
def test_without_its_packages_or_for_what_it_cannot_trace_it_says_so(error, message, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(torch.onnx, "export", fails)
    refuses(message, declip.export, build("vit"), "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())
