"""Frozen features are those of timm's model, of plain tensor operations and, at a block, of an encoder cut there."""

import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mirl.data.labels import open_labelled, open_split
from mirl.data.sources import open_source
from mirl.data.transforms import fixed_view
from mirl.errors import UserError
from mirl.tasks.features import FrozenEncoder, RawPixels, cache, open_encoder
from mirl.tasks.settings.features import FeatureOptions
from mirl.tasks.weights import Weights, open_weights

MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture
def trained(finished, tmp_path):
    """A copy of the run's encoder in which no bias is near zero and no scale near one, as after long training."""
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "encoder" / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in load_file(path).items()}, path)
    return run


def photos(count=6, size=32):
    source = open_source(f"shapes:{count}:{size}")
    return torch.stack([source.read(index) for index in range(count)])


def close(actual, expected, within=1e-5):
    torch.testing.assert_close(actual, expected, atol=within, rtol=0)


def forward(state, images, *, blocks, heads=3, patch=8):
    """Map uint8 images to tokens [b, 1 + n, d] after so many blocks and the final norm, class token first."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    pixels = (images / 255 - MEAN.view(3, 1, 1)) / DEVIATION.view(3, 1, 1)
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.unfold(pixels, patch, stride=patch).mT @ kernel.flatten(1).T + bias
    x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x], dim=1) + state["pos_embed"]
    for i in range(blocks):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")


def test_three_ways_to_the_same_features(trained):
    images = photos()
    state = load_file(trained / "encoder" / "model.safetensors")
    features = FrozenEncoder(open_weights(str(trained)))(images)
    assert features.shape == (6, 1, 192) and features.dtype == torch.float32 and features.std() > 0.1
    assert (features[0] - features[1]).abs().max() > 0.01
    close(features[:, 0], forward(state, images, blocks=4)[:, 1:].mean(dim=1))
    model = timm.create_model(f"local-dir:{trained / 'encoder'}", pretrained=True).eval()
    mean, deviation = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        close(features[:, 0], model((images / 255 - mean) / deviation))


@pytest.mark.parametrize("pool", ["mean", "cls", "patch"])
def test_features_of_a_block_are_those_of_an_encoder_cut_there(trained, pool):
    images, weights = photos(), open_weights(str(trained))
    state = load_file(trained / "encoder" / "model.safetensors")
    every = FrozenEncoder(weights, blocks=[1, 2, 3, 4], pool=pool)
    features = every(images)
    assert features.shape == (6, *every.shape) == (6, 4, *([16] if pool == "patch" else []), 192)
    for block in (1, 2, 3, 4):
        tokens = forward(state, images, blocks=block)
        expected = {"mean": tokens[:, 1:].mean(dim=1), "cls": tokens[:, 0], "patch": tokens[:, 1:]}[pool]
        close(features[:, block - 1], expected)
        close(FrozenEncoder(weights, blocks=[block], pool=pool)(images)[:, 0], expected)
    with torch.no_grad():
        cut = weights.build(depth=2)((images / 255 - MEAN.view(3, 1, 1)) / DEVIATION.view(3, 1, 1))
    if pool == "mean":
        close(features[:, 1], cut)


def test_another_image_size_has_other_patches(trained):
    weights, images = open_weights(str(trained)), photos(2, 64)[:, :, :48]
    large = FrozenEncoder(weights, image_size=(48, 64), pool="patch")
    assert large(images).shape == (2, 1, 48, 192) and large.size == (48, 64)
    model = timm.create_model(f"local-dir:{trained / 'encoder'}", pretrained=True, img_size=(48, 64)).eval()
    with torch.no_grad():
        expected = model((images / 255 - MEAN.view(3, 1, 1)) / DEVIATION.view(3, 1, 1))
    close(FrozenEncoder(weights, image_size=(48, 64))(images)[:, 0], expected)


def test_untrained_features_differ_and_repeat(trained):
    weights, images = open_weights(str(trained)), photos()
    first = FrozenEncoder(weights, untrained=True)(images)
    torch.manual_seed(3)
    assert torch.equal(FrozenEncoder(weights, untrained=True)(images), first)
    assert (first - FrozenEncoder(weights)(images)).abs().mean() > 0.1


def test_bf16_is_close_and_leaves_float32(trained):
    weights, images = open_weights(str(trained)), photos()
    exact, reduced = (FrozenEncoder(weights, precision=precision)(images) for precision in ("32", "bf16"))
    assert reduced.dtype == torch.float32 and not torch.equal(exact, reduced)
    assert F.cosine_similarity(exact[:, 0], reduced[:, 0]).min() > 0.999


def timm_weights(name, **changes):
    """Return one of timm's small test models and its weights."""
    arguments = {"img_size": 32, "patch_size": 8, "in_chans": 3, "num_classes": 0} | changes
    model = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model, Weights(name, arguments, model.state_dict(), (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("name", "changes", "prefix", "pool"),
    [
        ("test_vit", {}, 1, "cls"),  # timm's choice is the class token
        ("test_vit", {"reg_tokens": 2}, 3, "cls"),
        ("test_vit2", {}, 1, "mean"),  # a register, norm after pooling
        ("test_vit2", {"reg_tokens": 0}, 0, "mean"),  # nothing but patches
        ("test_vit2", {"class_token": True}, 2, "mean"),
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [2, 3])
def test_timms_vits_keep_their_features(name, changes, prefix, pool, count):
    torch.manual_seed(0)
    model, weights = timm_weights(name, **changes)
    assert model.num_prefix_tokens == prefix
    images = photos(count)
    with torch.no_grad():
        expected, tokens = model(images / 255), model.forward_features(images / 255)
    close(FrozenEncoder(weights, pool=pool)(images)[:, 0], expected)
    close(FrozenEncoder(weights, pool="patch")(images)[:, 0], tokens[:, prefix:])


def test_the_mean_is_over_patches_also_where_timm_pools_by_attention():
    torch.manual_seed(0)
    model, weights = timm_weights("test_vit3")
    with torch.no_grad():
        expected = model.forward_features(photos() / 255)[:, 1:].mean(dim=1)
    close(FrozenEncoder(weights)(photos())[:, 0], expected)


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 0}], ids=str)
def test_a_class_token_that_is_not_there_is_one_line(changes):
    with pytest.raises(UserError, match="this encoder has no class token; give --pool mean"):
        FrozenEncoder(timm_weights("test_vit2", **changes)[1], pool="cls")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 5}, "--block 5 is not there: the encoder has 4 blocks"),
        ({"block": 0}, "--block 0 is not allowed; give 1 or more"),
        ({"batch_size": 0}, "--batch_size 0 is not allowed; give 1 or more"),
        ({"workers": -1}, "--workers -1 is not allowed; give 0 or more"),
        ({"image_size": 33}, "patches of 8x8 do not tile an image of 33x33; choose --image_size .32,32."),
        ({"image_size": (32, 4)}, "do not tile an image of 32x4"),
        ({"image_size": 0}, "must be positive"),
        ({"weights": None}, "--weights is missing; give a run folder, a timm name, or `pixels`"),
        ({"weights": ""}, "--weights is missing"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(finished, options, message):
    with pytest.raises(UserError, match=message):
        open_encoder(FeatureOptions(**{"weights": str(finished)} | options))


def test_what_is_opened_follows_from_the_options(finished):
    path = finished / "encoder"
    assert open_encoder(FeatureOptions(weights=path)).blocks == [4]  # pathlib's paths are welcome
    encoder = open_encoder(FeatureOptions(weights=str(path), block=2, image_size=16, pool="cls"))
    assert (encoder.blocks, encoder.size, encoder.pool, encoder.shape) == ([2], (16, 16), "cls", (1, 192))
    assert open_encoder(FeatureOptions(weights=str(path)), every_block=True).blocks == [1, 2, 3, 4]
    assert isinstance(open_encoder(FeatureOptions(weights="pixels")), RawPixels)


def test_raw_pixels_are_the_image():
    images = photos(3)
    features = RawPixels()(images)
    assert features.shape == (3, 1, 3072) and features.dtype == torch.float32
    close(features[:, 0].view(3, 3, 32, 32), images / 255)


@pytest.fixture
def folder(tmp_path):
    """Three classes of four images of any size; the grey of each is its number."""
    for number in range(12):
        path = tmp_path / "data" / "abc"[number // 4] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (30 + number, 50), 20 * number).save(path)
    return tmp_path / "data"


@pytest.mark.parametrize("batch_size", [1, 4, 5, 64])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_split_keeps_its_order_and_its_classes(folder, batch_size, workers):
    options = FeatureOptions(weights="pixels", batch_size=batch_size, workers=workers)
    cached = cache(RawPixels(), open_labelled(str(folder)), options, "")
    assert cached.features.shape == (12, 1, 3072) and isinstance(cached.features, np.memmap)
    assert list(cached.labels) == [0] * 4 + [1] * 4 + [2] * 4 and cached.bad == ()
    np.testing.assert_allclose(cached.features[:, 0].mean(axis=1), np.arange(12) * 20 / 255, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
def test_images_that_cannot_be_read_are_left_out_with_their_labels(folder, batch_size, capfd):
    for name in ("a/00.png", "b/05.png", "b/06.png", "c/11.png"):
        (folder / name).write_bytes(b"no image")
    options = FeatureOptions(weights="pixels", batch_size=batch_size, workers=0)
    cached = cache(RawPixels(), open_labelled(str(folder)), options, "")
    left = [1, 2, 3, 4, 7, 8, 9, 10]
    assert list(cached.labels) == [number // 4 for number in left]
    np.testing.assert_allclose(cached.features[:, 0].mean(axis=1), np.array(left) * 20 / 255, atol=1e-6)
    assert [name for name, _ in cached.bad] == [
        str(folder / n) for n in ("a/00.png", "b/05.png", "b/06.png", "c/11.png")
    ]
    assert f"left out {folder}/b/05.png: is not an image\n" in capfd.readouterr().out


def test_a_split_of_bad_files_alone_is_one_line(folder):
    for path in folder.glob("*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of 12 images can be read, e.g. .*/a/00.png is not an image; check"):
        cache(RawPixels(), open_labelled(str(folder)), FeatureOptions(weights="pixels", workers=0), "")


def test_features_that_do_not_fit_on_the_disk_are_one_line(folder):
    encoder = RawPixels()
    encoder.shape = (1, 10**14)
    with pytest.raises(UserError, match=r"features need 4800000.0 GB in .*, which has .*; set TMPDIR to a larger disk"):
        cache(encoder, open_labelled(str(folder)), FeatureOptions(weights="pixels", workers=0), "")


def test_a_part_of_a_split_is_read_by_its_members(folder):
    train, test = open_split(str(folder), val_fraction=0.5, seed=1)
    options = FeatureOptions(weights="pixels", workers=0)
    for part in (train, test):
        cached = cache(RawPixels(), part, options, "")
        assert list(cached.labels) == list(part.members // 4)
        np.testing.assert_allclose(cached.features[:, 0].mean(axis=1), part.members * 20 / 255, atol=1e-6)


def test_an_encoder_sees_the_centre_of_each_image_at_its_own_size(trained, folder):
    encoder = FrozenEncoder(open_weights(str(trained)))
    split = open_labelled(str(folder))
    cached = cache(encoder, split, FeatureOptions(weights="run", workers=0, batch_size=5), "")
    views = torch.stack([fixed_view(split.source.read(index), (32, 32)) for index in range(12)])
    close(torch.from_numpy(cached.features), encoder(views))
