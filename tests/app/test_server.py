"""The app's answers, what a browser may do, and what a foreign page may not."""

import io
import os
import shutil
import signal
import sys
import threading
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

import declip
from app.conftest import PAGE, ask, assert_refused
from conftest import draw, encoded, write_rows
from declip.app.requests import LARGEST_JSON
from declip.app.server import address_of, open_state, take_port
from declip.app.state import AppState
from declip.interchange.declip_file import write_declip_file
from end_to_end.conftest import png
from indices import tiny_model


def test_a_source_is_embedded_once_and_an_index_is_opened(
    weights_file, table, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    exact = {"precision": "fp32"}  # "auto" would encode a few pixels to check bfloat16
    first = open_state(str(weights_file), str(table), **exact).index
    assert str(first.folder).startswith("indices/shapes-jsonl-")
    assert first.info.captions
    other = tmp_path / "other" / table.name
    shutil.copytree(table.parent, other.parent)
    monkeypatch.setattr(
        "declip.models.dual_encoder.DualEncoder.encode_image", lambda *_: pytest.fail("embedded")
    )
    for source in (table, first.folder):
        assert len(open_state(str(weights_file), str(source), **exact).index) == 24
    write_declip_file(tiny_model(1), tmp_path / "other.safetensors")
    for model, source in (
        (weights_file, other),
        (tmp_path / "other.safetensors", table),
    ):  # each has its own index
        with pytest.raises(pytest.fail.Exception):
            open_state(str(model), str(source), **exact)


def test_a_mistake_ends_with_one_line(state, tiny_run, table, tmp_path, monkeypatch, command):
    monkeypatch.setattr("declip.app.server.serve", None)  # it comes to that in none of these
    other, index = tmp_path / "other.safetensors", state.index.folder
    write_declip_file(tiny_model(1), other)
    with take_port("127.0.0.1", 0) as taken:  # held from here on, before the server listens
        mistakes = (
            ([tiny_run, "nowhere"], ["'nowhere'"]),
            ([other, index], ["another model", f"'{tiny_run}'", f"'{other}'"]),
            ([tiny_run, index, "--index", "elsewhere"], ["--index"]),
            ([tiny_run, table, "--caption-column", "kind"], ["'kind'", "--caption-column"]),
            ([tiny_run, index, "--port", taken.getsockname()[1]], ["--port"]),
            ([tiny_run, index, "--host", "no.such.host.invalid"], ["'no.such.host.invalid'"]),
        )
        for words, named in mistakes:
            outcome = command.refused(named, "app", "--port", 0, *words, "--quiet")
            assert outcome.err.count("\n") == 1, words
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    command.refused(["pip install 'declip[app]'"], "app", tiny_run, index)


def test_the_page_is_served_ctrl_c_ends_quietly_and_another_address_is_warned_of(
    tiny_run, state, monkeypatch, command
):
    pages = []

    def visit(address):
        with urllib.request.urlopen(address, timeout=60) as answer:
            pages.append(answer.read().decode())
        os.kill(os.getpid(), signal.SIGINT)

    def visited(bound):
        threading.Thread(target=visit, args=(address_of(bound),)).start()
        return address_of(bound)

    monkeypatch.setattr("declip.app.server.address_of", visited)
    words = ["app", tiny_run, state.index.folder, "--port", 0, "--quiet"]
    outcome = command(*words)
    assert "Text to search for" in pages[0]
    assert outcome.status == 0
    assert [line.split()[0] for line in outcome.err.splitlines()] == ["24", "Open"]
    monkeypatch.setattr("declip.app.server.address_of", address_of)
    monkeypatch.setattr("declip.app.server.serve", lambda state, bound, host: None)
    assert "no password" in command(*words, "--host", "0.0.0.0").err


# --- what a browser may do


def test_every_view_is_one_page_that_loads_nothing_from_elsewhere(client):
    for view in ("search", "pairs"):
        answer = client.get(f"/{view}")
        assert f'href="/{view}" aria-current="page"' in answer.text
        inline = ("<script>", "<style", " style=", " onclick=", "javascript:", "http")
        assert [word for word in inline if word in answer.text.replace("http-equiv", "")] == []
        assert client.post(f"/{view}").status_code == 405
    assert client.get("/", follow_redirects=False).headers["location"] == "/search"
    for address in ("/search", "/static/app.css", "/images/0", "/nothing", "/api/search"):
        headers = client.get(address).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
    for address in ("/static/..%2fserver.py", "/static/../server.py", "/static/", "/nothing"):
        answer = client.get(address)
        assert (answer.status_code, "import" in answer.text) == (404, False), address


HOSTS = {
    200: ("127.0.0.1:8765", "localhost:1", "LOCALHOST", "[::1]:8765", "192.168.1.5:8765"),
    421: (
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "",
        "a b",
        "[::1",
        "localhost@x",
    ),
}


def test_own_names_and_addresses_in_numbers_are_answered_and_foreign_names_refused(client):
    for status, hosts in HOSTS.items():
        for host in hosts:
            answer = client.get("/search", headers={"Host": host})
            assert answer.status_code == status, host
    hosts = [("Host", "127.0.0.1:8765"), ("Host", "evil.example")]
    for headers in (hosts, hosts[::-1], [hosts[0]] * 2):  # two in one request
        request = client.build_request("GET", "/search", headers=headers)
        assert client.send(request).status_code == 421, headers


def test_a_foreign_page_can_send_and_load_nothing_but_the_user_may_follow_a_link(client):
    loads = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    for mode in ("no-cors", "cors", "websocket"):
        answer = client.get("/images/0", headers={**loads, "Sec-Fetch-Mode": mode})
        assert answer.status_code == 403, mode
    assert client.get("/api/search?text=a", headers=loads).status_code == 403
    assert client.get("/search", headers={**loads, "Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert client.get("/images/0", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    del client.headers["Origin"]
    foreign = ("http://evil.example", "null", "http://127.0.0.1:1", "", PAGE + ".evil.example")
    for address in ("/api/images", "/api/search", "/api/pairs/list"):
        for headers in ({}, *({"Origin": origin} for origin in foreign)):
            assert client.post(address, json={}, headers=headers).status_code == 403, headers


def test_a_failure_of_ours_says_nothing_of_its_inside(state, monkeypatch):
    monkeypatch.setattr(state.index, "hits", {"a secret": 1})  # a call of it fails
    with ask(state, raise_server_exceptions=False) as client:
        answer = client.get("/api/search?text=a")
    assert (answer.status_code, "content-security-policy" in answer.headers) == (500, True)
    assert "secret" not in answer.text


def test_a_wrong_or_huge_upload_is_refused_and_none_reaches_the_disk(client, monkeypatch):
    for content, said in ((b"no image at all", "unreadable"), (png(7_100, 7_100), "too large")):
        assert_refused(client.post("/api/images", content=content), said, 422)
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)
    content = encoded(Image.fromarray(noise))
    assert len(content) > 1 << 20  # what Starlette's forms would put into a temporary file
    for maker in ("SpooledTemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(f"tempfile.{maker}", None)  # a call of it fails
    assert client.post("/api/images", content=content).status_code == 200
    assert client.post("/api/search", content=b" " * (LARGEST_JSON + 1)).status_code == 413
    monkeypatch.setattr("declip.app.server.LARGEST_UPLOAD", 1_000)
    assert client.post("/api/images", content=iter([bytes(100)] * 100)).status_code == 413


# --- search


def search(client, **question):
    return client.post("/api/search", json=question).json()


def upload(client, image):
    return client.post("/api/images", content=encoded(image)).json()["vector"]


def ids(answer):
    return [hit["id"] for hit in answer["hits"]]


def test_a_text_finds_the_hits_of_the_index_among_images_and_captions(client, state):
    tree = client.get("/api/search", params={"text": "a red circle", "count": 5}).json()
    expected = state.index.search("a red circle", k=5)
    assert [(hit["id"], hit["captions"]) for hit in tree["hits"]] == [
        (hit.id, list(hit.captions)) for hit in expected
    ]
    assert [hit["cosine"] for hit in tree["hits"]] == pytest.approx(
        [hit.score for hit in expected], abs=1e-6
    )
    assert (tree["images"], "classes" in tree) == (24, False)
    expected = state.index.search("red", template="a {} bar", over="captions", k=3)
    found = search(client, text="red", over="captions", template="a {} bar", count=3)
    assert ids(found) == [hit.id for hit in expected]


def test_an_image_finds_the_index_hits_and_the_balance_moves_to_the_text(client, state):
    vector = upload(client, draw("green", "bar"))
    found = search(client, vector=vector)
    assert ids(found) == [hit.id for hit in state.index.search(image=draw("green", "bar"), k=24)]
    assert found["hits"][0]["cosine"] == pytest.approx(1, abs=1e-3)
    assert ids(search(client, id=ids(found)[0]))[0] == ids(found)[0]
    by_text = search(client, text="a red circle")
    for weight, alone in ((0, found), (1, by_text)):
        assert ids(search(client, vector=vector, text="a red circle", weight=weight)) == ids(alone)


def test_probabilities_are_the_softmax_of_the_scaled_cosines(client, state):
    names = ["a red circle", "a blue bar", "a green square"]
    vector = upload(client, draw("red", "circle"))
    rows = search(client, vector=vector, classes=[*names, " a blue  bar ", ""])["classes"]
    model = state.index.model
    with torch.no_grad():
        image = model.encode_image(model.preprocess([draw("red", "circle")]))[0]
        logits = model.logit_scale.exp() * (model.encode_text(model.tokenize(names)) @ image)
    expected = dict(zip(names, logits.softmax(0).tolist(), strict=True))
    assert {row["name"]: row["probability"] for row in rows} == pytest.approx(expected, abs=1e-5)
    assert rows == sorted(rows, key=lambda row: -row["probability"])
    around = search(client, id=0, classes=["bar", "circle"], template="a red {}")["classes"]
    spelled = search(client, id=0, classes=["a red bar", "a red circle"])["classes"]
    cosines = [[row["cosine"] for row in rows] for rows in (around, spelled)]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-6)
    assert search(client, id=0, classes=["bar", "circle"], template="imagenet")["classes"]


def test_a_page_filters_and_groups_by_columns(client, state, monkeypatch):
    column, _ = state.index.column_names[:2]
    cell = state.index.column(column)[5][0]
    assert ids(search(client, text="red", where=f"{column}={cell}")) == [5]
    assert column in client.get("/search").text
    # The vectors of this model are all near copies, so that groups change nothing
    asked = {}
    monkeypatch.setattr(
        state.index, "hits", lambda query, k, **options: asked.update(options) or []
    )
    search(client, text="red", group=column)
    assert asked["group"] == column


WRONG = (
    ({"text": "a", "where": "shape"}, "COLUMN=VALUE"),
    ({"text": "a", "where": "shape=x"}, "shape"),
    ({"text": "a", "group": "shape"}, "shape"),
    ({"text": " "}, "choose an image"),
    ({"text": "x" * 2_001}, "text"),
    ({"text": "a", "count": 0}, "count"),
    ({"text": "a", "over": "pixels"}, "over"),
    ({"id": 24}, "24"),
    ({"id": 0, "text": "a", "weight": 1.5}, "weight"),
    ({"id": 10**23}, "id"),
    ({"id": "../0"}, "id: Input should be a valid integer"),
    ({"vector": [1.0]}, "another model"),
    ({"vector": [1e300] * 16}, "another model"),
    ({"text": "a", "classes": ["a", "b"]}, "no image to classify"),
    ({"id": 0, "classes": ["a", " a "]}, "two classes"),
    ({"id": 0, "classes": [str(n) for n in range(900)], "template": "imagenet"}, "8,000"),
    ({"id": 0, "classes": ["a", "b"], "template": "imagenat"}, "Did you mean 'imagenet'"),
)


@pytest.mark.parametrize(("question", "named"), WRONG, ids=str)
def test_a_wrong_search_is_answered_with_a_sentence_that_names_it(client, question, named):
    answer = client.post("/api/search", json=question)
    assert_refused(answer, named)


@pytest.mark.parametrize(
    "content", [b"[]", b"\xff", b"[" * 100_000, b'{"text": "\\ud800"}', b'{"weight": NaN}']
)
def test_what_is_no_question_is_refused(client, content):
    assert client.post("/api/search", content=content).status_code == 400
    assert client.get("/api/search?id=0&text=a&weight=nan").status_code == 400


# --- images


def test_thumbnails_are_small_images_by_id(client, state, monkeypatch):
    monkeypatch.setattr(state.index, "image", lambda id: draw("red", "circle", 1_000))
    for address, side in (("/images/4", 192), ("/images/4?large=1", 768)):
        assert Image.open(io.BytesIO(client.get(address).content)).size == (side, side)
    monkeypatch.undo()
    for id in (
        "24",
        "-1",
        "x",
        "..%2f..%2fetc%2fpasswd",
        "99999999999999999999",
        "0.png",
        "24?text=red",
    ):
        assert client.get(f"/images/{id}").status_code in (400, 404), id


def test_a_missing_image_gives_away_no_path_and_missing_captions_are_explained(
    model, folder, tmp_path
):
    with ask(AppState(declip.embed(model, folder, out=tmp_path / "index"), "")) as client:
        remedies = {
            "/api/search?text=a&over=captions": "--captions",
            "/api/pairs/disagreeing": "--caption captions.csv",
        }
        for address, remedy in remedies.items():
            assert_refused(client.get(address), remedy)
        assert client.get("/api/pairs/duplicates").status_code == 200
        shutil.rmtree(folder)
        answer = client.get("/images/0")
        assert (answer.status_code, str(tmp_path) in answer.text) == (404, False)
        assert client.get("/api/search?text=red").status_code == 200


def test_text_of_the_source_never_becomes_markup(model, tmp_path):
    evil = '<img src=x onerror="alert(1)">'
    draw("red", "bar").save(tmp_path / f"{evil.replace('/', '')}.png")
    rows = [{"image": f"{evil}.png", "caption": f"</script>{evil}"}] * 3
    write_rows(tmp_path / "pairs.jsonl", rows)
    index = declip.embed(model, tmp_path / "pairs.jsonl", out=tmp_path / "index", captions=True)
    with ask(AppState(index, evil)) as client:
        texts = [client.get(f"/{view}").text for view in ("search", "pairs")]
        assert [
            markup for markup in ("<img src=x", "</script><img") if markup in "".join(texts)
        ] == []
        assert "&lt;img src=x" in texts[0]
        found = client.get("/api/search?text=a")
        assert found.headers["content-type"] == "application/json"
        assert found.json()["hits"][0]["captions"] == [f"</script>{evil}"]
