"""Captioning images: what the page gets, what is written, and what is refused."""

import multiprocessing
import os
import re
import shlex
from functools import partial
from types import SimpleNamespace

import pytest

from app.conftest import NAMES, ask, assert_refused
from conftest import draw, read_table, refuses
from declip.app.caption_table import CaptionFile, CaptionTable, Change
from declip.app.server import open_state
from declip.data.sources.open import open_source
from declip.data.sources.rows import DelimitedRows


@pytest.fixture
def path(tmp_path):
    return tmp_path / "captions.csv"


@pytest.fixture
def captioning(start):
    """A client of an app that captions into a new file."""
    with ask(start()) as client:
        yield client


def get(client, tab="one", **query):
    return client.post("/api/caption/next", json={"tab": tab, **query}).json()


def save(client, shown, *captions, **change):
    return client.post(
        "/api/caption",
        json={"id": shown["id"], "captions": captions, "seen": shown["saved"], **change},
    )


def test_every_caption_is_in_the_table_and_a_restart_goes_on(start, path):
    path.write_text("note,image,caption\nkept,elsewhere.png,=1+1\n")
    typed = [text for number in range(3) for text in (f"caption {number}", "another, “quoted”")]
    with ask(start()) as client:
        for number in range(3):
            shown = get(client)
            assert (shown["position"], shown["done"], shown["saved"]) == (number, number, [])
            assert sorted(shown["suggestions"]) == sorted({*typed[: 2 * number]})
            assert save(client, shown, f"caption {number}", "another, “quoted”").status_code == 200
    with ask(start()) as client:
        assert get(client, "two")["position"] == 3
        first = get(client, "two", position=0)
        assert first["saved"] == ["caption 0", "another, “quoted”"]
        assert sorted(first["suggestions"]) == ["caption 1", "caption 2"], "not those that it has"
    rows = read_table(path)
    assert rows[0] == {"note": "kept", "image": "elsewhere.png", "caption": "=1+1"}
    source = open_source(path)
    captions = [source[n].captions()[0] for n in range(len(source))]
    assert captions == ["=1+1", "caption 0", "caption 1", "caption 2"]
    assert source[1].open().size == (32, 32)


def test_control_characters_are_spaces_as_in_training(captioning, path):
    shown = get(captioning)
    assert save(captioning, shown, "a\0red\x1b cat").json()["saved"] == ["a red cat"]
    path.write_text(path.read_text().replace("red cat", "red\x1fcat"))  # by another program
    shown = get(captioning, position=shown["position"])
    assert save(captioning, shown, "mine").json()["saved"] == ["a red cat", "mine"]


def test_two_tabs_show_other_images_and_no_caption_is_overwritten(captioning, path):
    one, two = (get(captioning, tab) for tab in ("one", "two"))
    assert one["id"] != two["id"]
    assert save(captioning, one, "first").status_code == 200
    assert_refused(save(captioning, one, "second"), "first", 409)
    with path.open("a") as file:  # by another program
        file.write(f"{two['key']},by hand\n")
    now = get(captioning, position=one["position"])
    assert save(captioning, now, "second").json()["saved"] == ["first", "second"]
    assert "by hand" in path.read_text()
    assert [left.name for left in path.parent.glob(".*")] == [".captions.csv.lock"]


def test_processes_with_other_caches_lose_no_caption(opened, path, monkeypatch):
    ids = opened.index.ids.tolist()

    def write_40(name):
        monkeypatch.setenv("DECLIP_CACHE", str(path.parent / name))
        table = CaptionTable(path, opened.index)
        for number in range(40):
            id = ids[2 * (number % 24) + (name == "two")]
            seen = table.read().get(id, [])
            table.change(Change(id=id, captions=[f"{name} {number}"], seen=seen))

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=write_40, args=(name,)) for name in ("one", "two")]
    for process in processes:
        process.start()
    table = CaptionTable(path, opened.index)
    while any(process.is_alive() for process in processes):
        table.read()  # between their changes
    for process in processes:
        process.join()
    saved = [text for own in table.read().values() for text in own]
    assert (len(saved), [process.exitcode for process in processes]) == (80, [0, 0])


ROWS = {
    "image,caption\na.png,a cat, on a mat\n": "Line 2 .*3 cells instead of 2.*quotation",
    'image,caption\na.png,"a cat\nb.png,a dog\n': "quotation mark in line 2",
    "image,caption\na.png,a\nb.png,\udcff\n": "Line 3 .*UTF-8",
    "image,caption,caption\na.png,a,b\n": "one column caption",
}


@pytest.mark.parametrize(("content", "told"), ROWS.items())
def test_a_table_that_training_refuses_is_refused_before_and_while_captioning(
    captioning, path, content, told
):
    shown, written = get(captioning), content.encode(errors="surrogateescape")
    path.write_bytes(written)
    answer = save(captioning, shown, "mine")
    assert (answer.status_code, bool(re.search(told, answer.json()["error"]))) == (400, True)
    assert path.read_bytes() == written
    refuses(told, open_state, "no model is read", "no source", caption=path)


CONTENTS = (
    b'\xef\xbb\xbfimage,caption,note\r\nx.png,"""a"" b","1\r\n2"\r\n\r\n"y.png", c ,\r\n',
    b"image;caption\nx.png;a, b and c",
    b"caption,image\n",
)


@pytest.mark.parametrize("content", CONTENTS)
def test_other_rows_keep_their_bytes(start, path, content):
    path.write_bytes(content)
    with ask(start()) as client:
        shown = get(client)
        shown = {**shown, **save(client, shown, "one, two; three").json()}
        end = b"\r\n" if b"\r\n" in content else b"\n"
        added = path.read_bytes().removeprefix(content).removeprefix(end)
        assert (added.count(b"\n"), added.endswith(end)) == (1, True)
        assert shown["saved"] == ["one, two; three"]
        save(client, shown, "four", replaces=0)
    written = path.read_bytes()
    assert (written.startswith(content), b"three" in written) == (True, False)
    assert [cells for _, cells in DelimitedRows(path, ",").records()][-1]["caption"] == "four"


def test_captions_are_changed_and_deleted_in_their_rows(start, path, uncaptioned):
    image = uncaptioned.parent / f"{NAMES[0]}.png"

    def content(one, two):
        rows = f'{image},{one},"1\n\n"\n\nother.png,x,2\n{image},{two},3\n'
        return f"image,caption,note\n{rows}"

    path.write_text(content("first", "second"))
    with ask(start()) as client:
        shown = get(client, position=0)
        steps = (
            (["first", "second"], 1, ["the 2nd"], ["first", "the 2nd"]),
            (["first", "second"], 0, [], 409),
            (["first", "the 2nd"], 2, ["x"], 400),
            (["first", "the 2nd"], 0, ["the 2nd"], ["the 2nd"]),  # no caption twice
            (["the 2nd"], 0, [], []),
        )
        for seen, replaces, captions, expected in steps:
            answer = save(client, {**shown, "saved": seen}, *captions, replaces=replaces)
            saved = answer.json().get("saved", answer.status_code)
            assert saved == expected
        assert answer.json()["done"] == 0
        assert path.read_text() == content("", "")
        save(client, {**shown, "saved": []}, "again", "and again")
    assert path.read_text() == content("again", "and again")


def test_what_another_program_writes_meanwhile_stays(captioning, path, monkeypatch):
    def append(_):
        with path.open("a") as file:
            file.write("x.png,theirs\n")

    path.write_text("image,caption\n")
    with monkeypatch.context() as patch:
        patch.setattr("declip.app.caption_table.flush", append)
        answer = save(captioning, get(captioning), "mine")
    assert_refused(answer, "Save again")
    assert save(captioning, get(captioning), "mine").status_code == 200
    assert ("theirs" in path.read_text(), "mine" in path.read_text()) == (True, True)


def test_a_table_that_is_replaced_while_it_is_read_is_refused(path, monkeypatch):
    class Replaced(DelimitedRows):
        def records(self):
            rows = [*super().records()]
            path.write_text(path.read_text() + "x.png,theirs\n")
            return rows

    path.write_text("image,caption\n")
    monkeypatch.setattr("declip.app.caption_table.DelimitedRows", Replaced)
    refuses("changes while it is read.*--caption", CaptionFile.read, path)


def test_a_link_to_the_table_and_the_permissions_stay(start, path):
    target = path.parent / "synced" / "table.csv"
    target.parent.mkdir()
    target.touch()
    target.chmod(0o664)
    path.symlink_to("synced/table.csv")
    with ask(start()) as client:
        save(client, get(client), "mine")
    assert path.is_symlink()
    assert "mine" in target.read_text()
    assert target.stat().st_mode & 0o777 == 0o664
    assert (target.parent / ".table.csv.lock").exists()


def test_the_next_image_is_one_that_no_tab_shows(captioning, monkeypatch):
    asked = [("one", -1), ("one", -1), ("two", -1), ("two", 5), ("two", 47)]
    shown = [get(captioning, tab, after=after)["position"] for tab, after in asked]
    assert shown == [0, 0, 1, 6, 1]
    assert get(captioning, "two", position=3)["position"] == 3
    assert get(captioning, "three")["position"] == 1, "what a tab has left is free"
    captioning.post("/api/caption/hold", json={"tab": "one", "id": None})  # the tab is closed
    assert get(captioning, "four")["position"] == 0
    monkeypatch.setattr("declip.app.captions.LEASE", -1)  # seconds: all tabs were lost long ago
    assert get(captioning, "five")["position"] == 0


def test_a_tab_that_stays_open_keeps_its_image(captioning, monkeypatch):
    now = 0.0
    monkeypatch.setattr("declip.app.captions.time", SimpleNamespace(monotonic=lambda: now))
    shown = get(captioning, "one")
    for _ in range(5):
        now += 80
        held = captioning.post("/api/caption/hold", json={"tab": "one", "id": shown["id"]})
        assert held.status_code == 200
    assert get(captioning, "two")["position"] == 1
    now += 100
    assert get(captioning, "three")["position"] == 0


def test_a_link_from_another_site_holds_no_image(captioning):
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    for address in ("/api/caption?tab=other", "/api/caption/next?tab=other"):
        assert captioning.get(address, headers=link).status_code == 405
    assert get(captioning)["position"] == 0


def test_after_25_images_the_projections_are_fitted(start):
    state = start()
    with ask(state) as client:
        for name in NAMES[:25]:
            save(client, get(client), name.replace("-", " "))
        with state.captioning.fitting:
            (estimate,) = get(client)["estimates"]
    assert (estimate["images"], estimate["captions"]) == (25, 25)
    assert 0 <= estimate["start"] <= 1
    assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    assert start().captioning.estimates[0] == state.captioning.estimates[0]


def test_files_whose_names_are_not_utf_8_are_refused_at_the_start(tiny_run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for color in ("red", "blue"):
        draw(color, "bar").save(folder / f"{color}.png")
    (folder / "red.png").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    start = partial(open_state, str(tiny_run), str(folder), tmp_path / "index")
    refuses("1 file .*UTF-8.*caf.*Rename", start, caption=tmp_path / "captions.csv")


def test_a_table_that_is_not_a_regular_file_is_refused_at_the_start(path):
    path.symlink_to(path.name)
    refuses("captions.csv.*--caption", open_state, "no model", "no source", caption=path)
    path.unlink()
    os.mkfifo(path)
    refuses("not a regular file.*--caption", open_state, "no model", "no source", caption=path)


def test_the_next_commands_have_the_paths_of_the_table_the_model_and_the_images(
    start, path, tiny_run, uncaptioned
):
    state = start()
    finetune, search = (shlex.split(command) for command in state.captioning.describe()["commands"])
    assert finetune == f"declip finetune {path} --from {tiny_run} --out runs/captions".split()
    assert search == f"declip app runs/captions {os.path.relpath(uncaptioned)}".split()


def test_wrong_input_is_refused(captioning, start, path, client):
    shown = get(captioning)
    for id, captions in (
        (shown["id"], ["  "]),
        (shown["id"], ["x" * 2_001]),
        (2**40, ["x"]),
        (shown["id"], []),
    ):
        assert 400 <= save(captioning, {"id": id, "saved": []}, *captions).status_code < 500
    beyond = {"tab": "one", "position": 999}
    assert captioning.post("/api/caption/next", json=beyond).status_code == 404
    assert captioning.get("/caption").status_code == 200
    assert not path.exists()
    assert client.get("/caption").status_code == 404  # started without --caption
    for address in ("/api/caption", "/api/caption/next", "/api/caption/hold"):
        assert client.post(address, json={"tab": "x"}).status_code == 404
    assert "Caption" not in client.get("/search").text
    (path.parent / "other.csv").write_text("a,b\n1,2\n")
    for name in ("captions.txt", "other.csv"):
        refuses("--caption", start, name)
