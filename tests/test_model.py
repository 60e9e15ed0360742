"""Encoders, heads and the whole model: shapes, numbers against plain transformers, every kind of backbone."""

import http.server
import math
import threading
import time

import pytest
import torch
from conftest import tiny_config
from torch import nn

from clipmatch.config import ModelConfig
from clipmatch.errors import ClipmatchError
from clipmatch.model import (
    CLIPModel,
    ImageEncoder,
    ProjectionHead,
    TextEncoder,
    blocks_of,
    build_backbone,
    tower_config,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PICTURE = {**SMALL, "image_size": 32, "patch_size": 16}
STAGES = {"hidden_sizes": [8, 24], "depths": [1, 1]}
VISION = {  # model type -> its config and how many tokens come before those of the patches; None: feature maps
    "vit": (PICTURE, 1),
    "deit": (PICTURE, 2),
    "dinov2": (PICTURE, 1),
    "dinov2_with_registers": (PICTURE, 5),
    "clip_vision_model": (PICTURE, 1),
    "siglip_vision_model": (PICTURE, 0),
    "swin": (
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        0,
    ),
    "convnext": ({**STAGES, "num_stages": 2, "image_size": 32}, None),
    "resnet": ({**STAGES, "embedding_size": 8, "layer_type": "basic"}, None),
    "mobilenet_v1": ({"depth_multiplier": 0.25, "image_size": 32}, None),  # its config names no width at all
}
TEXT = {
    "distilbert": {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "bert": {"vocab_size": 50, **SMALL},
    "roberta": {"vocab_size": 50, **SMALL, "pad_token_id": 1},
    "clip_text_model": {"vocab_size": 50, **SMALL},
}


def pixels(count=2, side=32, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def words(*lengths, seed=0):
    """Random ids of these lengths, padded with 0, and their mask."""
    ids = torch.randint(5, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CLIPModel(tiny_config(50)).eval()


# The parts


def test_image_encoder_is_the_class_token_through_fc():
    encoder = ImageEncoder({"model_type": "vit", **PICTURE}).eval()
    assert type(encoder.backbone).__name__ == "ViTModel"
    hidden = encoder.backbone(pixel_values=pixels()).last_hidden_state
    assert hidden.shape == (2, 5, 32)
    torch.testing.assert_close(encoder(pixels()), encoder.fc(hidden[:, 0]))
    assert encoder(pixels()).shape == (2, 256)


def test_text_encoder_is_the_first_token_through_fc():
    encoder = TextEncoder({"model_type": "distilbert", **TEXT["distilbert"]}).eval()
    assert type(encoder.backbone).__name__ == "DistilBertModel"
    ids, mask = words(4, 7)
    hidden = encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder(ids, mask), encoder.fc(hidden[:, 0]))
    assert encoder(ids, mask).shape == (2, 256)


def test_projection_head_is_linear_gelu_linear_residual_norm():
    head = ProjectionHead().eval()
    x = torch.randn(3, 256)
    first = head.linear_in(x)
    by_hand = nn.functional.layer_norm(
        first + head.linear_out(nn.functional.gelu(first)), (256,), head.norm.weight, head.norm.bias
    )
    torch.testing.assert_close(head(x), by_hand)
    kinds = [type(part) for part in head.children()]
    assert kinds == [nn.Linear, nn.GELU, nn.Linear, nn.Dropout, nn.LayerNorm]


def test_dropout_acts_in_training_and_only_on_the_refinement():
    head, x = ProjectionHead(dropout=0.5).train(), torch.randn(4, 256)
    assert not torch.equal(head(x), head(x))
    nn.init.zeros_(head.linear_out.weight)
    nn.init.zeros_(head.linear_out.bias)
    assert torch.equal(head(x), head(x))  # what is left is the residual, which is never dropped


@pytest.mark.parametrize("name", VISION)
def test_any_vision_backbone(name):
    values, leading = VISION[name]
    side = values.get("image_size", 32)
    torch.manual_seed(0)
    encoder = ImageEncoder({"model_type": name, **values}, embed_dim=16, pooling="mean").eval()
    hidden = encoder.backbone(pixel_values=pixels(side=side)).last_hidden_state
    mean = hidden.mean(dim=(2, 3)) if leading is None else hidden[:, leading:].mean(dim=1)
    if leading:
        assert hidden.shape[1] == leading + 4  # 2 x 2 patches
    torch.testing.assert_close(encoder(pixels(side=side)), encoder.fc(mean))
    assert len(blocks_of(encoder.backbone)) >= 1
    again = build_backbone(tower_config(encoder.backbone))
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in encoder.backbone.state_dict().items()
    }


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_any_text_backbone(name, pooling):
    torch.manual_seed(0)
    encoder = TextEncoder({"model_type": name, **TEXT[name]}, embed_dim=16, pooling=pooling).eval()
    assert not [key for key in encoder.state_dict() if "pooler" in key]
    ids, mask = words(4, 7)
    both = encoder(ids, mask)
    assert both.shape == (2, 16)
    torch.testing.assert_close(both[:1], encoder(ids[:1, :4], mask[:1, :4]), atol=1e-5, rtol=0)  # no padding


def test_class_token_and_mean_side_by_side():
    encoder = ImageEncoder({"model_type": "dinov2", **PICTURE}, 16, "cls+mean").eval()
    hidden = encoder.backbone(pixel_values=pixels()).last_hidden_state
    torch.testing.assert_close(encoder.features(pixels()), torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1))


@pytest.mark.parametrize("name", ["vit", "deit"])
@pytest.mark.parametrize("last", [1, 2])
def test_features_from_the_middle_equal_those_from_pixels(name, last):
    encoder = ImageEncoder({"model_type": name, **PICTURE}, 16, "mean").eval()
    assert encoder.splittable
    middle = encoder.hidden_before(pixels(), last)
    torch.testing.assert_close(encoder.features_from(middle, last), encoder.features(pixels()))


def test_backbones_of_another_build_are_not_split():
    for name in ("dinov2", "swin", "clip_vision_model"):
        assert not ImageEncoder({"model_type": name, **VISION[name][0]}, 16, "mean").splittable


# The whole


def test_each_tower_alone_gives_unit_vectors(model):
    ids, mask = words(5, 3, 9)
    images, texts = model.encode_image(pixels(4)), model.encode_text(ids, mask)
    assert images.shape == (4, 16)
    assert texts.shape == (3, 16)
    for rows in (images, texts):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


def test_forward_is_scale_times_cosine(model):
    ids, mask = words(5, 3, 9)
    logits = model(pixels(4), ids, mask)
    by_hand = model.logit_scale * model.encode_image(pixels(4)) @ model.encode_text(ids, mask).T
    assert logits.shape == (4, 3)
    torch.testing.assert_close(logits, by_hand)


def test_projection_of_features_equals_encoding(model):
    ids, mask = words(5, 3)
    torch.testing.assert_close(
        model.project_image(model.image_encoder.features(pixels())), model.encode_image(pixels())
    )
    torch.testing.assert_close(model.project_text(model.text_encoder.features(ids, mask)), model.encode_text(ids, mask))


def test_text_vectors_do_not_depend_on_padding_or_neighbours(model):
    ids, mask = words(4, 9, 6)
    together = model.encode_text(ids, mask)
    for row, length in enumerate((4, 9, 6)):
        alone = model.encode_text(ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


def test_vectors_are_float32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        rows = model.encode_image(pixels())
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))


def test_everything_learns(model):
    ids, mask = words(5, 3, 4)
    model.train()
    nn.functional.cross_entropy(model(pixels(3), ids, mask), torch.arange(3)).backward()
    idle = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert idle == []


def test_logit_scale_starts_at_clips_value_and_is_clamped(model):
    assert model.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    model.log_logit_scale.data.fill_(9.0)
    assert 99.9 < model.logit_scale.item() <= 100


def test_a_clamped_logit_scale_can_come_down_again(model):
    model.log_logit_scale.data.fill_(9.0)
    optimizer = torch.optim.SGD([model.log_logit_scale], lr=0.001)
    model.logit_scale.backward()  # the loss asks for a smaller scale
    optimizer.step()
    assert model.logit_scale.item() < 95
    assert math.log(100) - 0.2 < model.log_logit_scale.item() < math.log(100)


# Where towers come from


def test_a_local_folder_brings_its_weights(tmp_path):
    torch.manual_seed(0)
    source = build_backbone({"model_type": "vit", **PICTURE})
    source.save_pretrained(tmp_path / "vit")
    encoder = ImageEncoder(str(tmp_path / "vit"), 16)
    assert torch.equal(encoder.backbone.layers[0].mlp.fc1.weight, source.layers[0].mlp.fc1.weight)


def test_half_precision_weights_become_float32(tmp_path):
    build_backbone({"model_type": "vit", **PICTURE}).half().save_pretrained(tmp_path / "vit")
    encoder = ImageEncoder(str(tmp_path / "vit"), 16)
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}
    assert encoder(pixels()).dtype == torch.float32


def test_pickled_weights_are_refused(tmp_path):
    backbone = build_backbone({"model_type": "vit", **PICTURE})
    backbone.config.save_pretrained(tmp_path / "vit")
    torch.save(backbone.state_dict(), tmp_path / "vit" / "pytorch_model.bin")
    with pytest.raises(ClipmatchError, match=r"holds no Hugging Face model \(config.json and model.safetensors\)"):
        build_backbone(str(tmp_path / "vit"))


@pytest.mark.parametrize(
    ("tower", "sentence"),
    [
        ({"hidden_size": 8}, 'needs its "model_type"'),
        ({"model_type": "vot"}, "type 'vot' is wrong"),
        ({"model_type": "vit", "hidden_size": "wide"}, "type 'vit' is wrong"),
        ({"model_type": "t5"}, "more than one encoder; name a plain vision or text encoder"),
        ({"model_type": "clip"}, "more than one encoder; name a plain vision or text encoder"),
        ("./nowhere", "holds no Hugging Face model"),
        ("nobody/no-such-model", "can't be reached and is not in the local cache.*name a local model folder"),
        ("no such name at all", "holds no Hugging Face model"),
    ],
)
def test_towers_that_can_not_be_had(tower, sentence):
    start = time.monotonic()
    with pytest.raises(ClipmatchError, match=sentence) as caught:
        build_backbone(tower)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


def test_an_unreachable_hub_is_not_asked_again_and_again(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    start = time.monotonic()
    with pytest.raises(ClipmatchError, match="can't be reached"):
        build_backbone("nobody/no-such-model")
    assert time.monotonic() - start < 10  # the hub's own library takes half a minute


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers each request with the status and error code set in `answer`."""
    answer = {"status": 404, "code": "RepoNotFound"}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(answer["status"])
            if answer["code"]:
                self.send_header("X-Error-Code", answer["code"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (404, "RepoNotFound", "has no model 'some/model', or only for those logged in; check the spelling"),
        (401, "RepoNotFound", "has no model 'some/model', or only for those logged in; check the spelling"),
        (403, "GatedRepo", "only to those allowed; accept its terms, log in by: hf auth login"),
        (403, None, "only to those allowed"),
    ],
)
def test_a_hub_that_refuses(hub, status, code, sentence):
    hub.update(status=status, code=code)
    with pytest.raises(ClipmatchError, match=sentence) as caught:
        build_backbone("some/model")
    assert "\n" not in str(caught.value)


def test_unknown_pooling_is_refused():
    with pytest.raises(ClipmatchError, match="image_pooling must be one of"):
        ModelConfig(image_pooling="max")
