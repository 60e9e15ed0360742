"""Models of other makers: their rows are those of transformers' own processor and model, whatever else is in a batch.

The models are tiny and random, but of the real architectures, with real tokenizers and files as the hub has them.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from matplotlib import cbook
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from clipmatch.embedder import load_model
from clipmatch.errors import ClipmatchError
from clipmatch.preprocess import load_image
from clipmatch.pretrained import PretrainedEmbedder, find_conversion, load_pretrained, load_transform

FAMILIES = ("clip", "clip_old", "metaclip_2", "chinese_clip", "altclip", "siglip")
TEXTS = [
    "a dog",
    "two children play in the snow near a big rock, and a man in a red shirt looks at them",
    "",
    "the black bird sits near water",
    "a photo of a cat",
]
CORPUS = [text.lower() for text in TEXTS] * 3
WIDTH = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**WIDTH, "image_size": 32, "patch_size": 8}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP_MEAN = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3}


# Folders as save_pretrained writes them


def trained(backend, trainer):
    """A tokenizer trained on the corpus -> the "model" part of its file."""
    backend.train_from_iterator(CORPUS, trainer)
    return json.loads(backend.to_str())["model"]


def clip_tokenizer():
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    plain = transformers.CLIPTokenizer().backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, end_of_word_suffix="</w>", initial_alphabet=alphabet)
    model = trained(backend, trainer)
    words = [*model["vocab"], "<|startoftext|>", "<|endoftext|>"]  # at the end, as in CLIP
    vocab = {word: number for number, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]])


def gemma_tokenizer():
    """As the fixed-resolution SigLIP 2 models have it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    model = trained(backend, trainers.BpeTrainer(vocab_size=200, special_tokens=specials))
    return transformers.GemmaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_input_names=["input_ids"],
    )


def roberta_tokenizer():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    model = trained(backend, trainers.UnigramTrainer(vocab_size=150, special_tokens=specials, unk_token="<unk>"))
    return transformers.XLMRobertaTokenizer(vocab=[tuple(piece) for piece in model["vocab"]])


def bert_tokenizer():
    letters = "abcdefghijklmnopqrstuvwxyz,狗猫雪"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), "dog"]
    return transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def clip_parts(kind="CLIP", make_tokenizer=clip_tokenizer, places=77, **text):
    tokenizer = make_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": places,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = getattr(transformers, f"{kind}Config")(
        text_config={**WIDTH, **settings, **text}, vision_config=VISION, projection_dim=16
    )
    square = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    steps = {"image_processor_type": "CLIPImageProcessor", **STEPS, **CLIP_MEAN, **square}
    return getattr(transformers, f"{kind}Model")(config), tokenizer, steps


def siglip_parts(tokenizer=None):
    tokenizer = tokenizer or gemma_tokenizer()
    text = {**WIDTH, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    size = {"size": {"height": 32, "width": 32}}
    steps = {"image_processor_type": "SiglipImageProcessor", **STEPS, **HALF, **size}
    return transformers.SiglipModel(config), tokenizer, steps


PARTS = {
    "clip": clip_parts,
    "clip_old": lambda: clip_parts(eos_token_id=2),  # what old configs say, OpenAI's own among them
    "metaclip_2": lambda: clip_parts("MetaClip2", roberta_tokenizer),
    "chinese_clip": lambda: clip_parts("ChineseCLIP", bert_tokenizer, 99),
    "altclip": lambda: clip_parts("AltCLIP", roberta_tokenizer, 79, project_dim=24),
    "siglip": siglip_parts,
}


def save(folder, model, tokenizer, steps, **options):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # the usual small start makes all texts nearly alike
            parameter += torch.randn_like(parameter) * (0.5 if parameter.ndim > 1 else 0.1)
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(steps))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    return {family: save(root / family, *PARTS[family]()) for family in FAMILIES}


@pytest.fixture(scope="module")
def embedders(folders):
    return {family: load_pretrained(str(folder), device="cpu") for family, folder in folders.items()}


@pytest.fixture
def copy(folders, tmp_path):
    """The CLIP folder, to be damaged."""
    return Path(shutil.copytree(folders["clip"], tmp_path / "copy"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Real JPEG photographs: portrait and landscape."""
    folder = tmp_path_factory.mktemp("photos")
    portrait = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    assert portrait.size == (512, 600)
    portrait.save(folder / "portrait.jpg", quality=90)
    portrait.crop((0, 40, 500, 331)).save(folder / "landscape.jpg", quality=90)
    return [folder / "portrait.jpg", folder / "landscape.jpg"]


def row(features):
    vector = features.pooler_output[0].detach().numpy()
    return vector / np.linalg.norm(vector)


# Equal to transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_image_rows_are_those_of_transformers(family, folders, embedders, photos):
    model = transformers.AutoModel.from_pretrained(folders[family]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folders[family], backend="pil")
    pictures = [load_image(path, min_size=32) for path in photos]
    expected = [row(model.get_image_features(**processor(picture, return_tensors="pt"))) for picture in pictures]
    rows = embedders[family].embed_images(photos).rows
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected, atol=2e-5)
    assert np.abs(rows[0] - rows[1]).max() > 0.01  # so the tolerance above can tell pictures apart


@pytest.mark.parametrize("family", FAMILIES)
def test_text_rows_are_those_of_each_text_alone_in_transformers(family, folders, embedders):
    model = transformers.AutoModel.from_pretrained(folders[family]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[family])
    full = {"padding": "max_length", "max_length": 64} if family == "siglip" else {}
    expected = [row(model.get_text_features(**tokenizer([text], return_tensors="pt", **full))) for text in TEXTS]
    rows = embedders[family].embed_texts(TEXTS)
    assert rows.shape == (len(TEXTS), embedders[family].dim)
    np.testing.assert_allclose(rows, expected, atol=2e-5)
    np.testing.assert_allclose(np.concatenate([embedders[family].embed_texts([t]) for t in TEXTS]), rows, atol=2e-5)
    apart = np.abs(rows[:, None] - rows).max(axis=2) + np.eye(len(TEXTS))
    assert apart.min() > 0.01  # so the tolerances above can tell texts apart


CUT = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
SQUARE = {"size": {"height": 224, "width": 224}}


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "CLIPImageProcessor", **CLIP_MEAN, **CUT, "size": {"shortest_edge": 224}},
        {"feature_extractor_type": "CLIPFeatureExtractor", **CLIP_MEAN, **CUT, "size": 224, "crop_size": 224},  # OpenAI
        {"image_processor_type": "CLIPImageProcessor", **CLIP_MEAN, **CUT, "size": {"shortest_edge": 256}},
        {"image_processor_type": "SiglipImageProcessor", **HALF, **SQUARE},
        {"image_processor_type": "ViTImageProcessor", **HALF, **SQUARE, "resample": 2},
    ],
)
def test_pixels_are_those_of_transformers(settings, photos, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**STEPS, **settings}))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    transform = load_transform("it", tmp_path)
    for path in photos:
        picture = Image.open(path)
        expected = processor(picture, return_tensors="np")["pixel_values"]
        values = transform(picture, return_tensors="np")["pixel_values"]
        assert values.shape == (1, 3, 224, 224)
        levels = np.abs(values - expected) * 255 * np.reshape(settings["image_std"], (3, 1, 1))
        assert levels.max() < 1.01  # Pillow's rounding, here and there
        assert np.mean(levels > 0.01) < 1e-3


def test_a_text_longer_than_the_model_is_cut(embedders):
    for family, room in {"clip": 77, "siglip": 64, "chinese_clip": 99, "altclip": 77}.items():
        assert embedders[family].max_length == room
        long = "a dog " * 100
        rows = embedders[family].embed_texts([long, long + "and a cat"])
        np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)


def test_siglip_reads_lower_case(embedders):
    rows = embedders["siglip"].embed_texts(["a dog", "A DOG", "A Dog"])
    np.testing.assert_allclose(rows[1:], rows[[0, 0]], atol=1e-6)


def test_files_of_the_newer_form_give_the_same(folders, embedders, photos, tmp_path):
    """Several weight files, and one processor_config.json for what used to be two files."""
    model = transformers.CLIPModel.from_pretrained(folders["clip"])
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    transformers.AutoProcessor.from_pretrained(folders["clip"]).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert not (tmp_path / "preprocessor_config.json").exists()
    other = load_pretrained(str(tmp_path), device="cpu")
    np.testing.assert_allclose(other.embed_texts(TEXTS), embedders["clip"].embed_texts(TEXTS), atol=1e-6)
    np.testing.assert_allclose(other.embed_images(photos).rows, embedders["clip"].embed_images(photos).rows, atol=1e-6)


def test_bfloat16_is_close_to_float32(folders, embedders):
    half = load_pretrained(str(folders["siglip"]), device="cpu", precision="bfloat16")
    rows = half.embed_texts(TEXTS)
    assert rows.dtype == np.float32
    assert (rows * embedders["siglip"].embed_texts(TEXTS)).sum(axis=1).min() > 0.98


def test_load_model_finds_it(folders, embedders):
    model = load_model(folders["clip"], device="cpu")
    assert isinstance(model, PretrainedEmbedder)
    assert (model.fingerprint, model.dim) == (embedders["clip"].fingerprint, 16)


# SigLIP's first tokenizer


def sentencepiece_missing():
    return importlib.util.find_spec("sentencepiece") is None


@pytest.mark.skipif(not sentencepiece_missing(), reason="sentencepiece is installed")
def test_a_tokenizer_that_needs_sentencepiece_says_so(folders, tmp_path):
    folder = Path(shutil.copytree(folders["siglip"], tmp_path / "siglip"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    with pytest.raises(ClipmatchError, match="install what reads it with: pip install sentencepiece protobuf"):
        load_pretrained(str(folder))


@pytest.mark.skipif(sentencepiece_missing(), reason="sentencepiece is not installed")
def test_the_sentencepiece_tokenizer_of_siglip(tmp_path):
    import sentencepiece

    prefix = str(tmp_path / "spiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=prefix, vocab_size=80, hard_vocab_limit=False
    )
    tokenizer = transformers.SiglipTokenizer(prefix + ".model", model_input_names=["input_ids"])
    folder = save(tmp_path / "siglip", *siglip_parts(tokenizer))
    model = transformers.SiglipModel.from_pretrained(folder).eval()
    full = {"padding": "max_length", "max_length": 64, "return_tensors": "pt"}
    expected = [row(model.get_text_features(**tokenizer([text], **full))) for text in TEXTS]
    embedder = load_pretrained(str(folder), device="cpu")
    np.testing.assert_allclose(embedder.embed_texts(TEXTS), expected, atol=2e-5)
    rows = embedder.embed_texts(["a dog", "A dog!"])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)


# Fingerprints


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "model.safetensors"]
)
def test_the_fingerprint_is_of_every_file_that_matters(name, copy, embedders):
    assert load_pretrained(str(copy)).fingerprint == embedders["clip"].fingerprint
    if name.endswith(".json"):
        (copy / name).write_text((copy / name).read_text() + "\n")
    else:
        weights = load_file(copy / name)
        weights["text_projection.weight"][0, 0] += 1e-3
        save_file(weights, copy / name, metadata={"format": "pt"})
    assert load_pretrained(str(copy)).fingerprint != embedders["clip"].fingerprint


# What can't be used, in one sentence


def test_naflex_is_refused(tmp_path):
    vision = {**WIDTH, "num_patches": 16, "patch_size": 8}
    text = {**WIDTH, "vocab_size": 40}
    transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=text)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ClipmatchError, match=r"is a NaFlex one.*; choose a SigLIP 2 of fixed resolution"):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize(("text", "kind"), [('{"model_type": "bert"}', "bert"), ('{"hidden_size": 3}', "None")])
def test_another_architecture_is_refused(text, kind, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ClipmatchError, match=f"is of the kind '{kind}'; choose one of these kinds: altclip, .*siglip"):
        load_pretrained(str(tmp_path))


def test_a_folder_without_a_model_or_no_folder(tmp_path):
    with pytest.raises(ClipmatchError, match="holds no Hugging Face model"):
        load_pretrained(str(tmp_path))
    with pytest.raises(ClipmatchError, match=r"The model folder .*nothing does not exist"):
        load_pretrained(str(tmp_path / "nothing"))


def test_weights_must_be_there_whole_and_in_safetensors(copy):
    weights = load_file(copy / "model.safetensors")
    part = {name: value for name, value in weights.items() if not name.startswith("text_model")}
    save_file(part, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ClipmatchError, match=r"lacks \d+ of its weights \(text_model\..*; copy it again"):
        load_pretrained(str(copy))
    (copy / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ClipmatchError, match=r"can't be loaded \(.*\); choose another"):
        load_pretrained(str(copy))
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(ClipmatchError, match="has no weights in safetensors form"):
        load_pretrained(str(copy))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_processor_type": "EfficientNetImageProcessor"}, "EfficientNetImageProcessor is not known"),
        ({"do_normalize": False}, "it leaves out resizing or normalising"),
        ({"do_center_crop": False}, "its pictures are not square"),
        ({"size": {"height": 32, "width": 40}, "do_center_crop": False}, "its pictures are not square"),
        ({"size": {"shortest_edge": 16}}, "it resizes to 16 pixels and then cuts out 32"),
        ({"resample": 0}, "can't be used"),
    ],
)
def test_preprocessing_that_is_not_known_is_refused(changes, reason, copy):
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ClipmatchError, match=f"The preprocessing of .*{reason}.*; choose another model"):
        load_pretrained(str(copy))


def test_preprocessing_and_model_must_agree(copy):
    path = copy / "preprocessor_config.json"
    path.write_text(path.read_text().replace("32", "40"))
    with pytest.raises(ClipmatchError, match="looks at pictures of 32 pixels and its preprocessing makes 40"):
        load_pretrained(str(copy))
    path.unlink()
    with pytest.raises(ClipmatchError, match=r"The preprocessing of .* can't be used"):
        load_pretrained(str(copy))


def test_a_missing_or_damaged_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ClipmatchError, match=r"The tokenizer of .* can't be read"):
        load_pretrained(str(copy))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ClipmatchError, match=r"The tokenizer of .* can't be read"):
        load_pretrained(str(copy))


def test_a_core_installation_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it now raises, as if it were not there
    with pytest.raises(ClipmatchError, match="This needs the package transformers; install it with: pip install"):
        load_pretrained(str(folders["clip"]))


# Names on the hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty local cache of the hub's library."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_cache(cache, name, revision, commit, files):
    """As the hub's library stores a revision of a repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    for path in files:
        shutil.copy(path, repository / "snapshots" / commit)


def test_a_downloaded_model_works_without_network(folders, embedders, hub_cache):
    put_in_cache(hub_cache, "someone/clip", "main", "a" * 40, folders["clip"].iterdir())
    found = load_pretrained("someone/clip", device="cpu")
    assert found.fingerprint == embedders["clip"].fingerprint
    np.testing.assert_allclose(found.embed_texts(TEXTS), embedders["clip"].embed_texts(TEXTS), atol=1e-6)


def test_weights_that_the_hub_converted_work_without_network(folders, embedders, hub_cache):
    old = [path for path in folders["clip"].iterdir() if path.name != "model.safetensors"]
    put_in_cache(hub_cache, "someone/clip", "main", "a" * 40, old)
    put_in_cache(hub_cache, "someone/clip", "refs/pr/7", "b" * 40, folders["clip"].iterdir())
    assert load_pretrained("someone/clip", device="cpu").fingerprint == embedders["clip"].fingerprint


def test_what_is_not_in_the_cache_can_not_be_had_without_network(folders, hub_cache):
    with pytest.raises(ClipmatchError, match="'someone/clip' can't be reached and is not in the local cache"):
        load_pretrained("someone/clip")
    put_in_cache(hub_cache, "someone/clip", "main", "a" * 40, [folders["clip"] / "config.json"])
    with pytest.raises(ClipmatchError, match="'someone/clip' can't be reached and is not in the local cache"):
        load_pretrained("someone/clip")


def test_nothing_is_downloaded_of_another_architecture(hub_cache, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    put_in_cache(hub_cache, "someone/bert", "main", "a" * 40, [tmp_path / "config.json"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: pytest.fail("downloads"))
    with pytest.raises(ClipmatchError, match="is of the kind 'bert'"):
        load_pretrained("someone/bert")


def test_only_the_conversion_of_the_newest_commit_is_taken(monkeypatch):
    """A made-up hub: request 3 was made for an older commit, 5 for the newest."""
    histories = {None: ["new", "old"], "refs/pr/3": ["x", "old"], "refs/pr/5": ["y", "new", "old"]}
    asked = {}

    def commits(hub, name, revision=None):
        return [SimpleNamespace(commit_id=commit) for commit in histories[revision]]

    def discussions(hub, name, **filters):
        asked.update(filters)
        return [SimpleNamespace(git_reference=revision) for revision in ("refs/pr/3", "refs/pr/5")]

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_commits", commits)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_repo_discussions", discussions)
    assert find_conversion("someone/clip") == "refs/pr/5"
    assert asked == {"author": "SFconvertbot", "discussion_type": "pull_request", "discussion_status": "open"}
    del histories["refs/pr/5"][1]
    assert find_conversion("someone/clip") is None
