import os
import shutil
import signal
import sys
import threading
import urllib.request

import pytest

from app.conftest import PAGE, ask
from declip.app.server import open_state
from declip.cli.serve import address_of, take_port
from declip.interchange.declip_file import write_declip_file
from indices import tiny_model


def test_a_source_is_embedded_once_and_an_index_is_opened(weights_file, table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = open_state(str(weights_file), str(table))
    folder = first.index.folder
    assert str(folder).startswith("indices/shapes-jsonl-")
    assert first.index.info.captions
    again = open_state(str(weights_file), str(table)).index
    assert (again.folder, again.info.generation) == (folder, 1), "nothing was left to write"
    assert len(open_state(str(weights_file), str(folder)).index) == 24
    (tmp_path / "other").mkdir()
    other = shutil.copy(table, tmp_path / "other" / table.name)
    monkeypatch.setattr("declip.search.opening.embed", lambda *_, out, **__: pytest.fail(str(out)))
    with pytest.raises(pytest.fail.Exception) as caught:
        open_state(str(weights_file), str(other))
    assert str(folder) not in str(caught.value), "each source has its own, also of one name"
    write_declip_file(tiny_model(1), tmp_path / "other.safetensors")
    with pytest.raises(pytest.fail.Exception) as caught:
        open_state(str(tmp_path / "other.safetensors"), str(table))
    assert str(folder) not in str(caught.value), "each model has its own"


def test_a_mistake_ends_with_one_line(state, run_folder, tmp_path, monkeypatch, command):
    monkeypatch.setattr("declip.app.server.serve", None)  # it comes to that in none of these
    other, index = tmp_path / "other.safetensors", state.index.folder
    write_declip_file(tiny_model(1), other)
    with take_port("127.0.0.1", 0) as taken:  # held from here on, before the server listens
        mistakes = (
            ([run_folder, "nowhere"], ["'nowhere'"]),
            ([other, index], ["another model", f"'{run_folder}'", f"'{other}'"]),
            ([run_folder, index, "--index", "elsewhere"], ["--index"]),
            ([run_folder, index, "--port", taken.getsockname()[1]], ["--port"]),
            ([run_folder, index, "--host", "no.such.host.invalid"], ["'no.such.host.invalid'"]),
        )
        for words, named in mistakes:
            outcome = command("app", "--port", 0, *words, "--quiet")
            assert (outcome.status, outcome.err.count("\n")) == (2, 1), words
            assert all(str(name) in outcome.err for name in named), outcome.err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    outcome = command("app", run_folder, index)
    assert outcome.status == 2
    assert "pip install 'declip[app]'" in outcome.err


def test_the_page_is_served_ctrl_c_ends_quietly_and_another_address_is_warned_of(
    run_folder, state, monkeypatch, command
):
    pages = []

    def visit(address):
        with urllib.request.urlopen(address, timeout=60) as answer:
            pages.append(answer.read().decode())
        os.kill(os.getpid(), signal.SIGINT)

    def visited(bound):
        address = address_of(bound)
        threading.Thread(target=visit, args=(address,)).start()
        return address

    monkeypatch.setattr("declip.cli.serve.address_of", visited)
    words = ["app", run_folder, state.index.folder, "--port", 0, "--quiet"]
    outcome = command(*words)
    assert "Text to search for" in pages[0]
    assert outcome.status == 0
    assert [line.split()[0] for line in outcome.err.splitlines()] == ["24", "Open"]
    monkeypatch.setattr("declip.cli.serve.address_of", address_of)
    monkeypatch.setattr("declip.app.server.serve", lambda state, bound, host: None)
    assert "no password" in command(*words, "--host", "0.0.0.0").err


@pytest.mark.parametrize("view", ["classify", "search", "pairs"])
def test_every_view_is_one_page_that_loads_nothing_from_elsewhere(client, view):
    answer = client.get(f"/{view}")
    assert answer.status_code == 200
    assert f'href="/{view}" aria-current="page"' in answer.text
    assert "http" not in answer.text.replace("http-equiv", "")
    for inline in ("<script>", "<style", " style=", " onclick=", "javascript:"):
        assert inline not in answer.text
    assert client.post(f"/{view}").status_code == 405
    assert client.get("/", follow_redirects=False).headers["location"] == "/search"


def test_answers_say_what_a_browser_may_do(client):
    for address in ("/search", "/static/app.css", "/api/pairs/disagreeing", "/thumbnails/0", "/nothing", "/api/search"):
        headers = client.get(address).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_own_names_and_addresses_in_numbers_are_answered_and_foreign_names_refused(client):
    for host in ("127.0.0.1:8765", "localhost:1", "LOCALHOST", "[::1]:8765", "192.168.1.5:8765"):
        assert client.get("/search", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "a b", "[::1", "localhost@x"):
        assert client.get("/search", headers={"Host": host}).status_code == 421, host


@pytest.mark.parametrize("address", ["/api/images", "/api/classify", "/api/pairs/list"])
def test_a_foreign_page_can_send_nothing(client, address):
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "", PAGE + ".evil.example"):
        assert client.post(address, json={}, headers={"Origin": origin}).status_code == 403, origin
    del client.headers["Origin"]
    assert client.post(address, json={}).status_code == 403


def test_a_foreign_page_can_load_nothing_but_the_user_may_follow_a_link(client):
    loads = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert client.get("/thumbnails/0", headers=loads).status_code == 403
    assert client.get("/api/search?text=a", headers=loads).status_code == 403
    assert client.get("/search", headers={**loads, "Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert client.get("/thumbnails/0", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_no_other_file_is_served(client):
    for address in ("/static/..%2fserver.py", "/static/../server.py", "/static/", "/nothing", "/etc/passwd"):
        answer = client.get(address)
        assert answer.status_code == 404, address
        assert "import" not in answer.text


def test_a_failure_of_ours_says_nothing_of_its_inside(state, monkeypatch):
    monkeypatch.setattr(state.index, "nearest", {"a secret": 1})  # a call of it fails
    with ask(state, raise_server_exceptions=False) as client:
        answer = client.get("/api/search?text=a")
    assert answer.status_code == 500
    assert "content-security-policy" in answer.headers
    assert "secret" not in answer.text
