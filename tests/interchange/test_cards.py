"""The code of the model cards: on files as cameras and editors write them, and from a folder that was moved."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import declip
from declip.data.images.decode import decode
from declip.interchange.export import FORMATS
from interchange.towers import BROKEN, EXACT, PIXELS, TYPED, build, largest, pictures
from text_encoders import roberta


def code(folder, image=None, captions=None, at="."):
    """The Python of a folder's card, with the path of an image, other captions and the path of the folder."""
    block = re.findall(
        r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )[0]
    example = 'Image.new("RGB", (320, 240), "orange")'
    changes = {example: f"Image.open({str(image)!r})" if image else example, '"."': repr(str(at))}
    if captions is not None:
        changes['["an orange square", "a cat"]'] = repr(captions)
    for old, new in changes.items():
        assert block.count(old) == 1, old
        block = block.replace(old, new)
    return block


def features(*arguments):
    """Image and text features by a card's code."""
    names = {}
    exec(code(*arguments), names)
    return [torch.as_tensor(names[name]) for name in ("images", "texts")]


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, tmp_path_factory):
    """A model with the authors' preprocessing, and its folder."""
    if request.param == "onnx":
        return request.getfixturevalue("onnx_clip")
    model = build("vit-clip-words", **PIXELS)
    folder = tmp_path_factory.mktemp("exported") / request.param
    declip.export(model, request.param, folder)
    return model, folder


def files():
    """Files whose pixels are not plain RGB in the order in which they are seen."""
    # 36 x 51 pixels: the crop begins at 9.5
    photograph = pictures()[0].resize((91, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    fade = Image.linear_gradient("L").resize(photograph.size)
    clear = Image.merge("RGBA", (*photograph.split(), fade))
    deep = np.asarray(photograph.convert("L"), np.uint16) * 200 + np.arange(91, dtype=np.uint16)
    palette = photograph.quantize(16)
    return {
        "turned.jpg": (photograph, {"exif": exif}),
        "clear.png": (clear, {}),
        "turned-clear.png": (clear, {"exif": exif}),
        "palette.png": (palette, {"transparency": 3}),
        "gray-alpha.png": (clear.convert("LA"), {}),
        "key.png": (photograph, {"transparency": photograph.getpixel((5, 5))}),
        "deep.png": (Image.fromarray(deep), {}),
        "print.jpg": (photograph.convert("CMYK"), {}),
        "gray.jpg": (photograph.convert("L"), {}),
    }


def test_the_code_of_a_card_sees_a_file_as_declip_does(exported, tmp_path, monkeypatch):
    """Every file by the code for ONNX, which opens images as the others do: they include the same template."""
    model, folder = exported
    monkeypatch.chdir(folder)
    for name in files() if folder.name == "out" else ["turned.jpg"]:
        image, options = files()[name]
        image.save(tmp_path / name, **options)
        found, _ = features(folder, tmp_path / name, TYPED)
        with torch.no_grad():
            expected = model.encode_image(model.preprocess(decode(tmp_path / name, name)))
        assert largest(found, expected) <= EXACT, name


def test_the_code_of_a_card_cleans_captions_as_declip_does(exported, monkeypatch):
    model, folder = exported
    monkeypatch.chdir(folder)
    captions = TYPED + BROKEN * (folder.name in ("open_clip", "safetensors"))
    with torch.no_grad():
        assert (
            largest(
                features(folder, None, captions)[1], model.encode_text(model.tokenize(captions))
            )
            <= EXACT
        )


def test_open_clip_says_that_it_has_no_resize_before_the_crop(tmp_path):
    said = str(declip.export(build("vit", **PIXELS), "open_clip", tmp_path / "a"))
    assert re.search(r"no resize to 36 .* crop of 32.*features differ", said)
    assert said in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    again = declip.load(tmp_path / "a", device="cpu")
    assert (again.preprocessor.resize, again.recipe.image.interpolation) == (36, "bilinear")
    assert "resize" not in str(declip.export(build("vit"), "open_clip", tmp_path / "b"))


@pytest.mark.parametrize("form", ["open_clip", "safetensors"])
def test_a_model_with_a_text_encoder_is_loaded_from_a_folder_that_was_moved(
    form, tmp_path, monkeypatch
):
    """By the code of the card with another working directory, and by declip."""
    keys = {
        "text.hf_model": str(roberta(tmp_path / "roberta", num_hidden_layers=1)),
        "text.context_length": 24,
    }
    model, captions = build("vit", **keys, **PIXELS), TYPED + BROKEN
    declip.export(model, form, tmp_path / "out")
    (tmp_path / "roberta").rename(tmp_path / "gone")
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    images, texts = features(moved, None, captions, moved)
    for one in (model, declip.load(moved, device="cpu")):
        with torch.no_grad():
            orange = one.encode_image(one.preprocess(Image.new("RGB", (320, 240), "orange")))
            assert largest(images, orange) <= EXACT
            assert largest(texts, one.encode_text(one.tokenize(captions))) <= EXACT


def test_no_file_of_an_onnx_export_has_the_path_of_a_folder(onnx_roberta):
    _, folder = onnx_roberta
    for file in [*folder.rglob("*.json"), *folder.rglob("*.md")]:
        assert str(folder.parent) not in file.read_text(encoding="utf-8")
