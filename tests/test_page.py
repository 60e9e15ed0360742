"""The page in a browser, over the real server and the real model; CLIPMATCH_SCREENSHOTS=DIR keeps how it looks."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from album import HOSTILE, HOSTILE_CAPTION, serving
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from clipmatch.index import Index
from clipmatch.studio import Studio

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DOT = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")


def find_browser():
    return os.environ.get("CLIPMATCH_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        if os.environ.get("CLIPMATCH_BROWSER") == "required":
            pytest.fail("no Chromium is installed, and CLIPMATCH_BROWSER says that there must be one")
        pytest.skip("no Chromium is installed, and CLIPMATCH_CHROMIUM names none")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(album, embedded):
    with serving(album.index, embedded) as address:
        yield address


@pytest.fixture
def visit(browser):
    """Opens an address in a fresh window; afterwards nothing may have gone wrong in it that was not expected."""
    contexts, complaints = [], []

    def visit(address, allowed=None, **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "locale": "en-GB", **settings})
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        home = re.match(r"https?://[^/]+/", address)[0]

        def complain(text):
            if allowed is None or not re.search(allowed, text):
                complaints.append(text)

        page.on("pageerror", lambda error: complain(str(error)))
        page.on("console", lambda message: message.type in ("error", "warning") and complain(message.text))
        page.on("dialog", lambda dialog: (complain(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith((home, "data:", "blob:")) or complain(request.url))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


def shot(page, name):
    """Keep a picture of the page, if someone wants to look at it."""
    if place := os.environ.get("CLIPMATCH_SCREENSHOTS"):
        page.wait_for_timeout(400)  # for what moves to come to rest
        Path(place).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(place) / f"{name}.png")


def tiles(page):
    return page.locator("#photos .tile")


def tile(page, name):
    return page.locator(f'#photos .tile[aria-label^="{name}"]')


def settled(page):
    expect(page.locator("#photos")).to_have_attribute("aria-busy", "false")


def search(page, text):
    page.get_by_role("textbox", name="What the photograph shows").fill(text)
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("#q="))
    settled(page)


def first_is(page, name):
    expect(tiles(page).first).to_have_attribute("aria-label", re.compile(name))


def has_focus(locator):
    expect(locator).to_be_focused()


# Searching


def test_all_photographs_then_a_search_and_back(visit, address):
    page = visit(address)
    expect(page.get_by_role("status").first).to_have_text("10 photographs")
    expect(page.get_by_role("heading", name="June 2023")).to_be_attached()
    shot(page, "01_all")
    page.get_by_role("textbox", name="What the photograph shows").press_sequentially("a cat", delay=20)
    first_is(page, r"chelsea.*confidence \d\d %")
    expect(page).to_have_url(re.compile(r"#q=a\+cat$"))
    expect(page).to_have_title("a cat – clipmatch")
    expect(page.locator("#summary")).to_contain_text("Best first, of 10 photographs")
    assert "how probable it is" in tiles(page).first.locator(".sure").get_attribute("title")
    tiles(page).first.hover()
    shot(page, "02_search")
    page.reload()
    first_is(page, "chelsea")
    page.go_back()
    expect(page.locator("#summary")).to_have_text("10 photographs")
    expect(page.get_by_role("textbox", name="What the photograph shows")).to_have_value("")


def test_the_last_answer_wins(visit, address):
    """Answers that come late are of no interest any more."""
    page = visit(address)
    settled(page)
    page.route(
        "**/api/search",
        lambda route: (
            (page.wait_for_timeout(600), route.continue_()) if "slow" in route.request.post_data else route.continue_()
        ),
    )
    box = page.get_by_role("textbox", name="What the photograph shows")
    box.fill("slow motorcycle")
    page.wait_for_timeout(250)
    box.fill("a cat")
    first_is(page, "chelsea")
    page.wait_for_timeout(700)
    first_is(page, "chelsea")


def test_filters(visit, address):
    page = visit(address)
    page.get_by_role("button", name="Filters").click()
    panel = page.locator("#filters")
    expect(panel.get_by_label("Taken from")).to_be_focused()
    shot(page, "03_filters")
    panel.get_by_label("Camera").fill("pentax")
    panel.get_by_label("Camera").press("Enter")
    panel.get_by_label("Has a caption").check()
    expect(tiles(page)).to_have_count(1)
    expect(page.locator("#summary")).to_have_text("1 photograph pass the filters")
    expect(page.get_by_role("button", name="Filters")).to_contain_text("2")
    panel.get_by_label("Taken from").fill("2024-01-01")
    expect(page.get_by_role("heading", name="No photograph passes the filters")).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Take the filters away").click()
    expect(tiles(page)).to_have_count(10)
    page.keyboard.press("f")
    panel.get_by_label("Leave out what shows").fill("a motorcycle")
    panel.get_by_role("button", name="Add").click()
    page.keyboard.press("Escape")
    search(page, "a vehicle")
    expect(page.locator("#summary")).to_contain_text("left out for what they show")
    expect(tile(page, "motorcycle")).to_have_count(0)
    page.get_by_role("button", name="Remove: not a motorcycle").click()
    expect(tile(page, "motorcycle")).to_have_count(1)


def test_nothing_matches_and_the_best_is_offered(visit, address):
    page = visit(f"{address}#q=a+submarine+in+the+deep+sea&min=0.95")
    expect(page.get_by_role("heading", name="Nothing seems to match")).to_be_visible()
    expect(page.locator("#state")).to_contain_text("The closest is this one, at")
    shot(page, "04_nothing")
    page.get_by_role("button", name="Show what there is").click()
    expect(tiles(page)).not_to_have_count(0)


# Ticks and concepts


def test_ticks_refine_and_become_a_concept(visit, album, embedded, tmp_path):
    with serving(album.copy(tmp_path).index, embedded) as address:
        page = visit(address)
        settled(page)
        tile(page, "rocket").hover()
        tile(page, "rocket").get_by_role("button", name="More like this").click()
        first_is(page, "rocket.*ticked")
        expect(page.locator("#summary")).to_have_text("Refined by 1 tick, of 10 photographs")
        expect(page.get_by_role("region", name="Ticked photographs")).to_contain_text("1 ticked")
        search(page, "a cat")
        expect(page.locator("#summary")).to_contain_text("Refined by 1 tick")
        page.get_by_role("button", name="Forget all ticks").click()
        first_is(page, "chelsea")
        expect(page.locator("#summary")).to_contain_text("Best first")
        for name in ("chelsea", "astronaut"):
            tile(page, name).first.hover()
            tile(page, name).first.get_by_role(
                "button", name="More like this" if name == "chelsea" else "Less like this"
            ).click()
            settled(page)
        expect(page.locator("#ticks")).to_contain_text("1 ticked, 1 crossed out")
        shot(page, "05_ticks")
        page.get_by_label("Name of the concept").fill("@mieze")
        page.keyboard.press("Enter")
        expect(page.locator("#toasts")).to_contain_text("Saved as @mieze.")
        expect(page.get_by_role("button", name="@mieze", exact=True)).to_have_attribute("aria-pressed", "true")
        first_is(page, "chelsea")
        expect(page.locator("#ticks")).to_be_hidden()
        shot(page, "06_concept")
        page.get_by_role("button", name="Rename or remove @mieze").click()
        shot(page, "07_concept_sheet")
        page.get_by_label("Name", exact=True).fill("puss")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="@puss", exact=True)).to_be_visible()
        expect(page).to_have_url(re.compile("q=%40puss"))
        page.get_by_role("button", name="Rename or remove @puss").click()
        page.get_by_role("button", name="Remove", exact=True).click()
        page.get_by_role("button", name="Really remove it?").click()
        expect(page.locator("#concepts")).to_be_hidden()
        expect(page.locator("#summary")).to_have_text("10 photographs")


# By a picture


def test_a_dropped_picture(visit, address, album):
    page = visit(address)
    settled(page)
    data = base64.b64encode((album.folder / "chelsea_small.jpg").read_bytes()).decode()
    transfer = page.evaluate_handle(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "cat.jpg", { type: "image/jpeg" }));
            return transfer;
        }""",
        data,
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    expect(page.get_by_text("Drop a picture to search by it")).to_be_visible()
    shot(page, "08_drop")
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    first_is(page, "chelsea")
    expect(page.locator("#summary")).to_have_text("Nearest first, of 10 photographs")
    expect(page.locator("#example")).to_contain_text("cat.jpg")
    page.get_by_role("button", name="Remove: cat.jpg").click()
    expect(page.locator("#summary")).to_have_text("10 photographs")
    page.locator("#file").set_input_files(album.folder / "rocket.jpg")
    first_is(page, "rocket")
    expect(page.locator("#example")).to_contain_text("rocket.jpg")


def test_a_picture_that_is_none(visit, address):
    page = visit(address, allowed="status of 400")
    settled(page)
    page.locator("#file").set_input_files({"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"<html>"})
    expect(page.locator("#state")).to_contain_text("That picture can't be read")


# One photograph


def test_explaining(visit, address):
    page = visit(f"{address}#q=a+sleepy+cat")
    settled(page)
    tiles(page).first.click()
    viewer = page.get_by_role("dialog", name="Photograph")
    expect(viewer).to_be_visible()
    expect(viewer.locator(".strip button")).not_to_have_count(0)
    page.keyboard.press("i")
    expect(viewer.locator(".info")).to_contain_text("how probable it is")
    shot(page, "09_viewer")
    page.keyboard.press("i")
    viewer.get_by_role("button", name="Why it matches").click()
    expect(viewer.locator(".words li")).to_have_count(3)
    expect(viewer.locator(".heat")).to_be_visible()
    widths = viewer.locator(".words li i").evaluate_all("bars => bars.map((bar) => bar.clientWidth)")
    assert widths[2] == max(widths)  # "cat"
    shot(page, "10_explained")
    page.keyboard.press("e")
    expect(viewer.locator(".heat")).to_be_hidden()
    page.go_back()
    expect(viewer).to_be_hidden()
    expect(page).to_have_url(re.compile(r"#q=a\+sleepy\+cat$"))


def test_names_and_captions_are_text(visit, address):
    page = visit(address)
    settled(page)
    label = tile(page, "<script>").get_attribute("aria-label")
    assert label.startswith(HOSTILE_CAPTION)
    tile(page, "<script>").click()
    viewer = page.get_by_role("dialog", name="Photograph")
    expect(viewer.get_by_role("heading", name=HOSTILE_CAPTION)).to_be_visible()
    page.keyboard.press("i")
    expect(viewer.locator(".info")).to_contain_text(HOSTILE_CAPTION)
    shot(page, "11_hostile")
    page.keyboard.press("Escape")
    page.locator(f'#photos .tile:has-text("{HOSTILE}")').click()
    expect(viewer.get_by_role("heading", name=HOSTILE).first).to_be_visible()
    expect(page).to_have_title("clipmatch")
    assert page.locator("main script, dialog script, [src='x'], [onclick], [onerror]").count() == 0


ATTACKS = (  # each would call alert, or write to the title, if it were taken for anything but text
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "<svg onload=alert(3)><svg/onload=alert(3)>",
    "\"><iframe srcdoc='<script>parent.alert(4)<\\/script>'>",
    "' onmouseover='alert(5)' autofocus onfocus='alert(5)' x='",
    "javascript:alert(6)",
    '<a href="javascript:alert(7)">a</a><base href=//evil.example>',
    "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(8)>",
    "${alert(9)} {{constructor.constructor('alert(9)')()}} `${alert(9)}`",
    "</title></textarea></style><script>alert(10)</script><!--",
    "<details open ontoggle=alert(11)><video><source onerror=alert(11)>",
    "<template><img src=x onerror=alert(12)></template><b style=x:expression(alert(12))>",
    "\u202egnp.exe\u2066 <scr\u0000ipt>alert(13)</script> \u2028alert(13)",
    "<link rel=stylesheet href=//evil.example/x.css><style>@import'//evil.example';</style>",
    "<meta http-equiv=refresh content='0;url=javascript:alert(15)'>",
    "&lt;img src=x onerror=alert(16)&gt; &#60;script&#62;alert(16)&#60;/script&#62;",
)


def test_attacks_in_names_captions_and_concepts_stay_text(visit, embedded, tmp_path):
    """Wherever the page shows words of others: tiles, the viewer, panels, chips, the title, messages."""
    folder = tmp_path / "<b onclick=alert(0)>Pictures & more"
    folder.mkdir()
    for number, attack in enumerate(ATTACKS):
        name = f"{number:02d} " + attack.replace("/", "⁄").replace("\0", "")[:80]
        Image.new("RGB", (40 + number, 30), (number * 15, 80, 200 - number * 10)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(attack)
    with Index.open(tmp_path / "index.sqlite", embedded) as index:
        assert index.update([folder], progress=False).added == len(ATTACKS)
    with serving(tmp_path / "index.sqlite", embedded) as address:
        page = visit(address, allowed="status of 400")
        settled(page)
        expect(tiles(page)).to_have_count(len(ATTACKS))
        tiles(page).first.click()
        viewer = page.get_by_role("dialog", name="Photograph")
        page.keyboard.press("i")
        for _ in ATTACKS:
            expect(viewer.locator(".info")).to_contain_text("Pictures & more")
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Escape")
        for attack in ATTACKS[:4]:
            search(page, attack)
            expect(page).to_have_title(re.compile("clipmatch$"))
        page.goto(f"{address}#q=" + quote(ATTACKS[0]) + "&camera=" + quote(ATTACKS[1]) + "&not=" + quote(ATTACKS[2]))
        settled(page)
        page.goto(address)
        page.reload()
        settled(page)
        tiles(page).first.hover()
        tiles(page).first.get_by_role("button", name="More like this").click()
        page.get_by_label("Name of the concept").fill("<img src=x onerror=alert(17)>")
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        for key in ("f", "?"):
            page.keyboard.press(key)
            page.keyboard.press("Escape")
        page.get_by_role("button", name="The collection in figures").click()
        found = page.locator("script:not([src]), iframe, base, meta[http-equiv], [src='x'], style, link[href*=evil]")
        assert found.count() == 0
        handlers = """() => [...document.querySelectorAll("*")].flatMap((one) => [...one.attributes])
            .filter(({ name, value }) => /^on/i.test(name) || (name === "href" && /script:/i.test(value))).length"""
        assert page.evaluate(handlers) == 0


def test_the_policy_of_the_page_stops_code_that_gets_in(visit, address):
    """If a mistake put an attack into the page after all, the browser would not run it."""
    page = visit(address, allowed=".")  # the browser complains of each
    settled(page)
    page.evaluate(
        """() => {
            const make = (name) => document.body.appendChild(document.createElement(name));
            const attempts = [
                () => { make("script").text = "window.taken = 1"; },
                () => { document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.taken = 1'>"); },
                () => { make("img").setAttribute("onerror", "window.taken = 1"); },
                () => { make("iframe").srcdoc = "<script>parent.taken = 1</script>"; },
                () => { make("script").src = "https://evil.example/x.js"; },
                () => { setTimeout("window.taken = 1", 0); },
                () => { location.href = "javascript:window.taken = 1"; },
            ];
            for (const attempt of attempts) try { attempt(); } catch {}
        }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.taken") is None


def test_a_photograph_whose_file_is_gone(visit, album, embedded, tmp_path):
    own = album.copy(tmp_path)
    (tmp_path / "more").mkdir()
    shutil.copy(album.folder / "grass.png", tmp_path / "more" / "lost.png")
    with Index.open(own.index, embedded) as index:
        index.update([tmp_path / "more"], progress=False)
    (tmp_path / "more" / "lost.png").unlink()
    with serving(own.index, embedded) as address:
        page = visit(address, allowed="status of 404")
        expect(tile(page, "lost")).to_contain_text("The file is gone or can’t be read")
        expect(tile(page, "lost")).to_contain_text("lost.png")
        shot(page, "12_gone")
        tile(page, "lost").click()
        expect(page.get_by_role("dialog").get_by_text("The file is gone")).to_be_visible()


# Painting


class Unhurried(Studio):
    """A thousand steps take twenty seconds, so that a busy browser sees some of them."""

    def _paint(self, question, on_step, stop):
        return super()._paint(question, lambda *now: (on_step(*now), time.sleep(0.02)), stop)


def test_painting_and_what_is_near(visit, album, embedded, model_folder, vqgan):
    with serving(album.index, embedded, studio=Unhurried(str(model_folder), str(vqgan))) as address:
        page = visit(f"{address}#q=a+star", allowed="status of 400")
        settled(page)
        page.get_by_role("button", name="Paint it").click()
        easel = page.get_by_role("dialog", name="Paint it")
        expect(easel.get_by_label("What the picture should show")).to_have_value("a star")
        expect(easel.get_by_label("Steps")).to_have_value("")  # as many as are worth taking
        easel.get_by_label("Steps").fill("1000")
        easel.get_by_role("button", name="Paint", exact=True).click()
        expect(easel.get_by_role("status")).to_have_text(re.compile(r"Step [1-9]\d* of 1000"), timeout=30_000)
        expect(easel.get_by_role("img", name="What is painted")).to_be_visible()
        easel.get_by_role("button", name="Stop").click()
        expect(easel.get_by_role("status")).to_have_text("Stopped.")
        easel.get_by_label("Steps").fill("3")
        easel.get_by_label("Steps").press("Enter")
        expect(easel.get_by_role("img", name="A painting of “a star”")).to_be_visible()
        expect(easel.get_by_role("status")).to_have_text(re.compile(r"Likeness -?0\.\d+ .*; seed 0\."))
        expect(easel.get_by_role("button", name=re.compile("^Near: "))).to_have_count(9)  # two of ten are alike
        painting, near = (easel.locator(f".{name}").bounding_box() for name in ("painting", "near"))
        assert near["x"] > painting["x"] + painting["width"]  # beside it
        assert abs(near["y"] - painting["y"]) < painting["height"]
        shot(page, "20_painting")
        easel.get_by_role("button", name="Another").click()
        expect(easel.get_by_role("status")).to_contain_text("; seed 1.")
        with page.expect_download() as download:
            easel.get_by_role("link", name="Save").click()
        assert download.value.suggested_filename == "painting-1.png"
        easel.get_by_label("What the picture should show").fill("blur:-1")
        easel.get_by_role("button", name="Paint", exact=True).click()
        expect(easel.get_by_role("status")).to_contain_text("says what not to paint")


def test_painting_leads_back_to_the_photographs(visit, album, embedded, model_folder, vqgan):
    with serving(album.index, embedded, studio=Studio(str(model_folder), str(vqgan))) as address:
        page = visit(address)
        settled(page)
        page.keyboard.press("p")
        easel = page.get_by_role("dialog", name="Paint it")
        page.keyboard.type("a star")
        easel.get_by_label("Steps").fill("1")
        page.keyboard.press("Enter")
        easel.get_by_role("button", name=re.compile("^Near: ")).first.click()
        expect(page.get_by_role("dialog", name="Photograph")).to_be_visible()
        page.keyboard.press("Escape")
        page.keyboard.press("p")
        easel.get_by_role("button", name="Search by it").click()
        expect(page.locator("#example")).to_contain_text("painting.png")
        expect(page.locator("#summary")).to_contain_text("Nearest first")


def test_without_a_generator_nothing_is_offered(visit, address):
    page = visit(address)
    settled(page)
    expect(page.locator("#paint")).to_be_hidden()


# Without a mouse


def test_keys_alone(visit, address):
    page = visit(address)
    settled(page)
    page.keyboard.press("/")
    has_focus(page.get_by_role("textbox", name="What the photograph shows"))
    page.keyboard.type("a cat")
    first_is(page, "chelsea")
    page.keyboard.press("ArrowDown")
    has_focus(tiles(page).nth(0))
    page.keyboard.press("ArrowRight")
    has_focus(tiles(page).nth(1))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Home")
    has_focus(tiles(page).nth(0))
    shot(page, "13_focus")
    page.keyboard.press("Enter")
    viewer = page.get_by_role("dialog", name="Photograph")
    expect(viewer.locator(".place")).to_contain_text("1 of")
    page.keyboard.press("ArrowRight")
    expect(viewer.locator(".place")).to_contain_text("2 of")
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    has_focus(tiles(page).nth(1))
    page.keyboard.press("t")
    expect(page.locator("#ticks")).to_contain_text("1 ticked")
    settled(page)
    page.keyboard.press("t")
    expect(page.locator("#ticks")).to_be_hidden()
    settled(page)
    page.keyboard.press("x")
    expect(page.locator("#ticks")).to_contain_text("1 crossed out")
    settled(page)
    page.keyboard.press("s")
    expect(page.locator("#summary")).to_contain_text("Nearest first")
    expect(page.locator("#example")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#summary")).to_have_text("10 photographs")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys and hints")).to_contain_text("tick: more like this")
    shot(page, "14_help")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("/")
    page.keyboard.type("a cat")
    first_is(page, "chelsea")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("e")
    expect(viewer.locator(".words li")).to_have_count(2)


def test_what_screen_readers_need(visit, address):
    page = visit(f"{address}#q=a+cat")
    settled(page)
    unnamed = page.locator("button, input, select, a").evaluate_all(
        """all => all.filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.length))
            .map((one) => one.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("img:not([alt])").count() == 0
    grid = page.get_by_role("grid", name="Matches")
    assert int(grid.get_attribute("aria-rowcount")) >= 1
    assert page.locator("#photos > [role=row]").count() == page.locator("#photos > *").count()
    assert page.locator("#photos [tabindex='0']").count() == 1  # one stop for Tab
    expect(page.locator("html")).to_have_attribute("lang", "en")


# How it looks


@pytest.mark.parametrize("width", [360, 901, 1000, 1280])
def test_nothing_in_the_head_covers_another(visit, address, width):
    page = visit(address, viewport={"width": width, "height": 700})
    search(page, "a cat")
    boxes = page.locator("#top button:visible, #top a:visible").evaluate_all(
        """all => all.map((one) => one.getBoundingClientRect())
            .map(({left, right, top, bottom}) => [left, right, top, bottom])"""
    )
    assert len(boxes) >= 7
    for place, (left, right, top, bottom) in enumerate(boxes):
        assert left >= 0
        assert right <= width
        for other_left, other_right, other_top, other_bottom in boxes[place + 1 :]:
            apart = right <= other_left or other_right <= left or bottom <= other_top or other_bottom <= top
            assert apart


def test_the_pictures_of_the_page_can_be_taken(browser, tmp_path):
    """Those of the README, by the script that it names."""
    script = Path(__file__).parent.parent / "docs" / "page.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, stdout=subprocess.DEVNULL)
    for name in ("search.webp", "why.webp"):
        with Image.open(tmp_path / name) as taken, Image.open(script.parent / name) as shown:
            assert taken.size == shown.size == (1000, 560)


def test_dark_and_light(visit, address):
    page = visit(address, color_scheme="dark")
    settled(page)

    def brightness():
        return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))

    assert brightness() < 150
    shot(page, "15_dark")
    page.get_by_role("button", name="Theme: as the system").click()
    assert brightness() > 600
    page.reload()
    settled(page)
    expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
    assert brightness() > 600
    search(page, "a cat")
    page.get_by_role("button", name="Theme: light").click()
    assert brightness() < 150
    shot(page, "16_dark_search")


def test_thousands_of_photographs(visit, address):
    """Only what is near the screen exists; rows end flush; the rest comes as one scrolls."""
    asked = []

    def browse(route):
        question = json.loads(route.request.post_data)
        asked.append(question["page"])
        first = (question["page"] - 1) * 2000
        matches = [
            {
                "id": number, "name": f"{number}.jpg", "path": f"/{number}.jpg", "size": 1, "height": 300,
                "width": 300 + number % 7 * 60, "taken": None, "moment": "2024-05-01T12:00:00", "camera": None,
                "caption": None, "thumb": "dot.gif", "full": "dot.gif", "score": None, "confidence": None,
                "duplicates": 0,
            }
            for number in range(first, first + 2000)
        ]  # fmt: skip
        more = question["page"] < 3
        route.fulfill(json={"matches": matches, "best": None, "searched": 6000, "vetoed": 0, "more": more})

    page = visit(address)
    page.route("**/api/browse", browse)
    page.route("**/dot.gif", lambda route: route.fulfill(body=DOT, content_type="image/gif"))
    page.reload()
    expect(page.locator("#summary")).to_have_text("6,000 photographs")
    assert asked == [1]
    rows = page.locator("#photos .row:not(.heading)").evaluate_all(
        "rows => rows.map((row) => Math.round(row.lastChild.getBoundingClientRect().right))"
    )
    assert len(rows) > 3
    assert max(rows) - min(rows) <= 1
    for last in (1999, 3999, 5999):
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        expect(tile(page, f"{last}.jpg")).to_be_attached()
        assert tiles(page).count() < 250
        page.wait_for_timeout(150)
    assert asked == [1, 2, 3]
    page.evaluate("scrollTo(0, 0)")
    expect(tile(page, "0.jpg")).to_be_attached()


def test_a_telephone(visit, address):
    page = visit(f"{address}#q=a+cat", viewport={"width": 390, "height": 780}, has_touch=True)
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "17_telephone")
    tiles(page).first.tap()
    expect(page.get_by_role("dialog", name="Photograph")).to_be_visible()
    page.get_by_role("button", name="About it").tap()
    shot(page, "18_telephone_viewer")


# Other views, and when something is wrong


def test_duplicates_and_figures(visit, address):
    page = visit(address)
    settled(page)
    page.get_by_role("button", name="Near-duplicates").click()
    expect(page.locator("#summary")).to_contain_text("1 group of near-duplicates")
    expect(tiles(page)).to_have_count(2)
    shot(page, "19_duplicates")
    page.get_by_role("button", name="The collection in figures").click()
    sheet = page.get_by_role("dialog", name="The collection in figures")
    expect(sheet).to_contain_text("Pentax K-5")
    shot(page, "20_figures")
    sheet.get_by_role("button", name="Pentax K-5").click()
    expect(tiles(page)).to_have_count(1)


def test_no_photographs_yet(visit, album, embedded, tmp_path):
    Index.open(tmp_path / "empty.sqlite", embedded).close()
    with serving(tmp_path / "empty.sqlite", embedded) as address:
        page = visit(address)
        expect(page.get_by_role("heading", name="No photographs yet")).to_be_visible()
        expect(page.get_by_text("clipmatch index ~/Pictures")).to_be_visible()
        shot(page, "21_empty")
        with Index.open(tmp_path / "empty.sqlite", embedded) as index:
            index.update([album.folder / "trip"], progress=False)
        expect(tiles(page)).to_have_count(1)  # by itself


def test_a_server_that_fails_and_comes_back(visit, address):
    page = visit(address, allowed="status of 500|ERR_FAILED")
    settled(page)
    page.route("**/api/search", lambda route: route.abort())
    search(page, "a cat")
    expect(page.get_by_role("alert")).to_contain_text("is clipmatch serve still running?")
    shot(page, "22_error")
    page.unroute("**/api/search")
    page.route("**/api/search", lambda route: route.fulfill(status=500, json={"detail": "The disk is full."}))
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("The disk is full.")
    page.unroute("**/api/search")
    page.get_by_role("button", name="Try again").click()
    first_is(page, "chelsea")


def test_waiting_is_shown(visit, address):
    page = visit(f"{address}#q=nothing")
    page.route("**/api/search", lambda route: (page.wait_for_timeout(800), route.continue_()))
    page.goto("about:blank")
    page.goto(f"{address}#q=a+cat", wait_until="commit")
    expect(page.locator("#waiting")).to_be_visible()
    shot(page, "23_waiting")
    first_is(page, "chelsea")
    expect(page.locator("#waiting")).to_be_hidden()


def test_behind_a_token(visit, album, embedded):
    with serving(album.index, embedded, token="s3cret") as address:
        page = visit(f"{address}?token=s3cret")
        expect(page.locator("#summary")).to_have_text("10 photographs")
        expect(page).to_have_url(address)
        search(page, "a cat")
        first_is(page, "chelsea")
