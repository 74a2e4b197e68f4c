"""Captioning images: the table on the disk, two tabs, the heads that are fitted, and hostile or wrong input."""

import csv

from app.conftest import NAMES, ask
from conftest import refuses
from declip.data.sources.open import open_source


def save(client, shown, *captions):
    return client.post("/api/caption", json={"id": shown["id"], "captions": captions, "seen": shown["saved"]})


def test_every_caption_is_in_the_table_and_a_restart_goes_on(start, tmp_path):
    (tmp_path / "captions.csv").write_text("note,image,caption\nkept,elsewhere.png,=1+1\n")
    with ask(start()) as client:
        for number in range(3):
            shown = client.get("/api/caption?tab=one").json()
            assert (shown["place"], shown["done"], shown["saved"]) == (number, number, [])
            assert len(set(shown["suggestions"])) == 5
            assert save(client, shown, f"caption {number}", "another, “quoted”").status_code == 200
    with ask(start()) as client:
        assert client.get("/api/caption?tab=two").json()["place"] == 3
        assert client.get("/api/caption?tab=two&place=0").json()["saved"] == ["caption 0", "another, “quoted”"]
    rows = list(csv.DictReader((tmp_path / "captions.csv").read_text().splitlines()))
    assert rows[0] == {"note": "kept", "image": "elsewhere.png", "caption": "=1+1"}
    source = open_source(tmp_path / "captions.csv")
    assert [source.captions(n)[0] for n in range(len(source))] == ["=1+1", "caption 0", "caption 1", "caption 2"]
    assert source[1].image.size == (32, 32)


def test_two_tabs_show_other_images_and_no_caption_is_overwritten(start, tmp_path):
    with ask(start()) as client:
        one, two = (client.get(f"/api/caption?tab={tab}").json() for tab in ("one", "two"))
        assert one["id"] != two["id"]
        assert save(client, one, "first").status_code == 200
        stale = save(client, one, "second")
        assert (stale.status_code, "first" in stale.json()["error"]) == (409, True)
        # Another program adds a line to the file
        with (tmp_path / "captions.csv").open("a") as file:
            file.write(f"{two['key']},by hand\n")
        now = client.get(f"/api/caption?tab=one&place={one['place']}").json()
        assert save(client, now, "second").json()["saved"] == ["first", "second"]
        assert "by hand" in (tmp_path / "captions.csv").read_text()
        assert not list(tmp_path.glob(".*"))


def test_after_25_images_the_heads_are_fitted(start):
    state = start()
    with ask(state) as client:
        for name in NAMES[:25]:
            shown = client.get("/api/caption?tab=one").json()
            save(client, shown, f"{name.replace('-', ' ')}")
        with state.captioning._fitting:
            pass
        found = client.get("/api/caption?tab=one").json()
    (estimate,) = found["estimates"]
    assert estimate["captions"] == 25
    assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    assert state.captioning._choice.heads.image.shape[1] == state.index.info.dimension
    assert start().captioning.estimates[0] == state.captioning.estimates[0]


def test_wrong_input_is_refused(start, tmp_path, state):
    with ask(start()) as client:
        shown = client.get("/api/caption?tab=one").json()
        for body in (
            {"id": shown["id"], "captions": ["  "], "seen": []},
            {"id": shown["id"], "captions": ["x" * 2_001], "seen": []},
            {"id": 2**40, "captions": ["x"], "seen": []},
            {"id": shown["id"], "captions": [], "seen": []},
        ):
            assert 400 <= client.post("/api/caption", json=body).status_code < 500
        assert client.get("/api/caption?tab=one&place=999").status_code == 404
        assert client.get("/caption").status_code == 200
    assert not (tmp_path / "captions.csv").exists()
    with ask(state) as plain:
        assert (plain.get("/caption").status_code, plain.get("/api/caption?tab=x").status_code) == (404, 404)
        assert "Caption" not in plain.get("/search").text
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name in ("captions.txt", "other.csv"):
        refuses("--caption", start, name)
