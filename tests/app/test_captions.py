"""Captioning images and comparing pairs: what the pages get, write and refuse."""

import csv
import json
import multiprocessing
import re
import resource
import shutil
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from app.conftest import NAMES, ask
from conftest import refuses
from declip.app.caption_table import CaptionFile, CaptionTable
from declip.app.pairs import compare_captions, find_similar
from declip.app.server import open_state
from declip.app.state import AppState
from declip.data.sources.open import open_source
from declip.data.sources.rows import DelimitedRows
from indices import write_index


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
        assert [path.name for path in tmp_path.glob(".*")] == [".captions.csv.lock"]


def test_processes_with_other_caches_lose_no_caption(opened, tmp_path, monkeypatch):
    path, ids = tmp_path / "captions.csv", opened.index.ids.tolist()

    def write_60(name):
        monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / name))
        table = CaptionTable(path, opened.index)
        for number in range(60):
            id = ids[2 * (number % 24) + (name == "two")]
            table.change(id, [f"{name} {number}"], table.read().get(id, []))

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=write_60, args=(name,)) for name in ("one", "two")]
    for process in processes:
        process.start()
    table = CaptionTable(path, opened.index)
    while any(process.is_alive() for process in processes):
        table.read()  # between their changes
    for process in processes:
        process.join()
    saved = [text for own in table.read().values() for text in own]
    assert (len(saved), [process.exitcode for process in processes]) == (120, [0, 0])


ROWS = {
    "image,caption\na.png,a cat, on a mat\n": "Line 2 .*3 cells instead of 2.*quotation",
    'image,caption\na.png,"a cat\nb.png,a dog\n': "quotation mark in line 2",
    "image,caption\na.png,a\nb.png,\udcff\n": "Line 3 .*UTF-8",
    "image,caption,caption\na.png,a,b\n": "one column caption",
}


@pytest.mark.parametrize(("content", "told"), ROWS.items())
def test_a_table_that_training_refuses_is_refused_before_and_while_captioning(start, state, tmp_path, content, told):
    path = tmp_path / "captions.csv"
    with ask(start()) as client:
        shown = client.get("/api/caption?tab=one").json()
        path.write_bytes(content.encode(errors="surrogateescape"))
        answer = save(client, shown, "mine")
    assert (answer.status_code, bool(re.search(told, answer.json()["error"]))) == (400, True)
    assert path.read_bytes() == content.encode(errors="surrogateescape")
    refuses(told, open_state, "no model is read", "no source", caption=path)


CONTENTS = (
    b'\xef\xbb\xbfimage,caption,note\r\nx.png,"""a"" b","1\r\n2"\r\n\r\n"y.png", c ,\r\n',
    b"image;caption\nx.png;a, b and c",
    b"caption,image\n",
)


@pytest.mark.parametrize("content", CONTENTS)
def test_other_rows_keep_their_bytes(start, tmp_path, content):
    (tmp_path / "captions.csv").write_bytes(content)
    with ask(start()) as client:
        shown = client.get("/api/caption?tab=one").json()
        shown = {**shown, **save(client, shown, "one, two; three").json()}
        end = b"\r\n" if b"\r\n" in content else b"\n"
        added = (tmp_path / "captions.csv").read_bytes().removeprefix(content).removeprefix(end)
        assert (added.count(b"\n"), added.endswith(end), shown["saved"]) == (1, True, ["one, two; three"])
        change(client, shown, 0, "four")
    written = (tmp_path / "captions.csv").read_bytes()
    assert written.startswith(content)
    assert (b"four" in written, b"three" in written) == (True, False)
    rows = [cells for _, cells in DelimitedRows(tmp_path / "captions.csv", ",").records()]
    assert rows[-1]["caption"] == "four"


def test_captions_are_changed_and_deleted_in_their_rows(start, tmp_path, uncaptioned):
    path = tmp_path / "captions.csv"
    image = uncaptioned.parent / f"{NAMES[0]}.png"
    path.write_text(f'image,caption,note\n{image},first,"1\n\n"\n\nother.png,x,2\n{image},second,3\n')
    with ask(start()) as client:
        shown = client.get("/api/caption?tab=one&place=0").json()
        assert shown["saved"] == ["first", "second"]
        assert change(client, shown, 1, "the 2nd").json()["saved"] == ["first", "the 2nd"]
        assert change(client, shown, 0).status_code == 409
        shown["saved"] = ["first", "the 2nd"]
        assert change(client, shown, 2, "x").status_code == 400
        assert change(client, shown, 0, "the 2nd").json()["saved"] == ["the 2nd"], "no caption twice"
        shown["saved"] = ["the 2nd"]
        answer = change(client, shown, 0).json()
        assert (answer["saved"], answer["done"]) == ([], 0)
        assert path.read_text() == f'image,caption,note\n{image},,"1\n\n"\n\nother.png,x,2\n{image},,3\n'
        save(client, {**shown, "saved": []}, "again", "and again")
    written = path.read_text()
    assert written == f'image,caption,note\n{image},again,"1\n\n"\n\nother.png,x,2\n{image},and again,3\n'


def change(client, shown, number, *captions):
    body = {"id": shown["id"], "captions": captions, "seen": shown["saved"], "replaces": number}
    return client.post("/api/caption", json=body)


def test_a_link_to_the_table_stays(start, tmp_path):
    (tmp_path / "synced").mkdir()
    (tmp_path / "captions.csv").symlink_to("synced/table.csv")
    with ask(start()) as client:
        save(client, client.get("/api/caption?tab=one").json(), "mine")
    assert (tmp_path / "captions.csv").is_symlink()
    assert "mine" in (tmp_path / "synced/table.csv").read_text()
    assert (tmp_path / "synced/.table.csv.lock").exists()


def test_a_disk_without_room_is_named(start, tmp_path):
    with ask(start()) as client:
        shown = client.get("/api/caption?tab=one").json()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            answer = save(client, shown, "mine")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (answer.status_code, "captions.csv' cannot be written" in answer.json()["error"]) == (400, True)
        assert save(client, shown, "mine").status_code == 200
    (tmp_path / "file").touch()
    refuses("cannot be written.*--caption", open_state, "", "", caption=tmp_path / "file" / "captions.csv")


@pytest.mark.parametrize("times", [1, 99])
def test_what_another_program_writes_meanwhile_stays(start, tmp_path, monkeypatch, times):
    path = tmp_path / "captions.csv"
    path.write_text("image,caption\n")
    left = iter(range(times))

    def append(_):
        for number in islice(left, 1):
            with path.open("a") as file:
                file.write(f"x.png,theirs {number}\n")

    monkeypatch.setattr("declip.app.caption_table.flush", append)
    with ask(start()) as client:
        answer = save(client, client.get("/api/caption?tab=one").json(), "mine")
    assert ("theirs 0" in path.read_text(), "mine" in path.read_text()) == (True, times == 1)
    assert answer.status_code == (200 if times == 1 else 400)


def test_a_table_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    class Replaced(DelimitedRows):
        def records(self):
            rows = [*super().records()]
            if len(rows) < 3:
                path.write_text(path.read_text() + "x.png,theirs\n")
            return rows

    (path := tmp_path / "captions.csv").write_text("image,caption\n")
    monkeypatch.setattr("declip.app.caption_table.DelimitedRows", Replaced)
    assert len(CaptionFile.read(path).rows) == 3


def test_the_next_image_is_one_that_no_tab_shows(start, monkeypatch):
    with ask(start()) as client:

        def place(tab, after=-1):
            return client.get(f"/api/caption?tab={tab}&after={after}").json()["place"]

        assert [place("one"), place("one"), place("two"), place("two", 5), place("two", 47)] == [0, 0, 1, 6, 1]
        monkeypatch.setattr("declip.app.captions.HELD", -1)  # seconds: all tabs were left long ago
        assert place("three") == 0


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
    assert state.captioning._heads.image.shape[1] == state.index.info.dimension
    assert start().captioning.estimates[0] == state.captioning.estimates[0]


def test_wrong_input_is_refused(start, tmp_path, state):
    with ask(start()) as client:
        shown = client.get("/api/caption?tab=one").json()
        for id, captions in ((shown["id"], ["  "]), (shown["id"], ["x" * 2_001]), (2**40, ["x"]), (shown["id"], [])):
            body = {"id": id, "captions": captions, "seen": []}
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


def state_of(index):
    return SimpleNamespace(index=index, ranks={}, check_running=lambda: None)


@pytest.fixture
def made_up(tmp_path):
    """60 pairs: captions near their images, but 5 and 6 are exchanged, 7 has none, 20 is an image twice."""
    torch.manual_seed(0)
    images = normalize(torch.randn(60, 16), dim=-1)
    images[20] = images[40]
    texts = normalize(images + 0.15 * torch.randn(60, 16), dim=-1)
    texts[[5, 6]] = texts[[6, 5]]
    texts[7] = 0
    captions = [f"caption {n}" for n in range(60)]
    captions[7] = ""
    return state_of(write_index(tmp_path / "made", images, texts, captions))


def test_exchanged_captions_disagree_most(made_up):
    found = compare_captions(made_up)
    assert set(found.ids[:2].tolist()) == {5, 6}
    assert found.without == 1
    assert 7 not in found.ids
    own = (made_up.index.vectors(found.ids) * made_up.index.vectors(found.ids, "captions")).sum(1).numpy()
    np.testing.assert_allclose(found.values, own, atol=1e-6)
    spread = 1.4826 * np.median(np.abs(own - np.median(own)))
    assert (found.median, found.spread) == pytest.approx((np.median(own), spread), abs=1e-5)


def test_pairs_that_a_run_was_trained_on_are_judged_out_of_fold(run_folder, shared, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    rows = [(row.key, text) for row in map(shared.index.row, shared.index.ids) for text in row.captions]
    ranks = {pair: number / len(rows) for number, pair in enumerate(reversed(rows))}

    def state_with(share):
        known = list(ranks.items())[: round(share * len(rows))]
        with (run / "out_of_fold.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("key", "caption", "rank"), *((*pair, f"{rank:.4f}") for pair, rank in known)])
        return AppState(shared.index, str(run))

    with ask(state_with(0.75)) as client:
        answer = client.get("/api/pairs/disagreeing?limit=0.5").json()
        assert "was trained on" not in client.get("/pairs").text
    assert (answer["ranked"], answer["total"], answer["without"]) == (True, 18, 6)
    assert [row["id"] for row in answer["rows"]] == list(range(6, 24)), "the worst of an image's captions counts"
    assert answer["rows"][0]["value"] == pytest.approx(ranks[rows[12]], abs=1e-4)
    assert answer["marked"] == list(range(6, 12))
    with ask(state_with(0.25)) as client:  # of another source, mostly
        assert not client.get("/api/pairs/disagreeing").json()["ranked"]
        assert "was trained on" in client.get("/pairs").text


def test_similar_images_are_those_of_all_with_all_joined_through_others(made_up, tmp_path):
    similar = find_similar(made_up)
    [(ids, cosine)] = similar.groups(0.999)
    assert (ids, cosine) == ([20, 40], pytest.approx(1, abs=1e-5))
    images = made_up.index.vectors(made_up.index.ids)
    expected = ((images @ images.T).triu(1) >= 0.8).nonzero()
    found = zip(similar.one.tolist(), similar.other.tolist(), strict=True)
    assert {tuple(sorted(pair)) for pair in found} == {*map(tuple, expected.tolist())}
    assert similar.groups(1.1) == []
    angles = torch.tensor([0.0, 0.3, 0.6, 2.0, 2.2])
    images = torch.stack([angles.cos(), angles.sin()], 1)
    groups = find_similar(state_of(write_index(tmp_path / "row", images, images, ["a"] * 5))).groups(np.cos(0.31))
    assert [ids for ids, _ in groups] == [[3, 4], [0, 1, 2]]
    assert groups[1][1] == pytest.approx(np.cos(0.3), abs=1e-5)
    same = torch.full((40, 4), 0.49999)  # cosines of 0.99996, as float16 may have
    assert len(find_similar(state_of(write_index(tmp_path / "same", same, same, ["a"] * 40))).groups(1.0)[0][0]) == 40


def test_the_page_gets_what_was_found(client, state):
    found = compare_captions(state)
    below = float(found.values[5])
    answer = client.get(f"/api/pairs/disagreeing?limit={below}").json()
    assert len(answer["edges"]) == len(answer["counts"]) + 1
    assert (answer["total"], answer["without"], sum(answer["counts"])) == (24, 0, 24)
    rows = answer["rows"]
    assert [row["id"] for row in rows] == found.ids.tolist()
    assert [row["value"] for row in rows] == pytest.approx(found.values.tolist(), abs=1e-6)
    image, texts = state.index.vectors([rows[0]["id"]])[0], state.index.vectors(state.index.ids, "captions")
    assert rows[0]["nearest"] == state.index.row(int((texts @ image).argmax())).caption
    assert answer["marked"] == found.ids[:5].tolist()
    groups = client.get("/api/pairs/duplicates?threshold=0.8").json()
    assert len(groups["marked"]) == sum(group["size"] - 1 for group in groups["rows"])
    assert groups["total"] == len(groups["rows"])
    for wrong in ("disagreeing?start=-1", "duplicates?threshold=0.5", "duplicates?threshold=x"):
        assert client.get(f"/api/pairs/{wrong}").status_code == 400, wrong
    reason = "near-duplicate image"
    for tree in ({}, {"other": [1]}, {reason: ["x"]}, {reason: [99]}, {reason: [-1]}):
        assert client.post("/api/pairs/list", json=tree).status_code == 400, tree
    # --- the list has keys and reasons
    marked = {"image and caption disagree": [3, 1], "near-duplicate image": [3, 8]}
    answer = client.post("/api/pairs/list", json=marked)
    assert "drop.jsonl" in answer.headers["content-disposition"]
    rows = [json.loads(line) for line in answer.text.splitlines()]
    assert [(row["key"], row["place"]) for row in rows] == [(state.index.row(n).key, n) for n in (1, 3, 8)]
    assert [row["reason"] for row in rows] == ["image and caption disagree"] * 2 + ["near-duplicate image"]
    assert rows[0]["cosine"] == pytest.approx(float(found.values[found.ids.tolist().index(1)]), abs=1e-4)


def test_a_comparison_is_made_once_and_ends_with_the_server(state):
    calls = []

    def compare(state):
        state.check_running()
        calls.append(state.index)
        return 7

    assert [state.once(compare), state.once(compare)] == [7, 7]
    assert calls == [state.index]
    state.stopped.set()
    refuses("stopped", state.once, find_similar)
