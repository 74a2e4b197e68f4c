"""Both towers in onnxruntime at several batch sizes and lengths, with their tokenizer and card."""

import json
import re

import pytest
import torch

import declip
from declip.errors import UserError
from interchange.test_export import run_card, same_until_the_end
from interchange.towers import CAPTIONS, EXACT, build, export_exactly, largest, pictures

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The export of a model whose text projection has a bias; torch's exporter takes seconds."""
    return export_exactly(build("vit-bias"), "onnx", tmp_path_factory.mktemp("onnx") / "out")


def test_onnxruntime_gives_our_features_at_any_batch_and_length(exported):
    import onnx
    from tokenizers import Tokenizer

    model, about = build("vit-bias"), json.loads((exported / "declip_onnx.json").read_text())
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
    model = build("vit-bias")
    from PIL import Image

    with torch.no_grad():
        image = model.encode_image(model.preprocess(Image.new("RGB", (320, 240), "orange")))
        texts = model.encode_text(model.tokenize(["an orange square", "a cat"]))
    expected = (model.logit_scale.exp() * image @ texts.T).softmax(dim=-1)[0].tolist()
    assert [float(word) for word in re.findall(r"\d\.\d+", printed)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("gone", name="onnxscript"), r"needs onnxscript.*pip install 'declip\[onnx\]'"),
        (RuntimeError("data-dependent\n  branch"), "cannot export this tower to image.onnx: data-dependent branch"),
    ],
)
def test_without_its_packages_or_for_what_it_cannot_trace_it_says_so(error, message, tmp_path, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(UserError, match=message):
        declip.export(build("vit"), "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())
