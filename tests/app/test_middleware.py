from typing import Any

import pytest

from app.conftest import PAGE, ask

VIEWS = ("classify", "search", "neighbors", "pairs")


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_one_page_that_loads_nothing_from_elsewhere(client: Any, view: str) -> None:
    answer = client.get(f"/{view}")
    assert answer.status_code == 200
    assert f'href="/{view}" aria-current="page"' in answer.text
    assert "http" not in answer.text.replace("http-equiv", "")
    for inline in ("<script>", "<style", " style=", " onclick=", "javascript:"):
        assert inline not in answer.text


def test_the_first_page_is_the_search_and_other_methods_are_refused(client: Any) -> None:
    assert client.get("/", follow_redirects=False).headers["location"] == "/search"
    assert [client.post("/search").status_code, client.get("/api/classify").status_code] == [405, 405]


def test_answers_say_what_a_browser_may_do(client: Any) -> None:
    for address in ("/search", "/static/app.css", "/api/pairs", "/thumbnails/0", "/nothing", "/api/search"):
        headers = client.get(address).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_own_names_and_addresses_in_numbers_are_answered_and_foreign_names_refused(client: Any) -> None:
    for host in ("127.0.0.1:8765", "localhost:1", "LOCALHOST", "[::1]:8765", "192.168.1.5:8765"):
        assert client.get("/search", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "a b", "[::1", "localhost@x"):
        assert client.get("/search", headers={"Host": host}).status_code == 421, host


@pytest.mark.parametrize("address", ["/api/images", "/api/classify", "/api/pairs/list"])
def test_a_foreign_page_can_send_nothing(client: Any, address: str) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "", PAGE + ".evil.example"):
        assert client.post(address, json={}, headers={"Origin": origin}).status_code == 403, origin
    del client.headers["Origin"]
    assert client.post(address, json={}).status_code == 403


def test_a_foreign_page_can_load_nothing_but_the_user_may_follow_a_link(client: Any) -> None:
    loads = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert client.get("/thumbnails/0", headers=loads).status_code == 403
    assert client.get("/api/search?text=a", headers=loads).status_code == 403
    assert client.get("/search", headers={**loads, "Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert client.get("/thumbnails/0", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_no_other_file_is_served(client: Any) -> None:
    for address in ("/static/..%2fserver.py", "/static/../server.py", "/static/", "/nothing", "/etc/passwd"):
        answer = client.get(address)
        assert answer.status_code == 404, address
        assert "import" not in answer.text


def test_a_failure_of_ours_says_nothing_of_its_inside(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.index, "nearest", {"a secret": 1})  # a call of it fails
    with ask(state, raise_server_exceptions=False) as client:
        answer = client.get("/api/search?text=a")
    assert answer.status_code == 500
    assert "content-security-policy" in answer.headers
    assert "secret" not in answer.text
