"""`--weights` opens every form of a run as the same encoder, at any size and depth; what holds none is one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg
from torch.nn import functional as F

import mirl
from mirl.errors import UserError
from mirl.models.encoder import ARCHITECTURE, build_encoder, timm_arguments
from mirl.tasks.weights import Weights, open_weights

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run that may be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def features(path, **options):
    with torch.no_grad():
        return open_weights(str(path), **options).build(num_classes=0)(IMAGES)


def mistake(weights):
    with pytest.raises(UserError) as caught:
        open_weights(str(weights))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_form_of_a_run_is_the_same_encoder(finished, copy):
    expected = features(finished)
    assert expected.shape == (2, 192) and expected.std() > 0.1
    for part in ("encoder", "encoder/model.safetensors", "autoencoder.safetensors"):
        assert torch.equal(features(finished / part), expected), part
    shutil.copy(finished / "encoder" / "model.safetensors", copy / "autoencoder.safetensors")
    shutil.rmtree(copy / "encoder")
    said = []
    assert torch.equal(features(copy, say=said.append), expected)
    assert said == [f"{copy} is not finished: using its checkpoint of step 6"]


def test_home_is_expanded(finished, monkeypatch):
    monkeypatch.setenv("HOME", str(finished.parent))
    assert open_weights("~/run").name == "vit_ti_4"


@pytest.mark.parametrize("part", ["encoder", "autoencoder.safetensors"])
def test_what_the_weights_know_of_their_model(finished, part):
    weights = open_weights(str(finished / part))
    assert (weights.name, weights.depth, weights.channels) == ("vit_ti_4", 4, 3)
    assert (weights.image_size, weights.patch_size, weights.classes) == ((32, 32), (8, 8), ())
    assert (weights.mean, weights.deviation) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_untrained_weights_depend_on_the_seed_alone(finished):
    weights = open_weights(str(finished))
    first = weights.build(trained=False)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, other = weights.build(trained=False), weights.build(trained=False, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    trained = weights.build().state_dict()
    for name in ("blocks.0.attn.qkv.weight", "blocks.3.mlp.fc2.weight", "patch_embed.proj.weight", "cls_token"):
        assert torch.equal(first.state_dict()[name], again.state_dict()[name])
        assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
        assert not torch.equal(first.state_dict()[name], trained[name])
    assert torch.equal(first.pos_embed, weights.build().pos_embed)  # sines and cosines are not trained


def test_a_model_may_be_cut_or_get_a_head(finished):
    weights = open_weights(str(finished))
    short, headed = weights.build(depth=2), weights.build(num_classes=7)
    assert len(short.blocks) == 2 and headed.head.weight.shape == (7, 192)
    state = load_file(finished / "encoder" / "model.safetensors")
    for model in (short, headed):
        own = model.state_dict()
        common = own.keys() & state.keys()
        assert len(common) > 20 and all(torch.equal(own[name], state[name]) for name in common)


def weights_of(image_size, patch_size):
    """Return weights of a small encoder whose positions are random, as if they were learned."""
    torch.manual_seed(1)
    encoder = build_encoder(192, 3, 2, image_size, patch_size, 3)
    torch.nn.init.normal_(encoder.pos_embed)
    arguments = timm_arguments(192, 3, 2, image_size, patch_size, 3)
    return Weights(ARCHITECTURE, arguments, encoder.state_dict(), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "other"),
    [
        ((32, 32), (8, 8), (64, 48)),
        ((32, 48), (8, 4), (64, 48)),
        ((16, 64), (8, 8), (64, 16)),  # as many patches, elsewhere
        ((32, 128), (8, 16), (64, 64)),
        ((32, 48), (8, 4), (32, 48)),
    ],
)
def test_another_image_size_resamples_positions(image_size, patch_size, other):
    weights = weights_of(image_size, patch_size)
    old, new = ([i // p for i, p in zip(size, patch_size, strict=True)] for size in (image_size, other))
    grid = weights.state["pos_embed"][:, 1:].unflatten(1, old).movedim(-1, 1)
    expected = F.interpolate(grid, new, mode="bicubic", antialias=True).flatten(2).mT
    model = weights.build(img_size=other)
    assert model.pos_embed.shape == (1, 1 + new[0] * new[1], 192)
    torch.testing.assert_close(model.pos_embed[:, 1:], expected, atol=1e-6, rtol=0)
    assert torch.equal(model.pos_embed[:, :1], weights.state["pos_embed"][:, :1])
    assert model(torch.zeros(1, 3, *other)).shape == (1, 192)


def test_another_patch_size_resamples_the_patch_embedding():
    weights = weights_of((32, 32), (8, 8))
    model = weights.build(img_size=(64, 64), patch_size=(16, 16))
    assert model.patch_embed.proj.weight.shape == (192, 3, 16, 16)
    smooth = torch.ones(1, 3, 64, 64) * torch.tensor([0.3, -0.2, 0.9]).view(3, 1, 1)
    expected = weights.build().patch_embed(smooth[..., :32, :32])
    torch.testing.assert_close(model.patch_embed(smooth), expected, atol=1e-3, rtol=0)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Let timm find weights of one of its models on the disk instead of the hub; return the model."""

    def publish(name):
        registered = timm.models._registry._model_pretrained_cfgs[f"{name}.r160_in1k"]
        model = timm.create_model(name).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # its scales of layers are 1e-5: no block would matter
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        save_file(model.state_dict(), tmp_path / "timm.safetensors")
        monkeypatch.setattr(registered, "file", str(tmp_path / "timm.safetensors"))
        return model

    return publish


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
@pytest.mark.parametrize("tag", ["", ".r160_in1k"])
def test_a_timm_name_is_timms_model(hub, name, tag):
    model, weights = hub(name), open_weights(name + tag)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(weights.build()(images), expected, atol=1e-5, rtol=0)
    assert (weights.image_size, weights.patch_size, weights.mean) == ((160, 160), (16, 16), (0.5, 0.5, 0.5))
    assert weights.depth == len(model.blocks)
    assert weights.name == f"vit_64x2_{weights.depth}"
    assert get_pretrained_cfg(f"{name}.r160_in1k").file  # the weights came from there


def test_weights_that_timm_cannot_fetch_are_one_line(hub, tmp_path):
    hub("test_vit")
    (tmp_path / "timm.safetensors").unlink()
    assert "timm cannot fetch the weights of test_vit: " in mistake("test_vit")


@pytest.mark.parametrize(("name", "kind"), [("resnet18", "ResNet"), ("eva02_tiny_patch14_224", "Eva"),
                                            ("vit_small_r26_s32_224", "VisionTransformer")])  # fmt: skip
def test_a_timm_model_that_is_no_plain_vit_is_refused_before_it_is_fetched(name, kind):
    assert mistake(name).startswith(f"{name} is a {kind}, not a plain ViT; give a run folder, ")


def test_nothing_there_is_one_line(tmp_path):
    assert mistake("vit_s_54").startswith("'vit_s_54' is neither a file, a folder nor the name of a timm model; give")
    assert "neither a file, a folder" in mistake(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a file, a folder"):
        mirl.load_encoder(Path("nowhere"))
    assert mistake(tmp_path).startswith(f"{tmp_path} holds no encoder; give a run folder, its encoder/, ")


def test_a_run_without_checkpoints_says_how_to_finish_it(copy):
    for name in ("encoder", "checkpoints"):
        shutil.rmtree(copy / name)
    assert mistake(copy) == f"{copy} holds no encoder yet; finish it with mirl pretrain --out {copy} --resume"
    (copy / "config.yaml").unlink()
    assert "holds no encoder; give" in mistake(copy)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("part", ["encoder", "encoder/model.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda encoder: halve(encoder / "model.safetensors"),
        lambda encoder: (encoder / "model.safetensors").write_bytes(b""),
        lambda encoder: halve(encoder / "config.json"),
        lambda encoder: (encoder / "config.json").write_text("{}"),
        lambda encoder: (encoder / "config.json").write_text("[]"),
        lambda encoder: save_file({"x": torch.zeros(1)}, encoder / "model.safetensors"),
    ],
    ids=["half", "empty", "half a config", "empty config", "another config", "other tensors"],
)
def test_a_damaged_encoder_is_one_line(copy, part, damage):
    damage(copy / "encoder")
    reason = r"encoder(: its config.json lacks pretrained_cfg| cannot be read as an encoder \(.+\)); give a run folder"
    assert re.search(reason, mistake(copy / part))


def test_a_file_without_its_model_is_one_line(copy):
    halve(copy / "autoencoder.safetensors")
    assert re.search(r"autoencoder.safetensors cannot be read \(.+\); give", mistake(copy / "autoencoder.safetensors"))
    assert re.search(r"config.yaml cannot be read \(.+\); give", mistake(copy / "config.yaml"))
    lonely = shutil.copy(copy / "encoder" / "model.safetensors", copy.parent / "model.safetensors")
    open_weights(lonely, say=(said := []).append)
    assert said == [f"{lonely} does not tell its attention heads: taken for 3"]
    save_file({"x": torch.zeros(1)}, lonely)
    assert mistake(lonely) == f"{lonely}: the file holds no ViT that is known here: it lacks 'cls_token'"


def test_a_detector_is_refused_and_its_encoder_named(tmp_path, monkeypatch):
    about = {"settings": {"protocol": "coco_1x", "weights": "runs/a"}, "encoder": {}, "categories": []}
    save_file({"x": torch.zeros(1)}, path := tmp_path / "detector.safetensors", {"mirl": json.dumps(about)})
    assert mistake(path) == f"{path} holds a detector; give the encoder that it was trained from, runs/a"
    (path := tmp_path / "backbone.onnx").touch()
    monkeypatch.setattr("mirl.formats.graphs.read_onnx", lambda _: ({"backbone": 192}, {}))
    assert mistake(path).startswith(f"{path} holds a detector's backbone, which cannot be read back; give the encoder ")


def test_weights_that_lack_a_tensor_are_refused(copy):
    """Else the missing one would keep its random first values, and nobody would know."""
    path = copy / "encoder" / "model.safetensors"
    state = load_file(path)
    del state["blocks.1.mlp.fc1.weight"]
    save_file(state, path)
    assert "blocks.1.mlp.fc1.weight" in mistake(copy)


def test_classes_of_a_head_are_read(copy):
    path = copy / "encoder" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["label_names"] = ["cat", "dog"]
    path.write_text(json.dumps(config))
    assert open_weights(str(copy)).classes == ("cat", "dog")
