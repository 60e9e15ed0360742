"""`clipmatch generate` as people type it, on tiny models with random weights."""

import hashlib
import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from test_biggan import TINY, published_shapes

from clipmatch.cli import main
from clipmatch.embedder import load_model
from clipmatch.errors import ClipmatchError
from clipmatch.generation import picture
from clipmatch.generation.guide import load_guide
from clipmatch.generation.painter import DRAFTS, PaintConfig, load_painter
from clipmatch.generation.picture import Film, check_writable, save_png, to_image
from clipmatch.generation.prior import Prior, PriorConfig, load_prior, save_prior
from clipmatch.generation.vqgan import vqgan_fingerprint


@pytest.fixture(scope="module")
def biggan(tmp_path_factory):
    """A folder of a tiny BigGAN in the published layout; vectors of singular values are as random as the rest."""
    folder = tmp_path_factory.mktemp("generators") / "biggan"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(shape, generator=generator) for name, shape in published_shapes(TINY).items()}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def run(*words):
    return CliRunner().invoke(main, ["generate", *map(str, words)])


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_same_command_paints_the_same_picture(model_folder, vqgan, tmp_path):
    command = ("a red circle above a blue square", "--guide", model_folder, "--generator", vqgan, "--steps", 12)
    for name in ("one.png", "two.png"):
        done = run(*command, "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
    assert digest(tmp_path / "one.png") == digest(tmp_path / "two.png")
    run(*command, "--seed", 1, "--out", tmp_path / "other.png")
    assert digest(tmp_path / "one.png") != digest(tmp_path / "other.png")


def test_seeds_have_a_range(model_folder, vqgan):
    done = run("a star", "--guide", model_folder, "--generator", vqgan, "--seed", 2**31)
    assert done.exit_code == 2
    assert "0<=x<=2147483647" in done.output


def test_a_picture_says_how_it_was_made(model_folder, vqgan, tmp_path):
    out = tmp_path / "new" / "star.png"
    prompt = "a star ☆ | blur:-0.5"
    done = run(prompt, "--guide", model_folder, "--generator", vqgan, "--steps", 3, "--seed", 5, "--out", out)
    assert str(out) in done.stdout
    with Image.open(out) as image:
        facts = image.text
        assert image.size == (16, 16)
    assert facts["prompt"] == prompt
    assert (facts["seed"], facts["steps"], facts["planned steps"]) == ("5", "3", "3")
    assert facts["guide"] == load_guide(model_folder).fingerprint
    assert facts["generator"].startswith("VQGAN ")
    assert facts["Software"].startswith("clipmatch ")


def test_several_are_ranked_by_the_guide_or_by_a_judge(model_folder, vqgan, tmp_path):
    common = (
        "a star",
        "--guide",
        model_folder,
        "--generator",
        vqgan,
        "--steps",
        2,
        "--n",
        3,
        "--out",
        tmp_path / "p.png",
    )
    by_guide = [line.split() for line in run(*common).stdout.splitlines()[1:]]
    by_judge = [line.split() for line in run(*common, "--judge", "embedded").stdout.splitlines()[1:]]
    for lines in (by_guide, by_judge):
        assert [line[0] for line in lines] == ["1", "2", "3"]
        assert sorted(line[2] for line in lines) == ["0", "1", "2"]
        scores = [float(line[1]) for line in lines]
        assert scores == sorted(scores, reverse=True)
        assert [Path(line[3]).name for line in lines] == ["p-1.png", "p-2.png", "p-3.png"]
    assert [line[1] for line in by_guide] != [line[1] for line in by_judge]
    for place, line in enumerate(by_judge, 1):
        with Image.open(tmp_path / f"p-{place}.png") as image:
            assert image.text["seed"] == line[2]


def test_it_begins_with_a_picture_and_strength_holds_it_there(model_folder, vqgan, photos, tmp_path):
    common = ("a star", "--guide", model_folder, "--generator", vqgan, "--init", photos / "red.png", "--steps", 5)
    for name, options in (("kept", ("--strength", 0)), ("changed", ()), ("alone", ("--steps", 0))):
        done = run(*common, *options, "--out", tmp_path / f"{name}.png")
        assert done.exit_code == 0, done.output
    kept, changed, alone = (
        list(Image.open(tmp_path / f"{name}.png").tobytes()) for name in ("kept", "changed", "alone")
    )
    assert kept == alone != changed
    assert Image.open(tmp_path / "changed.png").text["init"] == "red.png"


def test_previews_are_judged_like_the_pictures(model_folder, vqgan, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(picture, "save_png", lambda path, one, facts: saved.append((path.name, facts)))
    words = ("a star", "--guide", model_folder, "--generator", vqgan, "--steps", 2, "--save-every", 2, "--n", 3)
    done = run(*words, "--judge", "embedded", "--out", tmp_path / "p.png")
    assert done.exit_code == 0, done.output
    assert saved[0][1]["judge"] == load_model("embedded").fingerprint
    previews, pictures = saved[:3], saved[3:]
    assert previews == pictures  # of the last step


def test_an_animation_and_previews(model_folder, vqgan, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(picture, "save_png", lambda path, one, facts: saved.append((path, facts["steps"])))
    done = run(
        "a star",
        "--guide",
        model_folder,
        "--generator",
        vqgan,
        "--steps",
        9,
        "--save-every",
        4,
        "--out",
        tmp_path / "p.png",
        "--video",
        tmp_path / "p.gif",
    )
    assert done.exit_code == 0, done.output
    assert saved == [(tmp_path / "p.png", steps) for steps in (4, 8, 9)]
    with Image.open(tmp_path / "p.gif") as film:
        assert 1 < film.n_frames <= 11  # the start, nine steps and the best of them; equal ones in a row are one


def test_biggan_paints(model_folder, biggan, tmp_path):
    done = run(
        "a star",
        "--guide",
        model_folder,
        "--generator",
        biggan,
        "--steps",
        3,
        "--truncation",
        0.5,
        "--out",
        tmp_path / "p.png",
    )
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (16, 16)
        assert image.text["generator"].startswith("BigGAN ")


@pytest.fixture
def with_prior(vqgan, model_folder, tmp_path):
    """The VQGAN's folder with a tiny prior of random weights inside."""
    folder = shutil.copytree(vqgan, tmp_path / "with-prior")
    known = {"guide": load_guide(model_folder).fingerprint, "vqgan": vqgan_fingerprint(folder)}
    torch.manual_seed(0)
    save_prior(Prior(PriorConfig(64, 32, 4, 16, width=16, layers=1, heads=2, **known)), folder / "prior")
    return folder


def test_a_prior_paints_first_and_guidance_refines(model_folder, with_prior):
    painter = load_painter(str(model_folder), str(with_prior), device="cpu")
    painted, stopped = painter.paint(PaintConfig("a star", n=2, steps=0, seed=7))
    assert not stopped
    row = torch.from_numpy(painter.guide.embedder.embed_texts(["a star"]))
    for one in painted:
        tokens = load_prior(with_prior / "prior").paint(row, seed=7 + one.number)
        assert torch.equal(one.picture, painter.canvas.paint(painter.canvas.from_tokens(tokens))[0])
        assert one.facts["seed"] == 7 + one.number
        assert re.fullmatch("[0-9a-f]{16}", one.facts["prior"])
    refined, _ = painter.paint(PaintConfig("a star", n=2, steps=20, seed=7))
    assert refined[0].score > painted[0].score


@pytest.mark.parametrize("kind", ["with_prior", "biggan"])
def test_who_stops_while_pictures_are_begun_gets_those_that_are(kind, model_folder, request):
    painter = load_painter(str(model_folder), str(request.getfixturevalue(kind)), device="cpu")
    begun = iter([False])
    painted, stopped = painter.paint(PaintConfig("a star", n=5, steps=3), stop=lambda: next(begun, True))
    assert stopped
    assert [one.facts["steps"] for one in painted] == [0, 0]


@pytest.mark.skipif("not torch.cuda.is_available()", reason="there is no GPU")
@pytest.mark.parametrize("kind", ["vqgan", "with_prior", "biggan"])
def test_a_gpu_paints_what_the_cpu_does(kind, model_folder, request):
    names = (str(model_folder), str(request.getfixturevalue(kind)))
    config = PaintConfig("a star", n=2, steps=1, seed=7)
    by_cpu, by_gpu = (load_painter(*names, device=device).paint(config)[0] for device in ("cpu", "cuda"))
    for one, other in zip(by_cpu, by_gpu, strict=True):
        assert other.number == one.number
        assert torch.allclose(other.picture, one.picture, atol=0.02)


def test_steps_that_are_worth_taking(model_folder, with_prior, vqgan):
    after_prior, alone = (load_painter(str(model_folder), str(folder), device="cpu") for folder in (with_prior, vqgan))
    assert after_prior.steps_of(PaintConfig("a star")) == 20
    assert after_prior.steps_of(PaintConfig("a star", init=Path("red.png"))) == 200  # which no prior has painted
    assert alone.steps_of(PaintConfig("a star")) == 200
    assert alone.steps_of(PaintConfig("a star", steps=3)) == 3
    assert "20 after a prior" in " ".join(run("--help").stdout.split())


def test_guidance_begins_with_the_draft_that_the_guide_likes_best(model_folder, with_prior):
    painter = load_painter(str(model_folder), str(with_prior), device="cpu")
    config = PaintConfig("a star", n=2, steps=1, seed=7, strength=0)  # of no strength: the draft stays as it is
    held, _ = painter.paint(config)
    rows = torch.from_numpy(painter.guide.embedder.embed_texts(["a star"] * DRAFTS))
    targets = painter.guide.targets(config.prompts)
    for one in held:
        tokens = painter.prior.paint(rows, seed=(7 + one.number) * DRAFTS)
        drafts = painter.canvas.paint(painter.canvas.from_tokens(tokens))
        scores = painter.guide.score(drafts, targets, count=0)
        assert len(set(scores.tolist())) > 1
        torch.testing.assert_close(one.picture, drafts[scores.argmax()])


def test_a_prior_is_for_its_guide_its_vqgan_and_one_size(model_folder, with_prior):
    painter = load_painter(str(model_folder), str(with_prior))
    with pytest.raises(ClipmatchError, match="prior paints pictures of 16 pixels"):
        painter.paint(PaintConfig("a star", size=32, steps=0))
    config = with_prior / "prior" / "config.json"
    known = config.read_text()
    config.write_text(known.replace(painter.guide.fingerprint, "0123456789abcdef"))
    with pytest.raises(ClipmatchError, match=r"trained for another guide \(0123456789abcdef\)"):
        load_painter(str(model_folder), str(with_prior))
    config.write_text(known)
    weights = with_prior / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(ClipmatchError, match="trained for another VQGAN"):
        load_painter(str(model_folder), str(with_prior))


def test_without_names_the_demo_paints(model_folder, with_prior, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("a star")
    assert done.exit_code == 1
    assert "Which guide?" in done.stderr
    assert "clipmatch demo --generate" in done.stderr
    shutil.copytree(model_folder, "clipmatch-demo/guide/best")
    shutil.copytree(with_prior, "clipmatch-demo/generator")
    assert run("a star", "--steps", 0).exit_code == 0
    assert Image.open("painting.png").size == (16, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("'' --guide MODEL --generator VQGAN", "prompt is empty"),
        ("x --guide embedded --generator VQGAN", "embedded is for ONNX Runtime"),
        ("x --guide MODEL --generator nowhere", "nowhere is no folder of a generator"),
        ("x --guide MODEL --generator MODEL", "neither a VQGAN .* nor a BigGAN-deep"),
        ("x --guide MODEL --generator owner/name", "can't be reached"),
        ("x --guide MODEL --generator VQGAN --size 17", "multiple of 2 pixels; give --size 16"),
        ("x --guide MODEL --generator VQGAN --steps 0", "has no prior, so 0 steps would paint nothing"),
        ("x --guide MODEL --generator VQGAN --strength 0.5", "--strength would change nothing"),
        ("x --guide MODEL --generator VQGAN --truncation 0.5", "--truncation would change nothing"),
        ("x --guide MODEL --generator VQGAN --init nowhere.png", "nowhere.png: no such file"),
        ("x --guide MODEL --generator VQGAN --video x.avi", "can be a .gif or a .mp4"),
        ("x --guide MODEL --generator VQGAN --out x.jpg", "can only be a .png"),
        ("x --guide MODEL --generator VQGAN --device cuda:9", "cuda:9.* can't be used here"),
        ("x --guide MODEL --generator BIGGAN --init RED", "A BigGAN can't begin with a picture"),
        ("x --guide MODEL --generator BIGGAN --size 32", "BigGAN paints pictures of 16 pixels"),
    ],
)
def test_one_sentence_for_what_cannot_be_painted(words, message, model_folder, vqgan, biggan, photos):
    names = {"MODEL": model_folder, "VQGAN": vqgan, "BIGGAN": biggan, "RED": photos / "red.png"}
    done = run(*(names.get(word, word) for word in shlex.split(words)))
    assert done.exit_code == 1, done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_ctrl_c_keeps_the_best_so_far(model_folder, vqgan, tmp_path, monkeypatch):
    def interrupted(path, one, facts):
        save_png(path, one, facts)
        if facts["steps"] == 4:  # as the preview is written
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(picture, "save_png", interrupted)
    common = ("a star", "--guide", model_folder, "--generator", vqgan, "--steps", 100_000, "--save-every", 4)
    done = run(*common, "--out", tmp_path / "p.png")
    assert done.exit_code == 130
    assert "Stopped after 5 of 100000 steps" in done.stderr
    assert "p.png" in done.stdout
    with Image.open(tmp_path / "p.png") as image:
        assert image.text["steps"] == "5"


@pytest.mark.parametrize("inside", ["", "vqvae"])
def test_generators_of_the_hub(inside, vqgan, model_folder, tmp_path, monkeypatch):
    """A repository in the hub's cache that is a generator, or has one in a folder; the network is not there."""
    repository = tmp_path / "hub" / "models--owner--painter"
    shutil.copytree(vqgan, repository / "snapshots" / "abc" / inside)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    painter = load_painter(str(model_folder), "/".join(["owner/painter", *[inside] * bool(inside)]))
    assert painter.canvas.fingerprint == vqgan_fingerprint(vqgan)


def test_a_place_where_nothing_can_be_written_is_told_before_painting(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ClipmatchError, match=r"p\.png can't be written"):
        check_writable(tmp_path / "file" / "p.png")
    check_writable(tmp_path / "new" / "p.png")
    assert list((tmp_path / "new").iterdir()) == []


def test_pixels_are_rounded(tmp_path):
    values = torch.tensor([0.0, 0.5, 1.0, 1.7, -0.2, 254.4 / 255]).view(1, 1, 6).expand(3, 1, 6)
    save_png(tmp_path / "p.png", values, {"prompt": "x"})
    with Image.open(tmp_path / "p.png") as image:
        assert (
            image.tobytes() == to_image(values).tobytes() == bytes(v for v in (0, 128, 255, 255, 0, 254) for _ in "rgb")
        )


def test_a_film_is_thinned_out_and_ends_with_the_best(tmp_path):
    film = Film(tmp_path / "f.gif")
    for step in range(251):
        film.add(step, torch.full((2, 3, 4, 4), step / 250))
    assert len(film.frames) == 63  # every fourth
    film.save(1, torch.zeros(3, 4, 4))
    with Image.open(tmp_path / "f.gif") as gif:
        assert gif.n_frames == 64
        gif.seek(63)
        assert gif.convert("RGB").getpixel((0, 0)) == (0, 0, 0)
        assert gif.info["duration"] == 2000


def test_mp4_without_its_encoder_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ClipmatchError, match="pip install imageio imageio-ffmpeg"):
        Film(tmp_path / "f.mp4")


def test_mp4(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    import imageio.v2 as imageio

    film = Film(tmp_path / "f.mp4")
    for step in range(21):
        film.add(step, torch.full((1, 3, 17, 17), step / 20))
    film.save(0, torch.ones(3, 17, 17))
    with imageio.get_reader(tmp_path / "f.mp4") as reader:
        assert reader.get_meta_data()["size"] == (18, 18)
        assert reader.get_data(0).mean() < 10
        assert reader.get_data(21).mean() > 245
