import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import draw
from declip.evaluation.prompt_sets import read_prompts

pytest.importorskip("starlette", reason="the page needs declip[app]")

from declip.app import uploads
from declip.app.classify import probabilities
from declip.app.gallery import Kept


def png(image: Image.Image) -> bytes:
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it has many pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def send(client: Any, content: bytes) -> Any:
    return client.post("/api/pictures", content=content)


def test_probabilities_are_the_softmax_of_the_scaled_cosines(client: Any, gallery: Any) -> None:
    token = send(client, png(draw("red", "circle"))).json()["picture"]
    names = ["a red circle", "a blue bar", "a green square"]
    tree = client.post("/api/classify", json={"picture": token, "classes": [*names, " a blue  bar ", ""]}).json()
    model = gallery.index.model
    with torch.no_grad():
        image = model.encode_image(model.preprocess([draw("red", "circle")]))[0]
        logits = model.logit_scale.exp() * (model.encode_text(model.tokenize(names)) @ image)
    expected = dict(zip(names, logits.softmax(0).tolist(), strict=True))
    assert {row["name"]: row["probability"] for row in tree["classes"]} == pytest.approx(expected, abs=1e-5)
    shares = [row["probability"] for row in tree["classes"]]
    assert shares == sorted(shares, reverse=True)


def test_a_large_scale_does_not_overflow() -> None:
    rows = probabilities(torch.tensor([1.0, 0.0]), torch.eye(2), ["a", "b"], 1e4)
    assert [row["probability"] for row in rows] == [1.0, 0.0]


def test_a_template_goes_around_the_names(client: Any, gallery: Any) -> None:
    asked = {"id": 0, "classes": ["bar", "circle"], "template": "a red {}"}
    given = client.post("/api/classify", json=asked).json()["classes"]
    spelled = client.post("/api/classify", json={"id": 0, "classes": ["a red bar", "a red circle"]}).json()["classes"]
    assert [row["cosine"] for row in given] == pytest.approx([row["cosine"] for row in spelled], abs=1e-6)
    many = client.post("/api/classify", json={**asked, "template": "imagenet"})
    assert many.status_code == 200
    assert f"{len(read_prompts('imagenet').templates)} templates" in client.get("/classify").text


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"", 422, "cut short or empty"),
        (b"no picture at all", 422, "no picture that can be read"),
        (
            b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
            422,
            "no picture that can be read",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422, "no picture that can be read"),
        (png(draw("red", "bar"))[:60], 422, "picture"),
        (bomb(40_000, 40_000), 422, "too many pixels"),
        (bomb(7_100, 7_100), 422, "too many pixels"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_reason(client: Any, content: bytes, status: int, said: str) -> None:
    answer = send(client, content)
    assert answer.status_code == status
    assert said in answer.json()["error"]


def test_a_huge_upload_is_refused_before_it_is_read(client: Any) -> None:
    answer = client.post("/api/pictures", content=b"x", headers={"Content-Length": str(10**12)})
    assert answer.status_code == 413


def test_an_upload_that_hides_its_length_is_cut_off(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("declip.app.classify.LARGEST_PICTURE", 1_000)
    taken = []

    def stream() -> Any:
        for _ in range(100):
            taken.append(100)
            yield bytes(100)

    assert client.post("/api/pictures", content=stream()).status_code == 413


def test_an_upload_never_reaches_the_disk(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a file was made")

    content = png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)))
    assert len(content) > 1 << 20  # what Starlette's forms would put into a temporary file
    monkeypatch.setattr("tempfile.SpooledTemporaryFile", refused)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", refused)
    monkeypatch.setattr("tempfile.mkstemp", refused)
    assert send(client, content).status_code == 200


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"classes": ["a"]}, "no picture yet"),
        ({"classes": [], "id": 0}, "Name some classes"),
        ({"classes": ["", "  "], "id": 0}, "Name some classes"),
        ({"classes": "cat", "id": 0}, "list of names"),
        ({"classes": [1], "id": 0}, "must be a text"),
        ({"classes": ["\ud800"], "id": 0}, "must be a text"),
        ({"classes": ["x" * 201], "id": 0}, "too long"),
        ({"classes": [str(n) for n in range(1_001)], "id": 0}, "too many"),
        ({"classes": [str(n) for n in range(900)], "id": 0, "template": "imagenet"}, "at most 8,000"),
        ({"classes": ["a"], "id": 0, "template": "no braces here"}, "needs {}"),
        ({"classes": ["a"], "id": 0, "template": "imagenat"}, "Did you mean 'imagenet'"),
        ({"classes": ["a"], "id": 24}, "no image with the id 24"),
        ({"classes": ["a"], "id": -1}, "whole number"),
        ({"classes": ["a"], "id": "../0"}, "whole number"),
        ({"classes": ["a"], "picture": "unknown"}, "no longer held"),
    ],
)
def test_a_wrong_question_is_answered_with_a_sentence(client: Any, tree: dict[str, Any], said: str) -> None:
    answer = client.post("/api/classify", content=json_of(tree))
    assert answer.status_code in (400, 410)
    assert said in answer.json()["error"]


def json_of(tree: object) -> bytes:
    import json

    return json.dumps(tree).encode()


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 100_000, b"null"])
def test_what_is_no_json_object_is_refused(client: Any, content: bytes) -> None:
    assert client.post("/api/classify", content=content).status_code == 400


def test_json_is_bounded(client: Any) -> None:
    assert client.post("/api/classify", content=b" " * (uploads.LARGEST_JSON + 1)).status_code == 413


def test_vectors_of_the_latest_pictures_alone_are_kept() -> None:
    kept = Kept(most=2)
    tokens = [kept.add(torch.full((1,), float(n))) for n in range(3)]
    assert kept.get(tokens[0]) is None
    assert [float(kept.get(token)) for token in tokens[1:]] == [1.0, 2.0]  # type: ignore[arg-type]
    assert len(set(tokens)) == 3
