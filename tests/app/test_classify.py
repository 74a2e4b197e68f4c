import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app.conftest import png
from conftest import draw
from declip.app.classify import probabilities
from declip.app.params import LARGEST_JSON
from declip.evaluation.prompt_sets import read_prompts


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it has many pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_probabilities_are_the_softmax_of_the_scaled_cosines(client: Any, state: Any) -> None:
    token = client.post("/api/images", content=png(draw("red", "circle"))).json()["image"]
    names = ["a red circle", "a blue bar", "a green square"]
    tree = client.post("/api/classify", json={"image": token, "classes": [*names, " a blue  bar ", ""]}).json()
    model = state.index.model
    with torch.no_grad():
        image = model.encode_image(model.preprocess([draw("red", "circle")]))[0]
        logits = model.logit_scale.exp() * (model.encode_text(model.tokenize(names)) @ image)
    expected = dict(zip(names, logits.softmax(0).tolist(), strict=True))
    assert {row["name"]: row["probability"] for row in tree["classes"]} == pytest.approx(expected, abs=1e-5)
    probable = [row["probability"] for row in tree["classes"]]
    assert probable == sorted(probable, reverse=True)


def test_a_large_scale_does_not_overflow() -> None:
    rows = probabilities(torch.tensor([1.0, 0.0]), torch.eye(2), ["a", "b"], scale=1e4)
    assert [row["probability"] for row in rows] == [1.0, 0.0]


def test_a_template_goes_around_the_names(client: Any, state: Any) -> None:
    asked = {"id": 0, "classes": ["bar", "circle"], "template": "a red {}"}
    given = client.post("/api/classify", json=asked).json()["classes"]
    spelled = client.post("/api/classify", json={"id": 0, "classes": ["a red bar", "a red circle"]}).json()["classes"]
    assert [row["cosine"] for row in given] == pytest.approx([row["cosine"] for row in spelled], abs=1e-6)
    many = client.post("/api/classify", json={**asked, "template": "imagenet"})
    assert many.status_code == 200
    assert f"{len(read_prompts('imagenet').templates)} templates" in client.get("/classify").text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"no image at all", "can be read"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "can be read"),
        (png(draw("red", "bar"))[:60], "image"),
        (bomb(40_000, 40_000), "too many pixels"),
        (bomb(7_100, 7_100), "too many pixels"),
    ],
)
def test_other_files_are_refused_with_a_reason(client: Any, content: bytes, said: str) -> None:
    answer = client.post("/api/images", content=content)
    assert answer.status_code == 422
    assert said in answer.json()["error"]


def test_a_huge_upload_is_refused_whether_or_not_it_says_its_length(client: Any, monkeypatch: Any) -> None:
    assert client.post("/api/images", content=b"x", headers={"Content-Length": str(10**12)}).status_code == 413
    assert client.post("/api/classify", content=b" " * (LARGEST_JSON + 1)).status_code == 413
    monkeypatch.setattr("declip.app.params.LARGEST_UPLOAD", 1_000)
    assert client.post("/api/images", content=iter([bytes(100)] * 100)).status_code == 413


def test_an_upload_never_reaches_the_disk(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)))
    assert len(content) > 1 << 20  # what Starlette's forms would put into a temporary file
    for maker in ("SpooledTemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(f"tempfile.{maker}", None)  # a call of it fails
    assert client.post("/api/images", content=content).status_code == 200


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"classes": ["a"]}, "no image yet"),
        ({"classes": ["", "  "], "id": 0}, "Name some classes"),
        ({"classes": "cat", "id": 0}, "list of names"),
        ({"classes": [1], "id": 0}, "must be a text"),
        ({"classes": ["\ud800"], "id": 0}, "must be a text"),
        ({"classes": ["x" * 201], "id": 0}, "too long"),
        ({"classes": [str(n) for n in range(1_001)], "id": 0}, "too many"),
        ({"classes": [str(n) for n in range(900)], "id": 0, "template": "imagenet"}, "at most 8,000"),
        ({"classes": ["a"], "id": 0, "template": "no braces here"}, "needs {}"),
        ({"classes": ["a"], "id": 0, "template": "imagenat"}, "Did you mean 'imagenet'"),
        ({"classes": ["a"], "id": -1}, "whole number"),
        ({"classes": ["a"], "id": "../0"}, "whole number"),
        ({"classes": ["a"], "image": "unknown"}, "no longer held"),
    ],
)
def test_a_wrong_question_is_answered_with_a_sentence(client: Any, tree: dict[str, Any], said: str) -> None:
    answer = client.post("/api/classify", content=json.dumps(tree))
    assert answer.status_code in (400, 410)
    assert said in answer.json()["error"]


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 100_000, b"null"])
def test_what_is_no_json_object_is_refused(client: Any, content: bytes) -> None:
    assert client.post("/api/classify", content=content).status_code == 400


def test_vectors_of_the_latest_uploads_alone_are_kept(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("declip.app.state.MOST_UPLOADS", 2)
    state.uploads.clear()
    tokens = [state.add_upload(torch.full((1,), float(n))) for n in range(3)]
    assert [state.uploads.get(token) for token in tokens] == [None, 1.0, 2.0]
    assert len(set(tokens)) == 3
