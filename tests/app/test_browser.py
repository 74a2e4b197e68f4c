"""The app in a browser: typing, dropping files, and the keyboard."""

import re
import shutil
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from app.conftest import NAMES
from conftest import draw, read_table, write_table
from declip.app.server import address_of, build, take_port
from declip.app.state import AppState
from declip.data.sources.open import open_source
from indices import START

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the app needs declip[app]")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"
)

expect = sync_api.expect
expect.set_options(timeout=60_000)
PHONE = {"width": 390, "height": 844}


@contextmanager
def served(state, port=0):
    """The address of an app, served in a thread."""
    with take_port("127.0.0.1", port) as bound:
        server = uvicorn.Server(uvicorn.Config(build(state, "127.0.0.1"), log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        yield address_of(bound).rstrip("/")
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(shared):
    with served(shared) as found:
        yield found


@pytest.fixture
def page(browser, address, state):
    """A page that asks nobody else and logs no error."""
    context = browser.new_context(base_url=address)
    context.set_default_timeout(60_000)
    opened = context.new_page()
    wrong = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "request",
        lambda asked: None if asked.url.startswith((address, "blob:")) else wrong.append(asked.url),
    )
    opened.on(
        "console",
        lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None,
    )
    yield opened
    context.close()
    assert wrong == []


def test_a_file_is_searched_with_and_classified(page, tmp_path):
    files, status = page.get_by_label("Image to search with"), page.get_by_role("status")
    page.goto("/search")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(status).to_have_text("Enter a text, or choose an image.")
    page.locator("#more > summary").click()
    page.get_by_label("Classes of the image, one per line").fill(
        "a red circle\na blue bar\n<b>bold</b>"
    )
    (tmp_path / "<img src=x onerror=alert(1)>.png").write_bytes(b"no image")
    files.set_input_files(tmp_path / "<img src=x onerror=alert(1)>.png")
    expect(status).to_contain_text("cannot be read")
    draw("red", "circle").save(tmp_path / "photo.png")
    files.set_input_files(tmp_path / "photo.png")
    expect(page.locator("#bars > li")).to_have_count(3)
    expect(status).to_contain_text("Most likely:")
    expect(page.locator("#bars")).to_contain_text("<b>bold</b>")
    expect(page.locator("#hits > li")).to_have_count(24)
    assert page.get_by_role("img", name="The chosen image").is_visible()
    assert not urlsplit(page.url).query
    page.get_by_label("Classes of the image, one per line").fill("only one")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(status).to_contain_text("two classes")
    expect(page.locator("#classified")).to_be_hidden()
    page.get_by_role("button", name="Remove the image").click()
    expect(page.locator("#preview")).to_be_hidden()


def test_a_text_is_typed_and_found_by_keyboard_alone(page, shared):
    page.goto("/pairs")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.goto("/search")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("a red circle")
    page.keyboard.press("Enter")
    expect(page.locator("#hits > li")).to_have_count(24)
    first = shared.index.search("a red circle", k=1)[0]
    expect(page.locator("#hits > li").first).to_contain_text(first.caption)
    assert "text=a+red+circle" in page.url
    image, plain = page.locator("#hits img").first, f"/images/{first.id}?v={shared.version}"
    expect(image).to_have_attribute("src", re.compile(rf"{re.escape(plain)}$"))
    page.locator("#hits a").first.click()
    expect(page.locator("#hits > li").first).to_contain_text("cosine 1.000")


def test_a_result_says_on_demand_what_it_and_the_text_resemble(browser, page, explained):
    page.goto("/search?text=a+red+circle")
    expect(page.locator("#hits > li")).to_have_count(24)
    expect(page.get_by_role("button", name="Why?")).to_have_count(0)  # without known pairs
    hits = explained.explain("an orange", explained.search("an orange", k=24))
    hit = next(each for each in hits[1:] if each.resembles)
    with served(AppState(explained, START)) as address:
        opened = browser.new_page(base_url=address)
        opened.goto("/search?text=an+orange")
        card = opened.locator("#hits > li").nth(hits.index(hit))
        card.get_by_role("button", name="Why?").click()
        for name in hit.resembles:
            expect(card).to_contain_text(f"“{name}”")
        expect(opened.get_by_role("button", name="Why?")).to_have_count(len(hits) - 1)
        opened.goto(f"/search?id={hit.id}")
        expect(opened.locator("#hits > li")).to_have_count(len(hits))
        expect(opened.get_by_role("button", name="Why?")).to_have_count(0)  # without a text
        opened.close()


def test_an_address_brings_back_the_template_and_the_balance(page):
    for template, chosen in (("a red {}", "own"), ("imagenet", "imagenet")):
        page.goto(f"/search?text=bar&id=0&weight=0.2&template={template}")
        expect(page.locator("#hits > li")).to_have_count(24)
        assert [page.locator(f"#{name}").input_value() for name in ("template", "balance")] == [
            chosen,
            "0.2",
        ]
        assert page.locator("#own").is_visible() == (chosen == "own")
        assert parse_qs(urlsplit(page.url).query) == {
            "text": ["bar"], "id": ["0"], "weight": ["0.2"], "template": [template], "over": ["images"]
        }  # fmt: skip


def test_old_answers_go_when_another_question_fails(page, tmp_path):
    hits, status = page.locator("#hits > li"), page.get_by_role("status")
    page.goto("/search?id=0")
    expect(hits).to_have_count(24)
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.get_by_label("Image to search with").set_input_files(tmp_path / "broken.png")
    expect(status).to_contain_text("cannot be read")
    expect(hits).to_have_count(0)
    page.goto("/search?text=bar")
    expect(hits).to_have_count(24)
    page.get_by_label("Text to search for").fill("")
    page.keyboard.press("Enter")
    expect(status).to_contain_text("Enter a text")
    assert not urlsplit(page.url).query
    page.goto("/search?text=bar&template=imagenat")
    expect(status).to_contain_text('no template set "imagenat"')
    # --- and when it comes after its image was removed
    held = []
    page.route("**/api/search", lambda route: held.append(route))  # Playwright marks the handler
    with page.expect_request("**/api/search"):
        page.goto("/search?id=0")
    page.get_by_role("button", name="Remove the image").click()
    with page.expect_response("**/api/search") as answer:
        held[0].continue_()
    answer.value.finished()
    page.wait_for_timeout(300)
    expect(hits).to_have_count(0)


def tab_to(page, selector):
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    pytest.fail(f"Tab does not reach {selector}")


def test_pairs_are_marked_and_saved_by_keyboard_also_after_a_reload(page, shared):
    page.goto("/pairs")
    rows = page.locator("#disagreeing-rows > li")
    expect(rows).to_have_count(1)  # the worst of 48 captions
    page.get_by_label("Cosine below").fill("1")
    page.get_by_role("button", name="Show", exact=True).click()
    expect(rows).to_have_count(24)
    page.get_by_role("button", name="Show more").first.click()
    expect(rows).to_have_count(48)
    expect(page.get_by_role("status")).to_have_text(
        "48 of 48 captions below 1.000, the worst first"
    )
    page.locator("#limit").focus()
    tab_to(page, "[data-pair]")
    page.keyboard.press("Space")
    tab_to(page, "#duplicates > summary")
    page.keyboard.press("Enter")
    expect(page.locator("#duplicates-said")).to_contain_text("group")
    page.reload()
    expect(page.locator("#list-count")).to_have_text("1 pair")
    tab_to(page, "#save")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Train on them: declip finetune")
    drop, rest = (Path(f"{shared.index.folder}{end}") for end in (".drop.jsonl", ".pairs"))
    assert (drop.read_text().count(".png"), len(open_source(rest))) == (1, 23)


def test_every_view_fits_a_phone(page):
    page.set_viewport_size(PHONE)
    parts = {
        "search?text=red": "#hits > li",
        "search?id=1": "#hits > li",
        "pairs": "#disagreeing-rows > li",
    }
    for view, part in parts.items():
        page.goto(f"/{view}")
        page.locator(part).first.wait_for()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], view
            assert page.locator("h1").is_visible()


def test_images_are_captioned_without_a_mouse_through_a_restart_and_a_second_tab(
    browser, start, uncaptioned, tmp_path
):
    """The first 20 of 30 images have captions already: estimates begin at 25."""
    table = tmp_path / "captions.csv"
    write_table(
        table,
        [f"{uncaptioned.parent / name}.png,{name} no. {n}" for n, name in enumerate(NAMES[:20])],
    )
    with ExitStack() as running:
        address = running.enter_context(served(start()))
        context = browser.new_context(base_url=address)
        one = context.new_page()
        one.goto("/")
        shown, status = one.locator("#key"), one.get_by_role("status")
        for number in range(20, 30):
            expect(status).to_have_text(f"{number} of 48 images have captions.")
            if number == 25:  # the server is started again
                running.pop_all().close()
                running.enter_context(served(start(), urlsplit(address).port))
                one.reload()
            expect(shown).to_have_text(f"{NAMES[number]}.png")
            one.keyboard.press("1")  # takes the nearest caption
            one.keyboard.type(f" no. {number}")
            if number == 23:
                one.keyboard.press("Control+Enter")
                expect(one.locator("#saved > li")).to_have_count(1)
                one.keyboard.type("another, of 12 words")
            one.keyboard.press("Enter")
        expect(status).to_contain_text("30 of 48")
        # --- skip, back, and an image that is captioned elsewhere meanwhile
        for number, key in ((30, "PageDown"), (31, "PageUp"), (30, "Shift")):
            expect(shown).to_have_text(f"{NAMES[number]}.png")
            one.keyboard.press(key)
        two = context.new_page()
        two.goto("/caption")
        expect(two.locator("#key")).to_have_text(f"{NAMES[31]}.png")
        cell = next(row["image"] for row in read_table(table) if NAMES[29] in row["image"])
        with table.open("a", encoding="utf-8") as file:
            file.write(f"{cell.replace(NAMES[29], NAMES[30])},written by hand\n")
        one.keyboard.type("mine")
        one.keyboard.press("Enter")
        expect(status).to_contain_text("Not saved")
        expect(one.locator("#saved [aria-pressed]")).to_have_text(["written by hand"])
        one.keyboard.press("Enter")
        expect(shown).to_have_text(f"{NAMES[32]}.png")
        two.goto("/search")  # the image that it leaves is free at once
        three = context.new_page()
        three.goto("/caption")
        expect(three.locator("#key")).to_have_text(f"{NAMES[31]}.png")
        expect(one.locator("#estimates > li")).to_have_count(1)
        expect(one.locator("#estimates > li")).to_contain_text(
            re.compile(r"\d+ captions of 25 images.*before \d+ %")
        )
        one.set_viewport_size(PHONE)
        assert one.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        context.close()
    rows = read_table(table)
    assert len({row["image"] for row in rows}) == 31
    assert [row["caption"] for row in rows][-2:] == ["written by hand", "mine"]
    assert all(
        any(row["caption"].endswith(f" no. {number}") for row in rows) for number in range(30)
    )


def test_after_the_last_caption_the_page_says_what_to_run(browser, start, uncaptioned, tmp_path):
    rows = [f"{uncaptioned.parent / name}.png,{name}" for name in NAMES[:47]]
    table = write_table(tmp_path / "captions.csv", rows)
    with served(start()) as address:
        page = browser.new_context(base_url=address).new_page()
        page.goto("/")
        expect(page.locator("#key")).to_have_text(f"{NAMES[47]}.png")
        page.keyboard.type("the last one")
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("All 48 images have captions.")
        expect(page.locator("#text")).to_be_hidden()
        expect(page.locator("#command-0")).to_contain_text(f"declip finetune {table} --from ")
        page.get_by_role("button", name="Back").click()
        expect(page.locator("#key")).to_have_text(f"{NAMES[47]}.png")
        expect(page.locator("#text")).to_be_visible()


def test_nothing_is_typed_before_the_first_image_is_there(browser, start):
    waiting = []
    with served(start()) as address:
        page = browser.new_context(base_url=address).new_page()
        page.route("**/api/caption/next", lambda route: waiting.append(route))
        page.goto("/")
        expect(page.get_by_role("status")).to_have_text("Loading …")
        expect(page.locator("#text")).to_be_hidden()
        waiting[0].continue_()
        expect(page.locator("#text")).to_be_focused()


def test_a_saved_caption_is_changed_and_deleted(browser, start, tmp_path):
    def written():
        return [row["caption"] for row in read_table(tmp_path / "captions.csv")]

    with served(start()) as address:
        page = browser.new_context(base_url=address, viewport=PHONE).new_page()
        page.goto("/")
        field = page.locator("#text")
        saved = page.locator("#saved [aria-pressed]")
        status = page.get_by_role("status")
        expect(page.locator("#near")).to_be_hidden()
        expect(page.get_by_role("button", name="Save, next")).to_be_in_viewport(ratio=1)
        for number, text in enumerate(("cauliflower", "broccoli", "spinach"), 1):
            field.fill(text)
            page.keyboard.press("Control+Enter")
            expect(saved).to_have_count(number)
        # --- by keyboard: change, cancel, delete
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(field).to_have_value("cauliflower")
        page.keyboard.type(" in a bowl")
        page.keyboard.press("Control+Enter")
        expect(saved.first).to_have_text("cauliflower in a bowl")
        assert written() == ["cauliflower in a bowl", "broccoli", "spinach"]
        saved.first.focus()
        page.keyboard.press("Delete")
        expect(status).to_have_text("Deleted: cauliflower in a bowl")
        # --- by a button, while another caption is typed, and by an empty field
        field.fill("chard")
        page.get_by_role("button", name="Delete: spinach").click()
        expect(saved).to_have_text(["broccoli"])
        expect(field).to_have_value("chard")
        saved.click()
        page.keyboard.press("Escape")
        expect(field).to_have_value("")
        saved.click()
        field.fill("")
        page.keyboard.press("Enter")
        expect(status).to_have_text("Deleted: broccoli")
        assert [*filter(None, written())] == []
        # --- typed again
        field.fill("broccoli")
        page.keyboard.press("Enter")
        expect(page.locator("#key")).to_have_text(f"{NAMES[1]}.png")
        assert [*filter(None, written())] == ["broccoli"]
