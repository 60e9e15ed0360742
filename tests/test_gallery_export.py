"""A gallery that is given away: what is in its folder, what is not, and that it answers in a browser as Python does."""

import base64
import functools
import http.server
import json
import os
import re
import shutil
import tarfile
import threading

import numpy as np
import pytest
from click.testing import CliRunner
from colours import paint
from PIL import ExifTags, Image

from clipmatch import album, npm
from clipmatch.album import export_gallery, quantise, shown_path
from clipmatch.bundle import as_value, bundle
from clipmatch.cli import main
from clipmatch.crawl import Found, walk
from clipmatch.demo import sample_photographs
from clipmatch.embedder import load_model
from clipmatch.errors import ClipmatchError
from clipmatch.index import Index
from clipmatch.npm import Package, read_package
from clipmatch.query import parse_query
from clipmatch.search import Request
from clipmatch.store import Filter

QUERIES = (
    "a cat", "a cup of coffee", "a rocket launch", "the moon", "a motorcycle", "grass", "dog:2",
    "caf\u00e9 \u6771\u4eac!", "x " * 200,
)  # fmt: skip
SECRETS = (b"anna", b"Canon", b"secret", b"Exif\0", b"xmpmeta")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Sample photographs in anna's home folder, one of them twice, one on its side with all that a camera tells."""
    home = tmp_path_factory.mktemp("home") / "anna"
    pictures = home / "Pictures"
    (pictures / "trip").mkdir(parents=True)
    for path in sample_photographs():
        shutil.copy(path, pictures)
    with Image.open(pictures / "chelsea.png") as cat:
        cat.convert("RGB").resize((300, 200)).save(pictures / "trip" / "small cat.jpg", quality=80)
    with Image.open(pictures / "coffee.png") as coffee:
        exif = Image.Exif()
        exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "Canon", 6
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2023:06:15 12:30:00"
        gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
        gps[ExifTags.GPS.GPSLatitudeRef], gps[ExifTags.GPS.GPSLatitude] = "N", (41.0, 54.0, 10.0)
        gps[ExifTags.GPS.GPSLongitudeRef], gps[ExifTags.GPS.GPSLongitude] = "E", (12.0, 29.0, 47.0)
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">secret</x:xmpmeta>'
        turned = coffee.convert("RGB").transpose(Image.Transpose.ROTATE_90)
        turned.save(pictures / "trip" / "IMG_1.jpg", exif=exif, xmp=xmp, comment=b"secret")
    (pictures / "trip" / "IMG_1.txt").write_text("Breakfast <b>in Rome</b>", encoding="utf-8")
    with Index.open(home / "photos.sqlite") as index:
        index.update([pictures], progress=False)
        yield index


@pytest.fixture(scope="module")
def folder(index, libraries, tmp_path_factory):
    """The whole index, exported."""
    folder = tmp_path_factory.mktemp("gift") / "gallery"
    made = export_gallery(index, folder, size=200, full=True, runtime=libraries, progress=False)
    assert (made.count, made.failures) == (len(index), [])
    return folder


def value_of(folder, name):
    text = (folder / "data" / f"{name}.js").read_text(encoding="utf-8")
    start = f'gallery("{name}", '
    assert text.startswith(start)
    assert text.endswith(");\n")
    value = text[len(start) : -3].removeprefix("JSON.parse(")
    return json.loads(json.loads(value[:-1])) if value.endswith(")") else json.loads(value)


# The folder


def test_what_is_in_it(folder, index):
    names = {path.name for path in folder.iterdir()}
    assert {"index.html", "style.css", "page.js", "thumbs", "full", "data", "licences", "README.txt"} <= names
    assert not names & {"app.js", "server.js", "backend.js", "offline.js"}
    known = value_of(folder, "photos")
    assert len(known["path"]) == len(index) == len(list((folder / "thumbs").iterdir()))
    at = known["path"].index("trip/IMG_1.jpg")
    assert (known["taken"][at], known["caption"][at]) == ("2023-06-15T12:30:00", "Breakfast <b>in Rome</b>")
    assert (known["width"][at], known["height"][at]) == (600, 400)
    with Image.open(folder / "thumbs" / f"{known['picture'][at]}.jpg") as picture:
        assert picture.size == (200, 133)  # upright
    with Image.open(folder / "full" / f"{known['picture'][at]}.jpg") as picture:
        assert picture.size == (600, 400)  # never larger than it is
    licences = {path.name: path.read_text(encoding="utf-8") for path in (folder / "licences").iterdir()}
    assert "MIT" in licences["onnxruntime-web.txt"]
    assert "Apache License" in licences["tokenizers.txt"]
    assert base64.b64decode(value_of(folder, "model")) == (index.embedder.folder / "text.onnx").read_bytes()


def test_nothing_of_the_files_own_data_or_the_home_folder(folder):
    ours = [path for path in folder.rglob("*") if path.is_file() and path.parent.name not in ("licences",)]
    for path in ours:
        if path.name in ("runtime.js", "wasm.js", "tokenizer.js", "model.js", "search.js"):  # numbers; libraries
            continue
        content = path.read_bytes()
        assert not [secret for secret in SECRETS if secret in content], path
    for path in (folder / "thumbs").iterdir():
        with Image.open(path) as picture:
            assert not picture.getexif()
            assert not {"exif", "xmp", "comment", "icc_profile", "photoshop"} & picture.info.keys()


def test_a_path_tells_only_what_is_below_the_indexed_folder_or_the_home(monkeypatch, tmp_path):
    home = tmp_path / "anna"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    assert shown_path(home / "Pictures" / "a" / "b.jpg", [home / "Pictures"]) == "a/b.jpg"
    assert shown_path(home / "Pictures" / "a" / "b.jpg", [tmp_path]) == "Pictures/a/b.jpg"
    assert shown_path(tmp_path / "disk" / "b.jpg", []) == "b.jpg"
    assert shown_path(home / "b.jpg", [home / "b.jpg"]) == "b.jpg"


def test_the_page_may_be_opened_as_a_file_and_fetches_nothing(folder):
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert 'type="module"' not in page
    assert not re.findall(r'(?:src|href)="(?:/|https?:)', page)
    script = (folder / "page.js").read_text(encoding="utf-8")
    assert not re.findall(r"^(?:import|export)\b", script, re.MULTILINE)


def test_rows_of_int8_find_what_rows_of_float32_find():
    """The bank of the embedded model: real pictures and captions, as it sees them."""
    calibration = load_model().calibration
    pictures, captions = calibration.pictures, calibration.captions
    rows = quantise(pictures)
    assert rows.codes.nbytes + rows.scales.nbytes < pictures.nbytes / 3.9
    exact = captions @ pictures.T
    near = captions @ (rows.codes * rows.scales[:, None]).T
    assert np.abs(exact - near).max() < 0.005
    first, second = (np.argsort(-scores, axis=1)[:, :10] for scores in (exact, near))
    recall = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(first, second, strict=True)])
    assert recall > 0.98


def test_a_filter_chooses(index, libraries, tmp_path):
    made = export_gallery(index, tmp_path / "few", Filter(has_caption=True), runtime=libraries, progress=False)
    assert made.count == 1
    assert value_of(tmp_path / "few", "photos")["path"] == ["trip/IMG_1.jpg"]
    assert not (tmp_path / "few" / "full").exists()
    with pytest.raises(ClipmatchError, match="passes the filters"):
        export_gallery(index, tmp_path / "none", Filter(camera="Leica"), runtime=libraries, progress=False)
    assert not (tmp_path / "none").exists()


# What can go wrong


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Two pictures and an index of them that a test may change."""
    index = tmp_path / "own.sqlite"
    paint(tmp_path / "mine" / "red.png", "red")
    paint(tmp_path / "mine" / "blue.png", "blue")
    monkeypatch.setenv("CLIPMATCH_INDEX", str(index))
    run("index", tmp_path / "mine")
    return tmp_path / "mine"


def run(*arguments, status=0):
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output
    return done


def test_only_an_earlier_gallery_is_replaced(own, libraries, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    first = run("export-gallery", place, "--runtime", libraries)  # an empty folder is free
    assert re.fullmatch(r"2 photographs, \d+\.\d MB: .*index\.html\n", first.stdout)
    assert "python -m http.server -d" in first.stderr
    (place / "note.txt").write_text("old")
    run("export-gallery", place, "--runtime", libraries)
    assert not (place / "note.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} & {".place.clipmatch-draft", ".place.clipmatch-old"} == set()
    done = run("export-gallery", own, "--runtime", libraries, status=1)
    assert "has other things in it" in done.stderr
    assert (own / "red.png").is_file()
    assert "is a file" in run("export-gallery", own / "red.png", "--runtime", libraries, status=1).stderr


def test_a_photograph_that_is_gone_or_damaged_is_left_out(own, libraries, tmp_path):
    (own / "red.png").unlink()
    done = run("export-gallery", tmp_path / "place", "--runtime", libraries)
    assert "1 photograph," in done.stdout
    assert "red.png: no such file" in done.stderr
    known = value_of(tmp_path / "place", "photos")
    assert known["path"] == ["blue.png"]
    assert [path.stem for path in (tmp_path / "place" / "thumbs").iterdir()] == [str(at) for at in known["picture"]]
    before = (tmp_path / "place" / "index.html").read_bytes()
    (own / "blue.png").write_bytes(b"no picture")
    done = run("export-gallery", tmp_path / "place", "--runtime", libraries, status=1)
    assert "None of the 2 photographs can be read" in done.stderr
    assert (tmp_path / "place" / "index.html").read_bytes() == before  # the earlier one stays


def test_a_gallery_below_an_indexed_folder_is_no_photographs(own, libraries):
    run("export-gallery", own / "gift", "--runtime", libraries)
    assert {item.path.name for item in walk(own) if isinstance(item, Found)} == {"red.png", "blue.png"}


def test_a_model_that_no_browser_runs(photos, tmp_path, libraries):
    from colours import ColourEmbedder

    with Index.open(tmp_path / "colours.sqlite", ColourEmbedder()) as index:
        index.update([photos], progress=False)
        with pytest.raises(ClipmatchError, match="clipmatch export"):
            export_gallery(index, tmp_path / "place", runtime=libraries, progress=False)


# Libraries


@pytest.fixture
def package(tmp_path):
    """An archive as npm makes them -> (package, its folder)."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "main.js").write_text("export{a as b};")
    folder = tmp_path / "archives"
    folder.mkdir()
    package = Package("@our/thing", "1.2.3", "")
    assert package.archive == "our-thing-1.2.3.tgz"
    with tarfile.open(folder / package.archive, "w:gz") as file:
        file.add(tmp_path / "package", "package")
    return Package(package.name, package.version, npm_integrity(folder / package.archive)), folder


def npm_integrity(path):
    import hashlib

    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def test_a_package_is_read_only_if_it_is_the_one_that_was_published(package, tmp_path):
    package, folder = package
    assert read_package(package, ["main.js"], folder) == {"main.js": b"export{a as b};"}
    with (folder / package.archive).open("ab") as file:
        file.write(b"!")
    with pytest.raises(ClipmatchError, match=r"not @our/thing@1\.2\.3 as it was published"):
        read_package(package, ["main.js"], folder)
    with pytest.raises(ClipmatchError, match=r"npm pack @our/thing@1\.2\.3"):
        read_package(package, ["main.js"], tmp_path)


def test_a_package_is_fetched_once(package, monkeypatch, own_cache):
    package, folder = package
    asked = []
    monkeypatch.setattr(npm, "fetch", lambda wanted: asked.append(wanted) or (folder / wanted.archive).read_bytes())
    for _ in range(2):
        assert read_package(package, ["main.js"]) == {"main.js": b"export{a as b};"}
    assert asked == [package]
    (own_cache / "npm" / package.archive).write_bytes(b"half")
    assert read_package(package, ["main.js"]) == {"main.js": b"export{a as b};"}
    assert len(asked) == 2


def test_without_npm_or_network(package, monkeypatch, tmp_path):
    package, _ = package
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(npm.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ClipmatchError, match=r"takes npm, which is not installed.*npm pack @our/thing@1\.2\.3"):
        read_package(package, ["main.js"])
    (tmp_path / "npm").write_text("#!/bin/sh\necho npm error code ENOTFOUND >&2; echo npm error no route >&2; exit 1\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(ClipmatchError, match=r"can't fetch it \(no route\); connect to the network once"):
        read_package(package, ["main.js"])


# Modules


def test_modules_become_one_script():
    modules = {
        "app.js": 'import { one as first, two } from "./a.js";\nimport * as b from "./lib/b.js";\nfirst(two, b.three);',
        "a.js": 'import { three } from "./lib/b.js";\nexport function one() {}\nconst two = three;\nexport { two };',
        "lib/b.js": "export const three = 3;\n",
    }
    script = bundle("app.js", modules.__getitem__)
    assert script.index("// lib/b.js") < script.index("// a.js") < script.index("// app.js")
    assert script.count("// lib/b.js") == 1
    assert "const {one: first, two} = $module1;" in script
    assert "return {one, two};" in script


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ('import "./a.js";', "not understood"),
        ("export default 3;", "not understood"),
        ("export let a = 3;", "not understood"),
        ('const a = await import("./a.js");', "not understood"),
        ("const a = import.meta.url;", "not understood"),
        ('import { a } from "./app.js";', "imports itself"),
    ],
)
def test_modules_of_another_form_are_refused(source, said):
    with pytest.raises(ValueError, match=said):
        bundle("app.js", lambda name: source)


def test_a_library_becomes_a_value():
    value = as_value("var a=1,b=import.meta.url;export{a as A,b};\n//# sourceMappingURL=x")
    assert 'b=""' in value
    assert "return {A: a, b};" in value
    with pytest.raises(ValueError, match="does not end"):
        as_value("var a=1;")


# In a browser


@pytest.fixture(scope="module")
def small_page(index, libraries, tmp_path_factory):
    """A gallery whose page is but the backend, as `backend` of the window."""
    web = tmp_path_factory.mktemp("web")
    for name in ("offline.js", "ranking.js"):
        shutil.copy(album.WEB / name, web)
    (web / "index.html").write_text(
        '<head><link rel="icon" href="data:,"></head><script type="module" src="app.js"></script>'
    )
    (web / "style.css").write_text("")
    (web / "app.js").write_text('import { backend } from "./backend.js";\nwindow.backend = backend;\n')
    folder = tmp_path_factory.mktemp("small") / "a gallery"  # a blank in the name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(album, "WEB", web)
        export_gallery(index, folder, runtime=libraries, progress=False)
    return folder


@pytest.fixture(scope="module")
def served():
    """A function: a folder -> the address where a plain static server has it."""
    servers = []

    def serve(folder):
        handler = functools.partial(QuietHandler, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/index.html"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("CLIPMATCH_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        if os.environ.get("CLIPMATCH_BROWSER") == "required":
            pytest.fail("no Chromium is installed")
        pytest.skip("no Chromium is installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    playwright.expect.set_options(timeout=30_000)  # other tests may keep the cores busy
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


def opened(browser, address):
    """A page, and the lists of what it asks for and of what goes wrong in it."""
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(address)
    return page, asked, wrong


# not wait_for_function, which evaluates texts, as the page's policy forbids
READY = "async () => { while (!window.backend) await new Promise((go) => setTimeout(go, 20)); }"


def ask(page, method, request):
    page.evaluate(READY)
    return page.evaluate("([method, request]) => backend[method](request)", [method, request])


@pytest.fixture(scope="module", params=["file", "http"])
def page(request, small_page, browser, served):
    """The small page, opened from the disk and from a server."""
    address = small_page.joinpath("index.html").as_uri() if request.param == "file" else served(small_page)
    page, asked, wrong = opened(browser, address)
    yield page
    assert wrong == []
    assert [url for url in asked if not url.startswith((address.removesuffix("index.html"), "data:", "blob:"))] == []
    page.close()


def test_it_answers_as_the_index_does(page, index):
    assert ask(page, "status", None)["photos"] == len(index)
    for query in QUERIES:
        expected = index.find(query, top_k=5)
        found = ask(page, "search", {"query": query, "size": 5})
        assert (found["searched"], found["vetoed"], found["more"]) == (len(index), 0, True)
        names = [match.path.name for match in expected]
        assert found["matches"][0]["name"] == names[0], query
        assert len({match["name"] for match in found["matches"]} & set(names)) >= 4, query
        best = found["matches"][0]
        assert best["score"] == pytest.approx(expected[0].score, abs=0.02)
        assert best["confidence"] == pytest.approx(expected[0].confidence, abs=0.08)
        assert best["duplicates"] == len(expected[0].duplicates)


def test_pages_filters_and_thresholds(page, index):
    whole = ask(page, "search", {"query": "a cat", "size": 50})
    assert not whole["more"]
    parts = [ask(page, "search", {"query": "a cat", "size": 4, "page": number})["matches"] for number in (1, 2)]
    assert [match["id"] for part in parts for match in part] == [match["id"] for match in whole["matches"][:8]]
    sure = ask(page, "search", {"query": "a cat", "minConfidence": 0.5})
    expected = index.find("a cat", min_confidence=0.5)
    assert [match["name"] for match in sure["matches"]] == [match.path.name for match in expected]
    assert len(expected) == 1
    none = ask(page, "search", {"query": "a submarine", "minConfidence": 0.99})
    assert none["matches"] == []
    assert none["best"]["confidence"] < 0.99
    dated = ask(page, "search", {"query": "a cat", "where": {"after": "2023-06", "before": "2024"}})
    assert [match["name"] for match in dated["matches"]] == ["IMG_1.jpg"]
    assert dated["searched"] == 1
    captioned = ask(page, "search", {"query": "", "where": {"hasCaption": True}})
    assert [match["caption"] for match in captioned["matches"]] == ["Breakfast <b>in Rome</b>"]
    assert ask(page, "search", {"query": "a cat", "where": {"after": "2030"}})["matches"] == []


def test_newest_first(page, index):
    found = ask(page, "browse", {"size": 100})
    assert len(found["matches"]) == len(index)
    assert found["matches"][0]["name"] == "IMG_1.jpg"
    assert {match["score"] for match in found["matches"]} == {None}


def test_what_is_like_a_photograph(page, index):
    first = ask(page, "search", {"query": "coins", "size": 1})["matches"][0]
    found = ask(page, "search", {"like": first["id"], "size": 3})["matches"]
    path = next(photo.path for photo in index if photo.path.name == first["name"])
    expected = index.find(path, top_k=3)
    assert [match["name"] for match in found] == [match.path.name for match in expected]
    assert [match["score"] for match in found] == pytest.approx([match.score for match in expected], abs=0.01)
    assert found[0]["confidence"] is None


def test_missing_data_is_said_in_a_sentence(small_page, browser, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(small_page, broken)
    (broken / "data" / "model.js").unlink()
    page, _, _ = opened(browser, (broken / "index.html").as_uri())
    page.evaluate(READY)
    said = page.evaluate("backend.search({query: 'a cat'}).catch((error) => error.message)")
    assert said == "The file data/model.js can't be read; copy the gallery's folder again."
    page.close()


@pytest.mark.parametrize("query", [None, "a photo"])
def test_ticks_and_crosses_refine_as_they_do_in_the_index(page, index, query):
    known = {match["name"]: match["id"] for match in ask(page, "browse", {"size": 100})["matches"]}
    paths = {photo.path.name: photo.path for photo in index}
    liked, disliked = ["coins.png", "brick.png"], ["moon.png"]
    asked = parse_query(query) if query else None
    marked = [[paths[name] for name in names] for names in (liked, disliked)]
    expected = {match.path.name: match.score for match in index.refine(asked, *marked, Request(top_k=20))}
    marks = {"liked": [known[name] for name in liked], "disliked": [known[name] for name in disliked]}
    found = ask(page, "search", {"query": query or "", **marks, "size": 20})
    scores = {match["name"]: match["score"] for match in found["matches"]}
    assert scores == pytest.approx(expected, abs=0.02)
    assert list(scores)[:6] == list(expected)[:6]
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert found["matches"][0]["confidence"] is None
    said = page.evaluate("backend.search({disliked: [1]}).catch((error) => error.message)")
    assert said == "Crosses alone say nothing; tick what you are looking for."


def test_a_sentence_and_a_photograph_at_once(page, index):
    known = {match["name"]: match["id"] for match in ask(page, "browse", {"size": 100})["matches"]}
    path = next(photo.path for photo in index if photo.path.name == "coins.png")
    expected = index.find(["a cat", path], top_k=3)
    found = ask(page, "search", {"query": "a cat", "like": known["coins.png"], "size": 3})
    assert [match["name"] for match in found["matches"]] == [match.path.name for match in expected]
    assert [match["score"] for match in found["matches"]] == pytest.approx([m.score for m in expected], abs=0.1)


def test_the_page_searches_when_it_is_opened_as_a_file(folder, browser, index):
    from playwright.sync_api import expect

    address = (folder / "index.html").as_uri()
    page, asked, wrong = opened(browser, address)
    first = page.locator(".tile").first
    expect(first).to_have_attribute("aria-label", re.compile("Breakfast"))  # the newest
    page.fill("#query", "a cup of coffee")
    page.press("#query", "Enter")
    best = index.find("a cup of coffee", top_k=1)[0].path.name
    expect(first).to_have_attribute("aria-label", re.compile(best))
    expect(first.locator(".sure")).to_have_count(1)
    page.locator("#filter").click()
    expect(page.locator("#filters")).to_contain_text("Has a caption")
    expect(page.locator("#filters")).not_to_contain_text("Camera")  # which is not in a gallery
    page.keyboard.press("Escape")
    expect(page.locator("#pick")).to_be_hidden()
    if place := os.environ.get("CLIPMATCH_SCREENSHOTS"):
        page.wait_for_timeout(400)
        page.screenshot(path=f"{place}/gallery.png")
    first.hover()
    first.locator("[data-act=like]").click()
    expect(page.locator("#summary")).to_contain_text("Refined by 1 tick")
    first.locator("img").click()
    expect(page.locator("#viewer img[src*='full/']").first).to_be_visible()
    assert wrong == []
    assert [url for url in asked if not url.startswith((address.removesuffix("index.html"), "data:", "blob:"))] == []
    page.close()
