import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from clipmatch.data import CaptionedImage, CaptionSet, content_hash
from clipmatch.embedder import ImageEmbeddings
from clipmatch.errors import ClipmatchError, Failure
from clipmatch.evaluation import bootstrap_interval, chance_level, evaluate, measure, recall_at_k, retrieval_ranks


def ranks_of(scores, owner, **options):
    """Ranks for a matrix of scores [captions, pictures]: with unit pictures, the caption rows are the scores."""
    text_ranks, image_ranks = retrieval_ranks(np.eye(len(scores[0])), scores, owner, **options)
    return text_ranks.tolist(), image_ranks.tolist()


def test_ranks_of_a_matrix_that_a_reader_can_rank():
    scores = [
        [0.9, 0.2, 0.1],  # own picture 0: first
        [0.8, 0.5, 0.1],  # own picture 1: second, behind 0
        [0.7, 0.6, 0.3],  # own picture 2: third
    ]
    # Down the columns: 0.9 leads the first; 0.5 comes behind 0.6 in the second; 0.3 leads the third.
    assert ranks_of(scores, [0, 1, 2]) == ([1, 2, 3], [1, 2, 1])


def test_ties_count_against_the_model():
    assert ranks_of([[0.5, 0.5], [0.5, 0.5]], [0, 1]) == ([2, 2], [2, 2])


def test_a_model_that_says_the_same_of_everything_finds_nothing():
    same = np.ones((10, 4))
    figures = measure(same, same, np.arange(10), bootstrap=False)
    assert figures["text_to_image"]["recall@1"] == 0
    assert figures["image_to_text"]["recall@1"] == 0


def test_captions_of_one_picture_do_not_compete():
    scores = [
        [0.9, 0.0],
        [0.8, 0.0],  # behind its sibling, which is no rival
        [0.7, 0.0],
        [0.1, 0.6],
    ]
    assert ranks_of(scores, [0, 0, 0, 1]) == ([1, 1, 1, 1], [1, 1])


def test_uneven_captions_in_any_order():
    scores = [
        [0.1, 0.5, 0.3],  # owner 1: first
        [0.4, 0.2, 0.9],  # owner 0: second
        [0.3, 0.6, 0.2],  # owner 2: third
        [0.2, 0.1, 0.8],  # owner 2: first
    ]
    # Picture 0: 0.4 is highest. Picture 1: 0.5 behind 0.6. Picture 2: best own 0.8, behind 0.9.
    assert ranks_of(scores, [1, 0, 2, 2]) == ([1, 2, 3, 1], [1, 2, 2])


def obvious_ranks(images, texts, owner):
    """The definition, word for word, on the whole matrix."""
    scores = (texts.astype(float) @ images.astype(float).T).astype(np.float32)
    text_ranks = [
        1 + sum(scores[t, i] >= scores[t, owner[t]] for i in range(len(images)) if i != owner[t])
        for t in range(len(texts))
    ]
    image_ranks = []
    for i in range(len(images)):
        best = max(scores[t, i] for t in range(len(texts)) if owner[t] == i)
        image_ranks.append(1 + sum(scores[t, i] >= best for t in range(len(texts)) if owner[t] != i))
    return text_ranks, image_ranks


@pytest.mark.parametrize("block_scores", [1, 50, 10_000])
def test_blocks_give_the_ranks_of_the_whole_matrix(block_scores):
    rng = np.random.default_rng(3)
    owner = rng.permutation(np.concatenate([np.arange(23), rng.integers(0, 23, 40)]))
    images = rng.integers(-2, 3, (23, 4)) + np.array([0, 0, 0, 0.5])  # whole numbers: many ties
    texts = rng.integers(-2, 3, (63, 4)) + np.array([0, 0, 0, 0.5])
    text_ranks, image_ranks = retrieval_ranks(images, texts, owner, block_scores=block_scores)
    assert (text_ranks.tolist(), image_ranks.tolist()) == obvious_ranks(images, texts, owner)


def test_a_lead_in_the_last_bits_is_a_tie():
    # Where a row lies in a matrix product can move its score by as much, so it is no evidence.
    assert ranks_of([[0.5 + 1e-12, 0.5], [0.5, 0.5 + 1e-12]], [0, 1]) == ([2, 2], [2, 2])


def test_copies_of_a_picture_tie_whatever_block_they_are_in():
    rng = np.random.default_rng(0)
    row = rng.normal(size=(1, 256)).astype(np.float32)
    text_ranks, image_ranks = retrieval_ranks(np.repeat(row, 37, 0), np.repeat(row, 37, 0), np.arange(37), 100)
    assert set(text_ranks.tolist()) == {37}
    assert set(image_ranks.tolist()) == {37}


def test_a_picture_that_is_there_twice_never_ranks_first():
    # A score that is computed apart from the product ties with the product's all the same.
    rng = np.random.default_rng(0)
    images = np.repeat(rng.normal(size=(50, 256)).astype(np.float32), 2, axis=0)
    owner = np.repeat(np.arange(100), 5)
    texts = images[owner] + rng.normal(size=(500, 256)).astype(np.float32)
    text_ranks, _ = retrieval_ranks(images, texts, owner, block_scores=730)
    assert set(text_ranks.tolist()) == {2}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("broken", ["picture", "caption"])
def test_embeddings_that_are_not_finite_are_refused(value, broken):
    rows = {"picture": np.eye(3), "caption": np.eye(3)}
    rows[broken][2, 1] = value
    with pytest.raises(ClipmatchError, match=f"1 of 3 {broken} embeddings hold NaN or infinity, the first in row 2"):
        retrieval_ranks(rows["picture"], rows["caption"], [0, 1, 2])


def test_zero_rows_are_refused():
    with pytest.raises(ClipmatchError, match="caption embeddings are all zeros, the first in row 1"):
        retrieval_ranks(np.eye(2), [[1.0, 0.0], [0.0, 0.0]], [0, 1])


@pytest.mark.parametrize(
    ("images", "texts", "owner", "message"),
    [
        (np.eye(2), np.eye(3), [0, 1, 1], "2 numbers and caption rows 3"),
        (np.eye(2), np.eye(2), [0], "one picture number for each"),
        (np.eye(2), np.eye(2), [0.0, 1.0], "one picture number for each"),
        (np.eye(2), np.eye(2), [0, 2], "names pictures 0 to 2; there are 2"),
        (np.eye(2), np.eye(2), [0, -1], "names pictures -1 to 0"),
        (np.eye(2), np.eye(2), [1, 1], "1 pictures have no caption, the first is number 0"),
        (np.ones(4), np.eye(2), [0, 1], r"shape \(4,\)"),
        (np.empty((0, 4)), np.eye(4), [0], r"shape \(0, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(images, texts, owner, message):
    with pytest.raises(ClipmatchError, match=message):
        retrieval_ranks(images, texts, owner)


def test_recall_is_a_share_of_ranks():
    assert [recall_at_k([1, 3, 5, 11], k) for k in (1, 5, 10, 11)] == [0.25, 0.75, 0.75, 1.0]


def test_chance_of_one_right_answer_is_k_of_n():
    assert chance_level(1, 1000) == 0.001
    assert chance_level(10, 1000) == 0.01
    assert chance_level(10, 4) == 1.0


def test_chance_by_trying_every_order():
    orders = list(permutations(range(6)))  # of six captions; 0 and 1 are right for one picture, 2 to 5 for another
    hits = [np.mean([bool(right & set(order[:2])) for order in orders]) for right in ({0, 1}, {2, 3, 4, 5})]
    assert chance_level(2, 6, own=[2, 4]) == pytest.approx(np.mean(hits))


def test_interval_holds_the_point_and_repeats():
    ranks = np.random.default_rng(5).integers(1, 30, 200)
    owner = np.arange(200)
    intervals = bootstrap_interval(ranks, owner, seed=7)
    assert intervals == bootstrap_interval(ranks, owner, seed=7)
    assert intervals != bootstrap_interval(ranks, owner, seed=8)
    for k, (low, high) in intervals.items():
        assert 0 <= low < recall_at_k(ranks, k) < high <= 1


def test_interval_agrees_with_the_normal_one_where_that_holds():
    ranks = np.repeat([1, 2], 500)  # recall@1 of one half over 1,000 pictures: 0.5 +- 1.96 * sqrt(0.25 / 1000)
    low, high = bootstrap_interval(ranks, np.arange(1000), ks=[1])[1]
    assert (low, high) == pytest.approx((0.469, 0.531), abs=0.004)


def test_interval_is_of_pictures_not_of_captions():
    # Five captions a picture that hit or miss together carry no more evidence than one.
    owner = np.repeat(np.arange(100), 5)
    together = bootstrap_interval(np.repeat(np.tile([1, 2], 50), 5), owner, ks=[1])[1]
    single = bootstrap_interval(np.tile([1, 2], 50), np.arange(100), ks=[1])[1]
    assert together == single


def test_measure_without_bootstrap_is_the_same_but_for_the_interval():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(12, 5))
    full, cheap = measure(rows, rows + 0.5, np.arange(12)), measure(rows, rows + 0.5, np.arange(12), bootstrap=False)
    for direction in ("text_to_image", "image_to_text"):
        assert full[direction].pop("interval")
        assert full[direction] == cheap[direction]


class ByName:
    """Embeds `a.jpg` and `a, again` alike; cannot read a picture whose name starts with x."""

    fingerprint, dim = "f00d", 26

    def embed_images(self, paths, progress=True):
        good = [path for path in paths if not path.name.startswith("x")]
        failures = [Failure(path, "not a picture") for path in paths if path not in good]
        return ImageEmbeddings(self.embed_texts([path.name for path in good]), good, failures)

    def embed_texts(self, texts, progress=False):
        return np.eye(26, dtype=np.float32)[[ord(text[0]) - ord("a") for text in texts]]


ROWS = (
    CaptionedImage(Path("a.jpg"), ("a", "a, again")),
    CaptionedImage(Path("x.jpg"), ("x",)),
    CaptionedImage(Path("b.jpg"), ("b", "a, wrongly", "b, again")),
    CaptionedImage(Path("c.jpg"), ("c",)),
)


def test_evaluation_leaves_out_what_cannot_be_read():
    evaluation = evaluate(ByName(), ROWS, progress=False)
    assert [path.name for path in evaluation.paths] == ["a.jpg", "b.jpg", "c.jpg"]
    assert evaluation.captions == ("a", "a, again", "b", "a, wrongly", "b, again", "c")
    assert evaluation.image_of_text.tolist() == [0, 0, 1, 1, 1, 2]
    # "a, wrongly" belongs to b, which ties with c behind a: third. It also ties with a's own captions: a is second.
    assert evaluation.text_ranks.tolist() == [1, 1, 1, 3, 1, 1]
    assert evaluation.image_ranks.tolist() == [2, 1, 1]


def test_evaluation_as_json():
    figures = evaluate(ByName(), ROWS, seed=3, progress=False).to_json()
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    text = figures.pop("text_to_image")
    image = figures.pop("image_to_text")
    assert figures == {
        "images": 3,
        "captions": 6,
        "gallery": 3,
        "split_hash": content_hash(ROWS),
        "failures": [{"path": "x.jpg", "reason": "not a picture"}],
        "model": {"fingerprint": "f00d", "path": None},
        "seed": 3,
    }
    keys = ["recall@1", "recall@5", "recall@10"]
    for direction in (text, image):
        assert list(direction) == [*keys, "median_rank", "mean_rank", "interval", "chance"]
        assert list(direction["interval"]) == list(direction["chance"]) == keys
    assert text["recall@1"] == pytest.approx(5 / 6)
    assert text["mean_rank"] == pytest.approx(8 / 6)
    assert text["chance"]["recall@1"] == pytest.approx(1 / 3)
    assert image["recall@1"] == pytest.approx(2 / 3)
    assert image["chance"]["recall@1"] == pytest.approx((2 / 6 + 3 / 6 + 1 / 6) / 3)


def test_a_caption_set_is_evaluated_like_its_rows():
    captions = CaptionSet(rows=ROWS, format="csv", source=Path("captions.csv"), repaired=(), dropped=(), missing=())
    assert evaluate(ByName(), captions, progress=False).to_json() == evaluate(ByName(), ROWS, progress=False).to_json()


def test_a_model_folder_is_evaluated_like_the_model_in_it(tmp_path):
    pytest.importorskip("torch", reason='this needs pip install "clipmatch[train]"')
    from PIL import Image
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel

    from clipmatch.checkpoint import create_checkpoint, save_checkpoint
    from clipmatch.config import ModelConfig
    from clipmatch.embedder import load_model
    from clipmatch.tokenizer import Tokenizer

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    image = {"model_type": "vit", "image_size": 32, "patch_size": 16, **sizes}
    text = {"model_type": "distilbert", "vocab_size": 8, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    words = Words(WordLevel({"[PAD]": 0, "[UNK]": 1, "red": 2, "blue": 3}, unk_token="[UNK]"))
    checkpoint = create_checkpoint(ModelConfig(image_tower=image, text_tower=text, embed_dim=8), Tokenizer(words))
    fingerprint = save_checkpoint(checkpoint, tmp_path / "model")
    rows = [CaptionedImage(tmp_path / f"{color}.png", (color,)) for color in ("red", "blue")]
    for row in rows:
        Image.new("RGB", (40, 40), row.path.stem).save(row.path)
    rows.append(CaptionedImage(tmp_path / "missing.png", ("red",)))

    figures = evaluate(tmp_path / "model", rows, progress=False).to_json()
    assert figures["model"] == {"fingerprint": fingerprint, "path": str(tmp_path / "model")}
    assert (figures["images"], figures["captions"]) == (2, 2)
    assert [failure["path"] for failure in figures["failures"]] == [str(tmp_path / "missing.png")]
    direct = evaluate(load_model(tmp_path / "model"), rows, progress=False).to_json()
    assert direct["text_to_image"] == figures["text_to_image"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "no captioned pictures"),
        ((CaptionedImage(Path("a.jpg"), ()),), "a.jpg has no captions"),
        (ROWS[1:2], "None of the 1 pictures could be read.*x.jpg: not a picture"),
    ],
)
def test_nothing_to_evaluate(rows, message):
    with pytest.raises(ClipmatchError, match=message):
        evaluate(ByName(), rows, progress=False)


@pytest.mark.parametrize("captions", [[5] * 40, [1 + i % 7 for i in range(40)]], ids=["five each", "uneven"])
def test_recall_equals_that_of_clip_benchmark(captions):
    peer = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason="clip_benchmark is not installed")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(11)
    owner = np.repeat(np.arange(40), captions)
    images = rng.normal(size=(40, 16)).astype(np.float32)
    texts = (images[owner] + 2 * rng.normal(size=(len(owner), 16))).astype(np.float32)

    class Fixed(torch.nn.Module):
        def encode_image(self, numbers):
            return torch.from_numpy(images)[numbers]

        def encode_text(self, numbers):
            return torch.from_numpy(texts)[numbers]

    by_image = [np.flatnonzero(owner == image).tolist() for image in range(40)]
    loader = [(torch.arange(start, start + 8), by_image[start : start + 8]) for start in range(0, 40, 8)]
    theirs = peer.evaluate(Fixed(), loader, torch.tensor, "cpu", amp=False, recall_k_list=[1, 5, 10])
    ours = measure(
        images / np.linalg.norm(images, axis=1, keepdims=True),
        texts / np.linalg.norm(texts, axis=1, keepdims=True),
        owner,
        bootstrap=False,
    )
    for k in (1, 5, 10):
        assert ours["text_to_image"][f"recall@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert ours["image_to_text"][f"recall@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
    assert 0.1 < ours["text_to_image"]["recall@1"] < 0.9  # neither trivial nor hopeless
