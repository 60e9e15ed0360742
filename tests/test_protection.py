"""What a server that others can reach does not do: show other files, tell of this computer, be worn out."""

import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from album import serving
from click.testing import CliRunner
from fastapi.testclient import TestClient
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.requests import Request

from clipmatch import decoder, limits
from clipmatch.cli import main
from clipmatch.decoder import Decoders
from clipmatch.desk import WAITING
from clipmatch.exposure import Exposure
from clipmatch.index import Index
from clipmatch.leave import give, given
from clipmatch.limits import Rates, client_of
from clipmatch.preprocess import MAX_PIXELS, ImageError
from clipmatch.renditions import FULL, THUMB, draw
from clipmatch.server import make_app
from clipmatch.store import Root

HOME = "http://127.0.0.1:8765"
TOKEN = {"Authorization": "Bearer s3cret-s3cret"}
SECRET = (100, 100, 100)  # the colour of what nobody may see


def paint(path, colour, size=(24, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def shared(tmp_path, embedded):
    """A folder with two pictures and its index; beside it a picture that is secret."""
    folder = tmp_path / "shared"
    paint(folder / "a.png", (200, 0, 0))
    paint(folder / "sub" / "b.png", (0, 0, 200))
    for name in ("b.png", "secret.png"):
        paint(tmp_path / "private" / name, SECRET)
    with Index.open(tmp_path / "shared.sqlite", embedded) as index:
        index.update([folder], progress=False)
    return folder


@pytest.fixture
def client(shared, embedded):
    with TestClient(make_app(shared.with_suffix(".sqlite"), embedded), base_url=HOME) as client:
        yield client


def number(client, name):
    found = {photo["name"]: photo["id"] for photo in client.post("/api/browse", json={}).json()["matches"]}
    return found[name]


def colour(data):
    """Of a picture, to the next fifty."""
    return tuple(50 * round(value / 50) for value in Image.open(io.BytesIO(data)).convert("RGB").getpixel((5, 5)))


def shown(client, name):
    """What both pictures of a photograph show: about which colours, or None where they are refused."""
    found = []
    for kind in ("thumb", "full"):
        answer = client.get(f"/api/photos/{number(client, name)}/{kind}")
        assert answer.status_code in (200, 404), answer.text
        ok = answer.status_code == 200
        found.append(colour(answer.content) if ok else None)
    return found


# Only photographs below the folders that were indexed


def test_a_link_out_of_the_folder_is_not_followed(client, shared, tmp_path):
    (shared / "a.png").unlink()
    (shared / "a.png").symlink_to(tmp_path / "private" / "b.png")
    assert shown(client, "a.png") == [None, None]
    detail = client.get(f"/api/photos/{number(client, 'a.png')}/full").json()["detail"]
    assert "link that leads out of the indexed folder" in detail
    why = client.post("/api/explain", json={"id": number(client, "a.png"), "query": "red"})
    assert why.status_code == 404
    (shared / "a.png").unlink()
    (shared / "a.png").symlink_to(shared / "sub" / "b.png")  # within it a link is a file like any other
    assert shown(client, "a.png")[1] == (0, 0, 200)


def test_a_folder_that_becomes_a_link(client, shared, tmp_path):
    shutil.rmtree(shared / "sub")
    (shared / "sub").symlink_to(tmp_path / "private")
    assert shown(client, "b.png") == [None, None]


def test_links_that_were_indexed_by_wish_are_followed(shared, embedded, tmp_path):
    (shared / "more").symlink_to(tmp_path / "private")
    with Index.open(shared.with_suffix(".sqlite"), embedded) as index:
        index.update([shared], follow_links=True, progress=False)
        assert any(photo.path.parent.name == "more" for photo in index)
    with TestClient(make_app(shared.with_suffix(".sqlite"), embedded), base_url=HOME) as client:
        assert shown(client, "secret.png") == [SECRET, SECRET]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_in_the_place_of_a_file_does_not_wait(client, shared):
    (shared / "a.png").unlink()
    os.mkfifo(shared / "a.png")
    began = time.monotonic()
    assert shown(client, "a.png") == [None, None]
    assert time.monotonic() - began < 5


def test_a_race_for_what_is_opened_is_not_won(client, shared, tmp_path):
    """The file is swapped for a link and back all the time, while it is asked for."""
    name, over = number(client, "a.png"), threading.Event()
    shutil.copy(shared / "a.png", tmp_path / "kept.png")

    def swap():
        for turn in range(100_000):
            if over.is_set():
                return
            with contextlib.suppress(OSError):
                draft = shared / "draft"
                if turn % 2:
                    shutil.copy(tmp_path / "kept.png", draft)
                else:
                    draft.symlink_to(tmp_path / "private" / "b.png")
                draft.replace(shared / "a.png")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        seen = set()
        for _ in range(150):
            answer = client.get(f"/api/photos/{name}/full")
            seen.add(answer.status_code)
            if answer.status_code == 200:
                assert colour(answer.content) == (200, 0, 0)
    finally:
        over.set()
        thread.join()
    assert seen == {200, 404}


@pytest.mark.parametrize("path", ["/etc/passwd", "{folder}/../private/b.png", "{private}/b.png", "/proc/self/environ"])
def test_paths_that_somebody_has_put_into_an_index(shared, embedded, tmp_path, path):
    path = path.format(folder=shared, private=tmp_path / "private")
    with sqlite3.connect(shared.with_suffix(".sqlite")) as database:
        database.execute("UPDATE photos SET path = ? WHERE name = 'a.png'", (os.fsencode(path),))
    database.close()
    with TestClient(make_app(shared.with_suffix(".sqlite"), embedded), base_url=HOME) as client:
        assert shown(client, Path(path).name) == [None, None] or Path(path).name == "b.png"
        listed = client.post("/api/browse", json={}).json()["matches"]
        (odd,) = [photo for photo in listed if photo["path"] == path]
        for kind in ("thumb", "full"):
            assert client.get(f"/api/photos/{odd['id']}/{kind}").status_code == 404
        assert client.post("/api/concepts", json={"name": "odd", "liked": [odd["id"]]}).status_code == 404


def serve(*arguments, data):
    """What `clipmatch serve` would serve and says on stderr, as a person whose data lie in a folder."""
    import uvicorn

    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(data))
        patch.setattr(uvicorn.Server, "run", lambda self, sockets: started.append(self.config.app))
        result = CliRunner().invoke(main, ["serve", "--port", "0", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        with TestClient(started[0], base_url=HOME, headers=TOKEN) as client:
            return shown(client, "a.png"), result.stderr


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="a person's data have another place there")
def test_an_index_of_somebody_else_shows_nothing_without_leave(shared, tmp_path):
    index, mine = ("--index", shared.with_suffix(".sqlite")), Path(os.environ["XDG_DATA_HOME"])
    assert serve(*index, data=mine)[1] == ""
    nothing, said = serve(*index, data=tmp_path / "other")
    assert nothing == [None, None]
    assert f"{shared} was not indexed here, so its files are not shown.\nTo show them: --show {shared}\n" == said
    assert serve(*index, "--show", shared, data=tmp_path / "other") == ([(200, 0, 0)] * 2, "")
    assert serve(*index, "--show", shared.parent, data=tmp_path / "other")[1] == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))
        result = CliRunner().invoke(main, ["index", str(shared), "--index", str(index[1])])
        assert result.exit_code == 0, result.output
    assert serve(*index, data=tmp_path / "other")[1] == ""  # whoever indexes it may see it


# What others learn of this computer


def test_others_see_neither_places_nor_folders(album, embedded):
    """EXIF data, where this computer keeps things: who has the token gets them only with leave."""
    app = make_app(album.index, embedded, "s3cret-s3cret", exposure=Exposure(originals=False))
    with TestClient(app, base_url="http://nas", headers=TOKEN) as client:
        status = client.get("/api/status").json()
        assert status["folders"] == [album.folder.name]
        where = {"folder": album.folder.name, "has_caption": True}
        (photo,) = client.post("/api/browse", json={"where": where}).json()["matches"]
        assert photo["path"] == f"{album.folder.name}/trip/IMG_1.jpg"
        full = client.get(f"/api/photos/{photo['id']}/full")
        assert full.content != (album.folder / "trip" / "IMG_1.jpg").read_bytes()
        for kind in ("thumb", "full"):
            data = client.get(f"/api/photos/{photo['id']}/{kind}").content
            picture = Image.open(io.BytesIO(data))
            assert picture.size in ((600, 400), (400, 600))
            assert not picture.getexif()
            for trace in (b"Exif", b"Pentax", b"2023:06:15", b"http://ns.adobe.com"):
                assert trace not in data
        texts = [client.get(path).text for path in ("/api/status", "/api/duplicates", "/api/statistics", "/docs")]
        texts += [client.post("/api/search", json={"query": words}).text for words in ("a cat", "@nobody", "")]
        texts += [client.get("/api/photos/999").text, client.post("/api/search", json={"liked": [999]}).text]
        assert not any(str(album.folder.parent) in text for text in texts)
    with TestClient(make_app(album.index, embedded), base_url=HOME) as client:
        assert client.get("/api/status").json()["folders"] == [str(album.folder)]


@pytest.mark.parametrize("path", ["/home/ann/My Pictures/a b.sqlite", "C:\\Users\\Ann Smith\\AppData\\a.sqlite"])
def test_sentences_that_name_folders_are_not_for_others(path, capsys):
    said = f"The index {path} can't be used now (disk I/O error)."
    assert Exposure().told(said) == said
    told = Exposure(originals=False).told(said)
    assert "why is said on the computer that clipmatch runs on" in told
    assert not any(word in told for word in ("ann", "Smith", "Pictures", "AppData", "sqlite"))
    assert said in capsys.readouterr().err


def test_other_sentences_stay():
    assert Exposure(originals=False).told("and/or; 3/4; see https://example.org/a/b") == (
        "and/or; 3/4; see https://example.org/a/b"
    )


# Pictures of strangers


@pytest.fixture
def decoders():
    decoders = Decoders()
    yield decoders
    decoders.close()


def png(size, colour="red"):
    buffer = io.BytesIO()
    Image.new("1" if isinstance(colour, int) else "RGB", size, colour).save(buffer, "png")
    return buffer.getvalue()


def send(client, data, name="x.png"):
    form = {"files": {"image": (name, data)}, "data": {"question": "{}"}}
    return client.post("/api/search-image", headers={"X-Clipmatch": "1"}, **form)


def test_a_picture_of_too_many_pixels(client):
    bomb = png((20_000, 10_001), 1)  # 45 kB of file
    assert len(bomb) < 50_000
    assert "200 million" in send(client, bomb).json()["detail"]
    assert "64 million" in send(client, png((9000, 8000), 1)).json()["detail"]
    assert send(client, png((200, 100))).status_code == 200


def test_a_decoder_that_hangs_or_dies_takes_nothing_with_it(decoders, monkeypatch):
    monkeypatch.setattr(decoder, "PATIENCE", 0.7)
    first = decoders.read(Path("a.png"), None, png((8, 6)))
    assert (first.size, first.getpixel((0, 0))) == ((8, 6), (255, 0, 0))
    for name, said in (("SIGSTOP", "takes more than"), ("SIGKILL", "has crashed")):
        for one in decoders._all:
            if one._process is not None and one._process.poll() is None:
                os.kill(one._process.pid, getattr(signal, name))
        reasons = []
        for _ in decoders._all:
            try:
                decoders.read(Path("a.png"), None, png((8, 6)))
            except ImageError as error:
                reasons.append(error.reason)
        if name == "SIGSTOP":
            assert [said in reason for reason in reasons] == [True]
        monkeypatch.setattr(decoder, "PATIENCE", 20)
        assert decoders.draw(Path("a.png"), FULL, png((8, 6)))[:2] == b"\xff\xd8"


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of a process are Linux's")
def test_a_decoder_can_neither_write_nor_take_all_memory():
    tried = """
import sys
from clipmatch.decoder import confine
confine()
try:
    bytearray(5 << 30)
except MemoryError:
    print("no memory")
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with open(sys.argv[1], "wb", buffering=0) as file:
        file.write(b"x")
except OSError:
    print("no file")
"""
    command = [sys.executable, "-c", tried, os.devnull + "x" if os.geteuid() else "/tmp/clipmatch-none"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["no memory", "no file"]


# Wearing it out


def test_guessing_the_token_is_slow(shared, embedded):
    app = make_app(shared.with_suffix(".sqlite"), embedded, "s3cret-s3cret")
    with TestClient(app, base_url="http://nas") as client:
        assert [client.get("/api/status").status_code for _ in range(30)] == [401] * 30  # that is no guess
        guesses = [client.get(f"/?token={guess}").status_code for guess in range(25)]
        assert guesses == [401] * 20 + [429] * 5
        late = client.get("/api/status", headers=TOKEN)  # who has guessed learns nothing even when right
        assert (late.status_code, late.headers["retry-after"]) == (429, "3")
    with TestClient(
        make_app(shared.with_suffix(".sqlite"), embedded, "s3cret-s3cret"), base_url="http://nas"
    ) as client:
        at_once = {"Authorization": "Bearer a", "Cookie": "clipmatch_token=b"}
        assert [client.get("/?token=c", headers=at_once).status_code for _ in range(8)] == [401] * 7 + [429]


def test_the_limits_are_those_that_are_said():
    said = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")
    for sentence in (
        f"{limits.RATE:.0f} a second, {limits.BURST:,.0f} at once",
        f"{limits.WRONG_BURST:.0f} at once, then one in {1 / limits.WRONG_RATE:.0f} seconds",
        f"{limits.HEAD_SECONDS:.0f} s, {limits.BODY_SECONDS:.0f} s, {limits.SEND_SECONDS:.0f} s",
        f"{limits.QUESTION >> 20} MB; {limits.LARGEST >> 20} MB; {limits.IN_FLIGHT >> 20} MB",
        f"| connections | {limits.CONNECTIONS} |",
        f"| questions or pictures that wait | {WAITING} |",
        f"{decoder.SENT // 1_000_000} million; {MAX_PIXELS // 1_000_000} million",
        f"{decoder.PATIENCE:.0f} s, {decoder.MEMORY >> 30} GB of addresses",
    ):
        assert sentence in said


def test_rates():
    rates = Rates(rate=1000, burst=3)
    for _ in range(3):
        assert rates.wait("a") == 0
        rates.count("a")
    assert 0 < rates.wait("a") <= 0.001
    assert rates.wait("b") == 0
    time.sleep(0.002)
    assert rates.wait("a") == 0


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 500_000,
        b'{"query":' * 100_000,
        b'{"like": ' + b"9" * 100_000 + b"}",
        b'{"like": 1e400}',
        b'{"min_confidence": NaN}',
        b'{"query": "' + b"a" * 900_000 + b'"}',
        b'{"liked": [' + b"1," * 400_000 + b"1]}",
        b'{"query": "a\\u0000b", "hybrid": true}',
        b"\x00" * 1000,
        b"",
    ],
)
def test_bodies_that_are_meant_to_hurt(client, body):
    began = time.monotonic()
    answer = client.post("/api/search", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404, 422)
    assert time.monotonic() - began < 3
    form = {"files": {"image": ("x.png", png((8, 6)))}, "data": {"question": body[:200_000].decode()}}
    answer = client.post("/api/search-image", headers={"X-Clipmatch": "1"}, **form)
    assert answer.status_code in (200, 400, 404, 422)


def test_origins_that_are_no_addresses(client):
    for origin in ("http://[", "http://[::1", "null", "", "file://", "http://127.0.0.1:8765.evil.example", "//"):
        assert client.post("/api/browse", json={}, headers={"Origin": origin}).status_code == 403


@contextlib.contextmanager
def connection(address):
    place = urlsplit(address)
    with contextlib.closing(socket.create_connection((place.hostname, place.port), timeout=5)) as made:
        yield made


def test_whoever_is_slow_is_let_go(shared, embedded, monkeypatch):
    monkeypatch.setattr("clipmatch.limits.HEAD_SECONDS", 0.4)
    monkeypatch.setattr("clipmatch.limits.BODY_SECONDS", 0.4)
    with serving(shared.with_suffix(".sqlite"), embedded) as address:
        host = urlsplit(address).netloc
        with connection(address) as silent, connection(address) as dripping:
            for letter in b"GET /api/st":
                with contextlib.suppress(OSError):
                    dripping.send(bytes([letter]))
                time.sleep(0.06)
            assert silent.recv(100) == b""
            with contextlib.suppress(ConnectionResetError):
                assert dripping.recv(100) == b""
        with connection(address) as lasting:
            kind = "Content-Type: application/json\r\nContent-Length: 9"
            lasting.send(f'POST /api/browse HTTP/1.1\r\nHost: {host}\r\n{kind}\r\n\r\n{{"si'.encode())
            assert b" 400 " in lasting.recv(1000).split(b"\r\n")[0]
        asked = http.client.HTTPConnection(host)
        for _ in range(2):  # on one connection, with a pause
            asked.request("GET", "/api/status")
            assert json.loads(asked.getresponse().read())["photos"] == 2
            time.sleep(0.5)
        asked.close()


def test_too_many_questions_at_once(shared, embedded, monkeypatch):
    monkeypatch.setattr("clipmatch.desk.WAITING", 1)
    ask, begun, over = Index.duplicates, threading.Event(), threading.Event()

    def slow(self):
        begun.set()
        over.wait(10)
        return ask(self)

    monkeypatch.setattr(Index, "duplicates", slow)
    with serving(shared.with_suffix(".sqlite"), embedded) as address:
        host, found = urlsplit(address).netloc, []

        def get(path):
            made = http.client.HTTPConnection(host)
            made.request("GET", path)
            found.append((path, made.getresponse().status))
            made.close()

        first = threading.Thread(target=get, args=("/api/duplicates",))
        first.start()
        begun.wait(5)
        get("/api/statistics")
        get("/api/status")  # has a thread of its own
        over.set()
        first.join()
    assert found == [("/api/statistics", 503), ("/api/status", 200), ("/api/duplicates", 200)]


def test_the_end_is_orderly(shared, tmp_path):
    """SIGTERM: what is under way is answered, nothing more is taken, no process stays behind."""
    command = [sys.executable, "-m", "clipmatch.cli", "serve", "--port", "0", "--index", shared.with_suffix(".sqlite")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        host = urlsplit(process.stdout.readline().split()[-1]).netloc
        asked = http.client.HTTPConnection(host, timeout=20)
        asked.request("GET", "/api/photos/1/thumb")
        assert asked.getresponse().read()[:4] == b"RIFF"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        below = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        body = json.dumps({"id": 1, "query": "a red thing of one colour"})
        asked.request("POST", "/api/explain", body, {"Content-Type": "application/json"})
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert asked.getresponse().status == 200
        _, errors = process.communicate(timeout=20)
    assert process.returncode in (0, -signal.SIGTERM)
    assert errors == ""
    with pytest.raises(OSError, match="refused"):
        http.client.HTTPConnection(host, timeout=5).connect()
    for pid in below:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(("signals", "most"), [(1, 6), (2, 3)])
def test_the_end_does_not_wait_for_a_long_question(shared, signals, most):
    """Three seconds and a little; after a second Ctrl-C none."""
    slow = "import time, clipmatch.index; clipmatch.index.Index.duplicates = lambda self: time.sleep(60)"
    code = f"{slow}; from clipmatch.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--index", shared.with_suffix(".sqlite")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        host = urlsplit(process.stdout.readline().split()[-1]).netloc
        asked = http.client.HTTPConnection(host, timeout=20)
        asked.request("GET", "/api/photos/1/thumb")
        asked.getresponse().read()
        asked.request("GET", "/api/duplicates")
        time.sleep(0.5)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        below = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        start = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        _, errors = process.communicate(timeout=20)
        took = time.monotonic() - start
    assert (process.returncode, took < most) == (0, True), took
    assert "Traceback" not in errors
    for pid in below:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_decoders_take_no_modules_from_where_the_server_is_started(tmp_path, monkeypatch):
    for name in ("numpy", "PIL", "queue"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    decoders = Decoders()
    try:
        assert decoders.read(Path("a.png"), None, png((3, 2), 1)).size == (3, 2)
    finally:
        decoders.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_what_is_drawn_anew_has_no_comments(form):
    buffer = io.BytesIO()
    image = Image.new("RGB", (40, 30), "red")
    if form == "JPEG":
        image.save(buffer, form, comment=b"Ann's cellar")
    else:
        chunks = PngInfo()
        chunks.add_text("comment", "Ann's cellar")
        image.save(buffer, form, pnginfo=chunks)
    assert b"cellar" in buffer.getvalue()
    for kind in (FULL, THUMB):
        assert b"cellar" not in draw(Path(f"a.{form.lower()}"), kind, buffer.getvalue())


def test_folders_of_the_same_name_are_told_apart():
    view = Exposure(originals=False).of([Root(Path("/a/Pictures")), Root(Path("/b/Pictures"))])
    assert view.folders() == {"Pictures": Path("/a/Pictures"), "Pictures (2)": Path("/b/Pictures")}
    assert view.named(Path("/b/Pictures/x/y.jpg")) == "Pictures (2)/x/y.jpg"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1:2:3:4", "2001:db8::9:2:3:4", True),
        ("fe80::5%eth0", "fe80::6%eth0", True),
        ("2001:db8:0:1::5", "2001:db8:0:2::5", False),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("10.0.0.1", "10.0.0.2", False),
    ],
)
def test_a_client_is_an_address_or_a_network_of_ipv6(one, other, same):
    first, second = (client_of(Request({"type": "http", "client": (host, 1)})) for host in (one, other))
    assert (first == second) == same


def test_leave_is_for_an_index_however_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "sub").mkdir()
    give(tmp_path / "sub" / ".." / "photos.sqlite", [tmp_path / "photos"])
    assert given(tmp_path / "photos.sqlite") == {tmp_path / "photos"}
