from typing import Any

import pytest

from explore.conftest import PAGE

VIEWS = ("classify", "search", "neighbors", "pairs", "runs")


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_one_page_that_loads_nothing_from_elsewhere(client: Any, view: str) -> None:
    answer = client.get(f"/{view}")
    assert answer.status_code == 200
    assert f'href="/{view}" aria-current="page"' in answer.text
    assert "http" not in answer.text.replace("http-equiv", "")
    for inline in ("<script>", "<style", " style=", " onclick=", "javascript:"):
        assert inline not in answer.text


def test_the_first_page_is_the_search(client: Any) -> None:
    assert client.get("/", follow_redirects=False).headers["location"] == "/search"


def test_answers_say_what_a_browser_may_do(client: Any) -> None:
    for address in ("/search", "/static/app.css", "/api/pairs", "/thumbnails/0", "/nothing", "/api/search"):
        headers = client.get(address).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "a b", "[::1", "localhost@x"]
)
def test_a_foreign_name_is_refused(client: Any, host: str) -> None:
    assert client.get("/search", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:1", "LOCALHOST", "[::1]:8765", "192.168.1.5:8765"])
def test_own_names_and_addresses_in_numbers_are_answered(client: Any, host: str) -> None:
    assert client.get("/search", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "", PAGE + ".evil.example"])
@pytest.mark.parametrize("address", ["/api/pictures", "/api/classify", "/api/pairs/list"])
def test_a_foreign_page_can_send_nothing(client: Any, origin: str, address: str) -> None:
    assert client.post(address, json={}, headers={"Origin": origin}).status_code == 403


def test_a_request_without_origin_can_send_nothing(client: Any) -> None:
    del client.headers["Origin"]
    assert client.post("/api/classify", json={}).status_code == 403


def test_a_foreign_page_can_load_nothing_but_the_user_may_follow_a_link(client: Any) -> None:
    loads = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert client.get("/thumbnails/0", headers=loads).status_code == 403
    assert client.get("/api/search?text=a", headers=loads).status_code == 403
    assert client.get("/search", headers={**loads, "Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert client.get("/thumbnails/0", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


@pytest.mark.parametrize("address", ["/static/..%2fweb.py", "/static/../web.py", "/static/", "/nothing", "/etc/passwd"])
def test_no_other_file_is_served(client: Any, address: str) -> None:
    answer = client.get(address)
    assert answer.status_code == 404
    assert "import" not in answer.text


def test_another_method_is_refused(client: Any) -> None:
    assert client.post("/search").status_code == 405
    assert client.get("/api/classify").status_code == 405


def test_a_failure_of_ours_says_nothing_of_its_inside(gallery: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.testclient import TestClient

    from declip.app.web import build

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(gallery.index, "nearest", broken)
    with TestClient(build(gallery, "localhost"), base_url=PAGE, raise_server_exceptions=False) as client:
        answer = client.get("/api/search?text=a")
    assert answer.status_code == 500
    assert "content-security-policy" in answer.headers
    assert "secret" not in answer.text
