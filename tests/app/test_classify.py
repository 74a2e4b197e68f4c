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
from declip.app.params import LARGEST_JSON


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it has many pixels."""
    content = png(draw("red", "bar"))
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


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


def test_a_template_goes_around_the_names(client: Any, state: Any) -> None:
    asked = {"id": 0, "classes": ["bar", "circle"], "template": "a red {}"}
    given = client.post("/api/classify", json=asked).json()["classes"]
    spelled = client.post("/api/classify", json={"id": 0, "classes": ["a red bar", "a red circle"]}).json()["classes"]
    assert [row["cosine"] for row in given] == pytest.approx([row["cosine"] for row in spelled], abs=1e-6)
    assert client.post("/api/classify", json={**asked, "template": "imagenet"}).status_code == 200


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated"),
        (b"no image at all", "unreadable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable"),
        (png(draw("red", "bar"))[:60], "image"),
        (bomb(7_100, 7_100), "too large"),
    ],
)
def test_other_files_are_refused_with_a_reason(client: Any, content: bytes, said: str) -> None:
    answer = client.post("/api/images", content=content)
    assert answer.status_code == 422
    assert said in answer.json()["error"]


def test_a_huge_upload_is_refused(client: Any, monkeypatch: Any) -> None:
    assert client.post("/api/classify", content=b" " * (LARGEST_JSON + 1)).status_code == 413
    monkeypatch.setattr("declip.app.classify.LARGEST_UPLOAD", 1_000)
    assert client.post("/api/images", content=iter([bytes(100)] * 100)).status_code == 413


def test_an_upload_never_reaches_the_disk(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)))
    assert len(content) > 1 << 20  # what Starlette's forms would put into a temporary file
    for maker in ("SpooledTemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(f"tempfile.{maker}", None)  # a call of it fails
    assert client.post("/api/images", content=content).status_code == 200


def test_a_wrong_question_is_answered_with_a_sentence(client: Any) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"classes": ["a"]}, "no image yet"),
        ({"classes": ["", "  "], "id": 0}, "from 1 to 8,000"),
        ({"classes": "cat", "id": 0}, "classes: Input should be a valid array"),
        ({"classes": ["\ud800"], "id": 0}, "Invalid JSON"),
        ({"classes": [str(n) for n in range(1_001)], "id": 0}, "at most 1000"),
        ({"classes": [str(n) for n in range(900)], "id": 0, "template": "imagenet"}, "from 1 to 8,000"),
        ({"classes": ["a"], "id": 0, "template": "imagenat"}, "Did you mean 'imagenet'"),
        ({"classes": ["a"], "id": "../0"}, "id: Input should be a valid integer"),
        ({"classes": ["a"], "image": "unknown"}, "no longer held"),
    )
    for tree, message in wrong:
        answer = client.post("/api/classify", content=json.dumps(tree))
        assert answer.status_code in (400, 410), tree
        assert message in answer.json()["error"]
    for content in (b"[]", b"{", b"\xff", b"[" * 100_000, b"null"):
        assert client.post("/api/classify", content=content).status_code == 400


def test_vectors_of_the_latest_uploads_alone_are_kept(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("declip.app.state.MOST_UPLOADS", 2)
    state.uploads.clear()
    tokens = [state.add_upload(torch.full((1,), float(n))) for n in range(3)]
    assert [state.uploads.get(token) for token in tokens] == [None, 1.0, 2.0]
    assert len(set(tokens)) == 3
