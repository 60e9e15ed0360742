"""The server: every endpoint with the real model, who may ask it, and what it says when something is wrong."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from album import HOSTILE, HOSTILE_CAPTION
from click.testing import CliRunner
from fastapi.testclient import TestClient
from PIL import Image

from clipmatch.cli import main
from clipmatch.errors import ClipmatchError
from clipmatch.index import Index
from clipmatch.limits import LARGEST, QUESTION
from clipmatch.server import make_app
from clipmatch.studio import Studio
from clipmatch.wire import PaintQuestion

HOME = "http://127.0.0.1:8765"
SEARCHED = 10


@pytest.fixture(scope="module")
def client(album, embedded):
    with TestClient(make_app(album.index, embedded), base_url=HOME) as client:
        yield client


@pytest.fixture
def own(album, embedded, tmp_path):
    """A client of an index that the test may change, and that index's album."""
    copy = album.copy(tmp_path)
    with TestClient(make_app(copy.index, embedded), base_url=HOME) as client:
        yield client, copy


def search(client, query="", **more):
    answer = client.post("/api/search", json={"query": query, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def names(answer):
    return [match["name"] for match in answer["matches"]]


def numbers(client):
    """The numbers of the photographs, by name."""
    return {photo["name"]: photo["id"] for photo in client.post("/api/browse", json={}).json()["matches"]}


def sentence(answer, status):
    """The one sentence with which something is refused."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"detail"}
    return answer.json()["detail"]


def picture(answer):
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content))


# Asking


def test_status(client, album):
    assert client.get("/api/status").json() == {
        "photos": SEARCHED,
        "paints": False,
        "model": "the one that comes with clipmatch",
        "calibrated": True,
        "folders": [str(album.folder)],
    }


def test_a_sentence(client):
    answer = search(client, "a cat", size=3)
    first = answer["matches"][0]
    assert first["name"] in ("chelsea.png", "chelsea_small.jpg")
    assert first["confidence"] > 0.5
    assert first["duplicates"] == 1
    assert (answer["searched"], answer["vetoed"], answer["more"], answer["best"]) == (SEARCHED, 0, True, None)
    assert len(answer["matches"]) == 3


def test_the_same_as_the_index_finds(client, album, embedded):
    with Index.open(album.index, embedded) as index:
        found = index.find("a motorcycle", top_k=5)
        assert names(search(client, "a motorcycle", size=5)) == [match.path.name for match in found]


def test_pages_follow_each_other(client):
    first, second = (search(client, "a cat", size=5, page=page) for page in (1, 2))
    assert len(set(names(first) + names(second))) == 9  # one of ten is stacked below another
    assert not search(client, "a cat", size=5, page=3)["more"]


def test_a_sentence_is_never_the_name_of_a_file(client, album, monkeypatch):
    monkeypatch.chdir(album.folder)
    for text in ("chelsea.png", str(album.folder / "chelsea.png")):
        assert search(client, text)["matches"][0]["confidence"] is not None  # an example would have none


def test_what_is_like_a_photograph(client):
    number = numbers(client)["chelsea.png"]
    for answer in (search(client, like=number), client.get(f"/api/photos/{number}/similar").json()):
        assert answer["matches"][0]["name"] in ("chelsea.png", "chelsea_small.jpg")
        assert answer["matches"][0]["confidence"] is None


def test_a_picture_that_is_sent(client, album):
    data = (album.folder / "chelsea_small.jpg").read_bytes()
    answer = client.post(
        "/api/search-image",
        files={"image": ("../../x.jpg", data, "image/jpeg")},
        data={"question": json.dumps({"size": 2})},
        headers={"X-Clipmatch": "1"},
    )
    assert answer.status_code == 200, answer.text
    assert names(answer.json())[0] in ("chelsea.png", "chelsea_small.jpg")


def test_a_picture_that_is_none(client):
    def send(data, question="{}"):
        form = {"files": {"image": ("x.jpg", data, "image/jpeg")}, "data": {"question": question}}
        return client.post("/api/search-image", headers={"X-Clipmatch": "1"}, **form)

    assert "can't be read" in sentence(send(b"<html>"), 400)
    assert "JSON" in sentence(send(b"", "{"), 422)
    assert "pages" in sentence(send(b"", '{"pages": 2}'), 422)


def test_filters(client, album):
    def found(**where):
        return names(search(client, "a cat", where=where))

    for where in (
        {"camera": "pentax"},
        {"after": "2023-06-01", "before": "2023-07-01", "has_caption": True},
        {"min_side": 399, "has_caption": True},
        {"has_caption": True, "folder": str(album.folder)},
    ):
        assert found(**where) == ["IMG_1.jpg"]
    assert found(after="2090-01-01") == []
    assert len(client.post("/api/browse", json={"where": {"camera": "k-5"}}).json()["matches"]) == 1


def test_leaving_out_and_asking_for_confidence(client):
    answer = search(client, "a vehicle", exclude=["a motorcycle"])
    assert "motorcycle_left.png" not in names(answer)
    assert answer["vetoed"] > 0
    none = search(client, "a submarine in the deep sea", min_confidence=0.99)
    assert (none["matches"], none["searched"]) == ([], SEARCHED)
    assert none["best"]["confidence"] < 0.99


def test_words_of_captions_can_count(client):
    assert names(search(client, "zermatt", hybrid=True, size=1)) == ["IMG_1.jpg"]


def test_all_photographs_the_newest_first(client):
    answer = client.post("/api/browse", json={"size": 9}).json()
    assert (len(answer["matches"]), answer["searched"], answer["more"]) == (9, SEARCHED, True)
    last = client.post("/api/browse", json={"size": 9, "page": 2}).json()
    assert names(last) == ["IMG_1.jpg"]  # taken in 2023; of the others the files' own age counts
    assert not last["more"]
    shown = last["matches"][0]
    assert (shown["taken"], shown["camera"], shown["score"]) == ("2023-06-15T12:30:00", "Pentax K-5", None)
    assert (shown["width"], shown["height"]) == (600, 400)  # upright
    assert shown["caption"] == HOSTILE_CAPTION


def test_ticks_and_crosses(client):
    known = numbers(client)
    liked, disliked = known["rocket.jpg"], known["chelsea.png"]
    first = names(search(client, liked=[liked]))
    assert first[0] == "rocket.jpg"
    refined = names(search(client, "a cat", liked=[liked], disliked=[disliked]))
    assert refined.index("rocket.jpg") < names(search(client, "a cat")).index("rocket.jpg")


def test_concepts(own):
    client, _ = own
    known = numbers(client)
    assert client.get("/api/concepts").json() == []
    lesson = {"name": "@mieze", "liked": [known["chelsea.png"], known["chelsea_small.jpg"]]}
    made = client.post("/api/concepts", json=lesson)
    assert made.status_code == 201, made.text
    assert (made.json()["name"], made.json()["examples"]) == ("mieze", 2)
    assert client.get("/api/concepts").json() == [made.json()]
    assert picture(client.get("/" + made.json()["cover"])).size == (451, 300)
    assert names(search(client, "@mieze"))[0].startswith("chelsea")
    assert search(client, "@mieze", min_confidence=0.5)["matches"]  # which is for sentences alone
    assert "@nobody" in sentence(client.post("/api/search", json={"query": "@nobody"}), 400)
    assert client.patch("/api/concepts/mieze", json={"name": "cat"}).json()[0]["name"] == "cat"
    assert "mieze" in sentence(client.patch("/api/concepts/mieze", json={"name": "x"}), 400)
    assert client.delete("/api/concepts/cat").status_code == 204
    assert client.get("/api/concepts").json() == []
    assert "least" in sentence(client.post("/api/concepts", json={"name": "x", "liked": []}), 422)


def test_an_explanation(client):
    answer = client.post("/api/explain", json={"id": numbers(client)["chelsea.png"], "query": "a sleepy cat"})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert [word for word, _ in found["words"]] == ["a", "sleepy", "cat"]
    assert max(found["words"], key=lambda pair: pair[1])[0] == "cat"
    assert found["image"].startswith("data:image/jpeg;base64,")
    with urllib.request.urlopen(found["image"]) as file:
        assert Image.open(file).size == (451, 300)


@pytest.fixture
def painting(album, embedded, model_folder, vqgan):
    """A client of a server that paints, by tiny models with random weights."""
    studio = Studio(str(model_folder), str(vqgan))
    with TestClient(make_app(album.index, embedded, studio=studio), base_url=HOME) as client:
        yield client


def paint(client, prompt, **more):
    """What comes of a prompt -> its lines."""
    answer = client.post("/api/paint", json={"prompt": prompt, **more})
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_painting_comes_in_previews(painting, monkeypatch):
    monkeypatch.setattr("clipmatch.studio.PAUSE", 0)
    assert painting.get("/api/status").json()["paints"] is True
    first, *previews, finished = paint(painting, "a red star", steps=5, seed=3)
    assert first == {"step": 0, "steps": 5, "image": None}
    assert [preview["step"] for preview in previews] == [0, 1, 2, 3, 4, 5]
    assert picture_of(previews[-1]["image"]).format == "JPEG"
    made = picture_of(finished["image"])
    assert (made.size, made.text["prompt"], made.text["seed"], finished["seed"]) == ((16, 16), "a red star", "3", 3)
    assert len(finished["nearest"]) == SEARCHED - 1  # two are near-duplicates
    scores = [match["score"] for match in finished["nearest"]]
    assert scores == sorted(scores, reverse=True)
    assert paint(painting, "a red star", steps=5, seed=3)[-1] == finished  # a seed decides all
    assert paint(painting, "a red star", steps=5, seed=4)[-1]["image"] != finished["image"]


def test_a_painting_takes_as_many_steps_as_are_worth_taking(painting, monkeypatch):
    monkeypatch.setattr("clipmatch.studio.PAUSE", 0)
    monkeypatch.setattr("clipmatch.generation.painter.ALONE", 3)
    first, *previews, finished = paint(painting, "a red star")
    assert first["steps"] is None  # before the models are there nobody knows
    assert [(preview["step"], preview["steps"]) for preview in previews] == [(step, 3) for step in range(4)]
    assert picture_of(finished["image"]).text["steps"] == "3"
    assert "0 steps would paint nothing" in paint(painting, "a red star", steps=0)[-1]["detail"]


def picture_of(url):
    """The picture in a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_a_prompt_is_never_the_name_of_a_file(painting, album, monkeypatch):
    monkeypatch.setattr("clipmatch.embedder.read_batches", lambda *_: pytest.fail("a file was read"))
    path = str(album.folder / "rocket.jpg")
    answer = painting.post("/api/paint", json={"prompt": f"{path}:0.5", "steps": 1})
    assert json.loads(answer.text.splitlines()[0])["step"] == 0


def test_what_cannot_be_painted(painting, client, album, embedded, model_folder, tmp_path):
    sentence(client.post("/api/paint", json={"prompt": "a star"}), 404)
    assert "says what not to paint" in sentence(painting.post("/api/paint", json={"prompt": "blur:-1"}), 400)
    sentence(painting.post("/api/paint", json={"prompt": "a star", "steps": -1}), 422)
    studio = Studio(str(model_folder), str(tmp_path / "nothing"))
    with TestClient(make_app(album.index, embedded, studio=studio), base_url=HOME) as other:
        assert "nothing" in paint(other, "a star")[-1]["detail"]


def test_only_so_many_may_wait_for_a_painting(model_folder, vqgan, monkeypatch):
    monkeypatch.setattr("clipmatch.studio.MOST", 2)
    studio = Studio(str(model_folder), str(vqgan))

    async def begin(stack):
        events = await stack.enter_async_context(contextlib.aclosing(studio.paint(PaintQuestion(prompt="a", steps=5))))
        await anext(events)

    async def crowd():
        async with contextlib.AsyncExitStack() as stack:
            await begin(stack)
            await begin(stack)
            with pytest.raises(ClipmatchError, match="2 paintings are under way or waiting already"):
                await begin(stack)
        async with contextlib.AsyncExitStack() as stack:  # those have left
            await begin(stack)

    asyncio.run(crowd())
    studio.close()


def test_painting_stops_when_nobody_waits_for_it(model_folder, vqgan, monkeypatch):
    monkeypatch.setattr("clipmatch.studio.PAUSE", 0)
    studio = Studio(str(model_folder), str(vqgan))

    async def look_once():
        async with contextlib.aclosing(studio.paint(PaintQuestion(prompt="a star", steps=1000))) as events:
            async for event in events:
                if event.image:
                    return

    began = time.monotonic()
    asyncio.run(look_once())
    studio.close()
    assert time.monotonic() - began < 20  # all of it would take minutes


def test_the_end_of_the_server_stops_a_painting(model_folder, vqgan, monkeypatch):
    monkeypatch.setattr("clipmatch.studio.PAUSE", 0)
    studio = Studio(str(model_folder), str(vqgan))

    async def closed_meanwhile():
        events = [event async for event in closing(studio.paint(PaintQuestion(prompt="a star", steps=1000)))]
        return events[-1]

    async def closing(events):
        async for event in events:
            if getattr(event, "image", None):
                began = time.monotonic()
                studio.close()
                assert time.monotonic() - began < 1
            yield event

    began = time.monotonic()
    assert int(asyncio.run(closed_meanwhile()).facts["steps"]) < 1000
    assert time.monotonic() - began < 20
    deadline = time.monotonic() + 5
    while not studio.close():
        assert time.monotonic() < deadline


def test_duplicates_and_statistics(client):
    assert [sorted(photo["name"] for photo in group) for group in client.get("/api/duplicates").json()] == [
        ["chelsea.png", "chelsea_small.jpg"]
    ]
    figures = client.get("/api/statistics").json()
    assert (figures["photos"], figures["captions"], figures["failed"]) == (SEARCHED, 1, 0)
    assert (figures["years"], figures["cameras"]) == ([["2023", 1]], [["Pentax K-5", 1]])
    assert dict(figures["formats"]) == {"png": 6, "jpg": 3, "tiff": 1}


# Pictures


def test_small_pictures_are_made_once_and_upright(client, own_cache):
    photo = client.get(f"/api/photos/{numbers(client)['IMG_1.jpg']}").json()
    answer = client.get("/" + photo["thumb"])
    small = picture(answer)
    assert (small.format, small.size) == ("WEBP", (600, 400))
    assert not small.getexif()
    assert "immutable" in answer.headers["cache-control"]
    kept = list(own_cache.rglob("*.webp"))
    assert len(kept) == 1
    kept[0].write_bytes(b"kept")
    assert client.get("/" + photo["thumb"]).content == b"kept"
    again = client.get("/" + photo["thumb"], headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert "immutable" not in client.get(f"/api/photos/{photo['id']}/thumb").headers["cache-control"]


def test_pictures_that_nobody_looks_at_any_more_are_removed(album, embedded, own_cache):
    """As a server starts; what has been looked at since stays."""
    with TestClient(make_app(album.index, embedded), base_url=HOME) as client:
        first, second = (f"/api/photos/{number}/thumb" for number in list(numbers(client).values())[:2])
        client.get(first)
        (wanted,) = own_cache.rglob("*.webp")
        client.get(second)
        long_ago = time.time() - 100 * 86_400
        for path in own_cache.rglob("*.webp"):
            os.utime(path, (long_ago, long_ago))
        client.get(first)
    assert len(list(own_cache.rglob("*.webp"))) == 2
    with TestClient(make_app(album.index, embedded), base_url=HOME):
        pass
    assert list(own_cache.rglob("*.webp")) == [wanted]


def test_a_large_photograph_becomes_small(tmp_path, embedded):
    folder = tmp_path / "large"
    folder.mkdir()
    Image.new("RGB", (3000, 2000), "teal").save(folder / "large.jpg")
    with Index.open(tmp_path / "large.sqlite", embedded) as index:
        index.update([folder], progress=False)
    with TestClient(make_app(tmp_path / "large.sqlite", embedded), base_url=HOME) as client:
        assert picture(client.get("/api/photos/1/thumb")).size == (720, 480)


def test_the_file_itself_or_a_jpeg_of_it(client, album):
    known = numbers(client)
    answer = client.get(f"/api/photos/{known['IMG_1.jpg']}/full")
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.content == (album.folder / "trip" / "IMG_1.jpg").read_bytes()
    made = picture(client.get(f"/api/photos/{known['coins.tiff']}/full"))
    assert (made.format, made.size) == ("JPEG", (384, 303))


def test_files_that_are_gone_or_changed(own, tmp_path):
    client, album = own
    folder = tmp_path / "more"
    folder.mkdir()
    for name in ("gone.png", "changed.png"):
        shutil.copy(album.folder / "grass.png", folder / name)
    with Index.open(album.index) as index:  # another process: the server sees it
        index.update([folder], progress=False)
    known = numbers(client)
    assert len(known) == SEARCHED + 2
    (folder / "gone.png").unlink()
    (folder / "changed.png").write_text("<script>alert(1)</script>")
    for name in ("gone.png", "changed.png"):
        for kind in ("thumb", "full"):
            said = sentence(client.get(f"/api/photos/{known[name]}/{kind}"), 404)
            assert said.startswith("The photograph can't be shown: ")
    Image.new("RGB", (30, 20), "red").save(folder / "changed.png")
    for kind in ("thumb", "full"):
        answer = client.get(f"/api/photos/{known['changed.png']}/{kind}")
        assert picture(answer).size == (30, 20)
        assert answer.headers["cache-control"] == "no-store"
    with Index.open(album.index) as index:
        index.remove(folder)
    assert "not in the index" in sentence(client.get(f"/api/photos/{known['gone.png']}"), 404)


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fserver.py",
        "/api/photos/..%2f1/full",
        "/api/photos/9999/full",
        "/api/photos/-1/thumb",
        "/api/photos/x/full",
        "/api/photos/99999999999999999999/thumb",
        "/nothing.js",
    ],
)
def test_nothing_but_photographs_of_the_index_is_read(client, path):
    answer = client.get(path)
    assert answer.status_code in (404, 422)
    assert isinstance(answer.json()["detail"], str)


# Who may ask


def test_names_of_other_hosts_are_refused(client):
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8765", "", "[::1", "0.0.0.0"):
        assert "own computer" in sentence(client.get("/api/status", headers={"Host": host}), 403)
        assert client.get("/", headers={"Host": host}).status_code == 403
    for host in ("localhost:8765", "LOCALHOST", "[::1]:8765", "127.0.0.1"):
        assert client.get("/api/status", headers={"Host": host}).status_code == 200


def test_other_pages_are_refused(client):
    question = {"json": {"query": "a cat"}}
    assert client.post("/api/search", headers={"Origin": HOME}, **question).status_code == 200
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert "Other pages" in sentence(client.post("/api/search", headers=headers, **question), 403)
    picture = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert client.get("/api/photos/1/thumb", headers=picture).status_code == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    form = client.post("/api/search-image", files={"image": b"x"}, data={"question": "{}"})
    assert "application/json" in sentence(form, 415)
    assert (
        client.post("/api/search", content=b'{"query": "a cat"}', headers={"Content-Type": "text/plain"}).status_code
        == 415
    )
    assert "access-control-allow-origin" not in client.get("/api/status", headers={"Origin": HOME}).headers


def test_a_token(album, embedded):
    with TestClient(make_app(album.index, embedded, "s3cret"), base_url="http://nas:8765") as client:
        for path in ("/", "/app.js", "/api/status", "/openapi.json", "/?token=wrong", "/?token=é"):
            assert "token" in sentence(client.get(path), 401)
        for value in ("Bearer wrong", "Bearer", "Basic s3cret", "s3cret"):
            assert client.get("/api/status", headers={"Authorization": value}).status_code == 401
        assert client.get("/api/status", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        opened = client.get("/?token=s3cret", follow_redirects=False)
        assert (opened.status_code, opened.headers["location"]) == (303, "./")
        assert {"HttpOnly", "SameSite=lax"} <= set(opened.headers["set-cookie"].split("; "))
        assert client.get("/api/status").status_code == 200  # with the cookie
        assert client.get("/api/status", headers={"Origin": "https://evil.example"}).status_code == 403


def test_what_browsers_are_told(client):
    for path in ("/", "/app.js", "/api/status", "/nothing"):
        headers = client.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert (policy["default-src"], policy["script-src"], policy["frame-ancestors"]) == (
            "'none'",
            "'self'",
            "'none'",
        )
        assert "unsafe" not in headers["content-security-policy"]
        assert policy["require-trusted-types-for"] == "'script'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    assert client.get("/").headers["cache-control"] == "no-cache"


def test_too_large_a_request(client):
    for path, most, said in (("/api/search", QUESTION, "1 MB"), ("/api/search-image", LARGEST, "32 MB")):
        for length in (str(most + 1), "9" * 30):
            headers = {"Content-Type": "application/json", "Content-Length": length}
            assert said in sentence(client.post(path, content=b"{}", headers=headers), 413)
    chunked = client.post("/api/search", content=iter([b"{}"]), headers={"Content-Type": "application/json"})
    assert sentence(chunked, 411)


# Bad questions


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"query": " "}, "empty"),
        ({"querry": "a cat"}, "querry"),
        ({"query": "a cat", "page": 0}, "page"),
        ({"query": "a cat", "size": 100000}, "size"),
        ({"query": "a" * 5000}, "query"),
        ({"query": "a cat", "min_confidence": 2}, "min_confidence"),
        ({"query": "a cat", "where": {"after": "yesterday"}}, "after"),
        ({"query": "a cat", "where": {"folder": "/etc"}}, "/etc"),
        ({"query": "a cat", "where": {"min_size": 1 << 70}}, "min_size"),
        ({"query": "a cat", "where": {"min_side": 1 << 70}}, "min_side"),
        ({"like": 4711}, "4711"),
        ({"liked": [4711]}, "4711"),
        ({"query": 7}, "query"),
        ({"query": "a cat", "page": True}, "page"),
        ({"query": "a cat", "size": "9"}, "size"),
        ({"query": "a cat", "min_confidence": "0.5"}, "min_confidence"),
        ({"query": "a cat", "hybrid": "yes"}, "hybrid"),
        ({"query": "a cat", "where": {"has_caption": 1}}, "has_caption"),
        ({"query": "a cat", "where": {"after": 0}}, "after"),
        ({"query": "a cat", "where": {"before": "1686787200"}}, "before"),
        ({"liked": [True]}, "liked"),
        ([], "request"),
    ],
)
def test_questions_that_make_no_sense(client, question, said):
    answer = client.post("/api/search", json=question)
    assert answer.status_code in (400, 404, 422)
    assert said in sentence(answer, answer.status_code)


def test_json_that_is_none(client):
    for content in (b"{", b'{"query": "\\ud800"}', b"\xff"):
        answer = client.post("/api/search", content=content, headers={"Content-Type": "application/json"})
        assert sentence(answer, answer.status_code)
        assert answer.status_code in (400, 422)
    assert sentence(client.get("/api/search"), 404)


def test_names_that_json_cannot_hold(tmp_path, embedded):
    folder = tmp_path / "odd"
    folder.mkdir()
    Image.new("RGB", (20, 20), "red").save(os.fsencode(folder) + b"/caf\xe9.png", format="PNG")
    with Index.open(tmp_path / "odd.sqlite", embedded) as index:
        index.update([folder], progress=False)
    with TestClient(make_app(tmp_path / "odd.sqlite", embedded), base_url=HOME) as client:
        shown = search(client, "red")["matches"][0]
        assert shown["name"] == "caf\\udce9.png"
        assert client.get("/" + shown["full"]).status_code == 200


def test_an_index_without_photographs_and_none_at_all(tmp_path, embedded):
    with pytest.raises(ClipmatchError, match="There is no index"):
        make_app(tmp_path / "none.sqlite", embedded)
    Index.open(tmp_path / "empty.sqlite", embedded).close()
    with TestClient(make_app(tmp_path / "empty.sqlite", embedded), base_url=HOME) as client:
        assert client.get("/api/status").json()["photos"] == 0
        assert search(client, "a cat") == {"matches": [], "best": None, "searched": 0, "vetoed": 0, "more": False}
        assert client.post("/api/browse", json={}).json()["matches"] == []
        assert client.get("/api/duplicates").json() == []
        assert client.get("/api/statistics").json()["photos"] == 0


def test_the_description(client):
    described = client.get("/openapi.json").json()
    assert {"/api/search", "/api/explain", "/api/concepts/{name}", "/api/photos/{number}/thumb"} <= set(
        described["paths"]
    )
    shown = client.get("/docs")
    assert shown.headers["content-type"].startswith("text/plain")
    assert "POST   /api/search " in shown.text


def test_the_page_needs_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    scripts = {path.name for path in (Path(make_app.__code__.co_filename).parent / "web").iterdir()}
    assert {"index.html", "style.css", "app.js", "server.js"} <= scripts
    for name in scripts | {"backend.js"}:
        text = client.get(f"/{name}").text
        assert not re.findall(r"""(?:src|href|from|url\()\s*=?\s*["']?https?://""", text)
        if name.endswith(".js"):
            assert client.get(f"/{name}").headers["content-type"].startswith("text/javascript")
            assert "innerHTML" not in text
            assert "eval(" not in text
    assert HOSTILE not in page.text


# The command


def test_the_command_until_ctrl_c(album):
    command = [sys.executable, "-m", "clipmatch.cli", "serve", "--index", str(album.index), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        address = re.fullmatch(r"clipmatch is at (http://127\.0\.0\.1:\d+/)\n", line)[1]
        with urllib.request.urlopen(f"{address}api/status") as answer:
            assert json.load(answer)["photos"] == SEARCHED
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


def run(*arguments):
    result = CliRunner().invoke(main, ["serve", *arguments])
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_port_in_use(album):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"Port {port} is in use" in run("--index", str(album.index), "--port", port)


def test_addresses_that_cannot_be_had(album, tmp_path):
    assert "192.0.2.1" in run("--index", str(album.index), "--host", "192.0.2.1", "--port", "0")
    assert "There is no index" in run("--index", str(tmp_path / "none.sqlite"), "--port", "0")
    assert "token is empty" in run("--index", str(album.index), "--token", "  ")


def test_beyond_this_computer_there_is_always_a_token(album, monkeypatch):
    import uvicorn

    started = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: started.append(self.config.app))
    result = CliRunner().invoke(main, ["serve", "--index", str(album.index), "--host", "0.0.0.0", "--port", "0"])
    assert result.exit_code == 0, result.output
    token = re.search(r"\?token=([\w-]{20,})\n", result.stdout)[1]
    with TestClient(started[0], base_url="http://nas") as client:
        assert client.get("/api/status").status_code == 401
        assert client.get("/api/status", headers={"Authorization": f"Bearer {token}"}).status_code == 200
