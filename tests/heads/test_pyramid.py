"""Pyramids have the strides they promise, windowed encoders the weights they were given, and nothing is unused."""

from dataclasses import replace

import pytest
import timm
import torch

from mirl.errors import UserError
from mirl.heads.pyramid import (
    SimplePyramid,
    ViTPyramid,
    build_plain,
    build_windowed,
    global_blocks,
    pyramid_taps,
)
from mirl.models.weights import Weights


@pytest.mark.parametrize(
    ("depth", "taps"),
    [
        (12, (4, 6, 8, 12)), (24, (8, 12, 16, 24)), (48, (16, 24, 32, 48)), (54, (18, 27, 36, 54)),
        (1, (1, 1, 1, 1)), (2, (1, 1, 1, 2)), (3, (1, 1, 2, 3)), (4, (1, 2, 2, 4)),
    ],
)  # fmt: skip
def test_taps_are_shares_of_the_depth(depth, taps):
    assert pyramid_taps(depth) == taps


def test_global_blocks_end_quarters():
    assert global_blocks(12) == (2, 5, 8, 11)
    assert global_blocks(24) == (5, 11, 17, 23)
    assert [global_blocks(depth) for depth in (1, 2, 3, 4)] == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]
    assert len(global_blocks(54)) == 4 and global_blocks(54)[-1] == 53


def pyramids(weights, **options):
    plain, other = (build_plain(weights, **options) for _ in range(2))
    windowed = build_windowed(weights, image_size=(64, 64), window=3, **options)
    return [ViTPyramid(plain), SimplePyramid(other, 16), SimplePyramid(windowed, 16)]


@pytest.mark.parametrize("depth", [1, 3])
def test_maps_have_their_strides_and_every_parameter_a_gradient(make_weights, depth):
    for pyramid in pyramids(make_weights(f"vit_32x2_{depth}")):
        maps = pyramid(torch.rand(2, 3, 48, 80))
        assert pyramid.strides == (2, 4, 8, 16)
        assert [tuple(m.shape) for m in maps] == [
            (2, channels, 48 // stride, 80 // stride)
            for channels, stride in zip(pyramid.channels, pyramid.strides, strict=True)
        ]
        sum((m * torch.rand_like(m)).sum() for m in maps).backward()
        assert [name for name, value in pyramid.named_parameters() if value.grad is None] == []


def test_maps_are_those_of_their_blocks(make_weights):
    pyramid = ViTPyramid(build_plain(make_weights("vit_32x2_6"))).eval()
    encoder, images = pyramid.encoder, torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        tokens = encoder._pos_embed(encoder.patch_embed(images))
        after = [tokens := block(tokens) for block in encoder.blocks]
        read = pyramid.read(images)
    assert pyramid.taps == (2, 3, 4, 6)
    for tap, found in zip(pyramid.taps, read, strict=True):
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), after[tap - 1][:, 1:])


def test_a_pyramid_knows_the_pixels_under_it(make_weights):
    """A change of one corner changes that corner of the finest map most, whatever the scale."""
    torch.manual_seed(0)
    for pyramid in pyramids(make_weights(spread=0.05)):
        images = torch.rand(1, 3, 64, 64)
        changed = images.clone()
        changed[:, :, 48:, :16] += 1
        with torch.no_grad():
            for before, after in zip(pyramid.eval()(images), pyramid(changed), strict=True):
                change = (after - before).square().sum(1)[0]
                cells = len(change) // 4
                rows, columns = divmod(int(change.argmax()), change.shape[1])
                assert rows >= len(change) - cells and columns < cells


def test_without_windows_it_is_the_plain_vit_on_the_same_tokens(make_weights):
    weights = make_weights("vit_32x2_3", spread=0.1)
    windowed = build_windowed(weights, image_size=(64, 64), window=3)
    for block in windowed.blocks:
        block.window_size = 0
    plain = timm.create_model(
        weights.architecture, pretrained=False, class_token=False, **(weights.arguments | {"global_pool": ""})
    ).eval()
    state = {name: value for name, value in weights.state.items() if name != "cls_token"}
    plain.load_state_dict(state | {"pos_embed": state["pos_embed"][:, 1:]})
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        want = plain.forward_intermediates(images, indices=[0, 1, 2], intermediates_only=True)
        got = windowed.forward_intermediates(images, indices=[0, 1, 2], intermediates_only=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_windows_hide_what_is_outside(make_weights):
    encoder = build_windowed(make_weights("vit_32x2_8", spread=0.1), image_size=(64, 64), window=4)
    images = torch.rand(1, 3, 64, 64)
    changed = images.clone()
    changed[..., :32, :32] += 1
    with torch.no_grad():
        maps = [encoder.forward_intermediates(i, indices=[0, 1], intermediates_only=True) for i in (images, changed)]
    first, second = ((a - b).abs().amax((0, 1)) for a, b in zip(*maps, strict=True))
    assert first[4:].max() == 0 and first[:, 4:].max() == 0 and first[:4, :4].min() > 0
    assert second[4:, 4:].min() > 0  # of the quarter's end, which sees everything


def test_every_weight_of_the_blocks_is_taken(make_weights):
    weights = make_weights("vit_32x2_3", spread=0.1)
    windowed = build_windowed(weights, image_size=(64, 64)).state_dict()
    blocks = {name: value for name, value in weights.state.items() if name.startswith(("blocks.", "patch_embed."))}
    assert len(blocks) == 3 * 12 + 2
    for name, value in blocks.items():
        torch.testing.assert_close(windowed.pop(name), value)
    assert windowed.pop("pos_embed").shape == (1, 8, 8, 32)
    assert {name.split(".")[-1] for name in windowed} == {"rel_pos_h", "rel_pos_w"}
    assert not any(value.any() for value in windowed.values())


def test_positions_of_patches_are_resampled_without_the_class_token(make_weights):
    weights = make_weights(spread=0.1)
    own = build_windowed(weights, image_size=(64, 64)).pos_embed
    torch.testing.assert_close(own.flatten(1, 2), weights.state["pos_embed"][:, 1:])
    wide = build_windowed(weights, image_size=(64, 128)).pos_embed
    assert wide.shape == (1, 8, 16, 32)
    torch.testing.assert_close(wide.mean(), own.mean(), atol=0.02, rtol=0)


def test_another_patch_size_keeps_the_positions(make_weights):
    weights = make_weights(image=40, patch=10, spread=0.1)
    encoder = build_plain(weights, patch_size=(16, 16))
    torch.testing.assert_close(encoder.pos_embed.detach(), weights.state["pos_embed"])
    assert ViTPyramid(encoder).strides == (4, 8, 16, 32)


@pytest.mark.parametrize("build", [build_plain, build_windowed])
def test_a_patch_without_quarters_is_one_line(make_weights, build):
    with pytest.raises(UserError, match="patches of 10x10 have no square quarters .* --patch_size 16"):
        build(make_weights(image=40, patch=10), image_size=(40, 40))


def test_windows_keep_the_activation(make_weights):
    weights = make_weights()
    other = replace(weights, arguments=weights.arguments | {"act_layer": "gelu_tanh"})
    plain, windowed = build_plain(other), build_windowed(other, image_size=(64, 64))
    x = torch.linspace(-3, 3, 50)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    assert all((encoder.blocks[0].mlp.act(x) == expected).all() for encoder in (plain, windowed))


def test_windows_do_not_fit_any_transformer(make_weights):
    weights = make_weights()
    pre_norm = {"norm_pre.weight": torch.ones(32), "norm_pre.bias": torch.zeros(32)}
    other = replace(weights, arguments=weights.arguments | {"pre_norm": True}, state=weights.state | pre_norm)
    with pytest.raises(UserError, match=r"windows need a plain ViT, .* norm_pre\.weight; use --protocol coco_1x"):
        build_windowed(other, image_size=(64, 64))


@pytest.mark.parametrize(
    ("name", "part"),
    [("vit_giant_patch14_dinov2", "GluMlp"), ("vit_small_patch16_18x2_224", "ParallelThingsBlock")],
)
def test_windows_do_not_fit_other_blocks(name, part):
    arguments = {
        "embed_dim": 48, "num_heads": 2, "depth": 2, "img_size": [32, 32], "patch_size": [8, 8], "in_chans": 3,
        "mlp_ratio": 4, "num_classes": 0,
    }  # fmt: skip
    state = timm.create_model(name, pretrained=False, **arguments).state_dict()
    weights = Weights(name, arguments, state, (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(UserError, match=f"windows need a plain ViT, .* differ in their {part}; use --protocol coco_1x"):
        build_windowed(weights, image_size=(32, 32))


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_checkpointing_computes_blocks_twice_and_changes_nothing(make_weights, kind):
    calls, gradients = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        pyramid = pyramids(make_weights("vit_32x2_2", spread=0.1), checkpointing=checkpointing)[kind].train()
        calls.append(0)
        for block in pyramid.encoder.blocks:
            block.norm2.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        sum(m.square().mean() for m in pyramid(images)).backward()
        gradients.append([parameter.grad for parameter in pyramid.parameters()])
    assert calls == [2, 4]
    torch.testing.assert_close(*gradients)


def test_drop_path_grows_with_depth(make_weights):
    weights = make_weights("vit_32x2_3")
    for encoder in (build_plain(weights, drop_path=0.2), build_windowed(weights, image_size=(64, 64), drop_path=0.2)):
        rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in encoder.blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2])
