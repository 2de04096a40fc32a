"""An encoder with relative positions starts as the plain ViT whose weights it takes, and trains more than that."""

from dataclasses import replace

import pytest
import timm
import torch

from mirl.errors import UserError
from mirl.heads.pyramid import ViTPyramid, build_plain
from mirl.heads.relative import build_relative
from mirl.models.weights import Weights
from mirl.training.optimizers import adamw

TABLE = "relative_position_bias_table"


def maps(encoder, images):
    last = len(encoder.blocks) - 1
    return encoder.double().forward_intermediates(images, indices=sorted({0, last}), intermediates_only=True)


def assert_same(weights, size=(64, 64), **options):
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    plain = build_plain(weights, image_size=size, **options)
    relative = build_relative(weights, image_size=size, **options)
    again = build_relative(weights, image_size=size, **(options | {"trained": False, "seed": 9}))
    again.load_state_dict(relative.state_dict())
    with torch.no_grad():
        want = maps(plain, images)
        for encoder in (relative, again):
            for a, b in zip(maps(encoder, images), want, strict=True):
                torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("depth", [2, 24, 54])
def test_it_starts_as_the_plain_vit(make_weights, depth):
    assert_same(make_weights(f"vit_32x2_{depth}", image=32, spread=0.1), (32, 32))


def test_it_starts_as_the_plain_vit_of_another_size(make_weights):
    assert_same(make_weights(spread=0.1), (48, 80))
    assert_same(make_weights(spread=0.1), (96, 64), patch_size=(16, 16))


@pytest.mark.parametrize("change", [{"init_values": 0.3}, {"qkv_bias": False}, {"act_layer": "gelu_tanh"}])
def test_it_starts_as_plain_vits_of_other_forms(make_weights, change):
    weights = make_weights()
    arguments = weights.arguments | change
    torch.manual_seed(0)
    model = timm.create_model(weights.architecture, pretrained=False, **arguments)
    state = {name: value + 0.3 * torch.randn_like(value) for name, value in model.state_dict().items()}
    assert_same(replace(weights, arguments=arguments, state=state))


def test_without_weights_it_is_the_untrained_vit(make_weights):
    assert_same(make_weights(spread=0.1), trained=False, seed=3, depth=4)


def test_every_parameter_has_a_gradient_and_every_table_is_zero_at_first(make_weights):
    encoder = build_relative(make_weights("vit_32x2_3", spread=0.1), image_size=(64, 64))
    tables = {name: value for name, value in encoder.named_parameters() if name.endswith(TABLE)}
    assert list(tables) == [f"blocks.{k}.attn.{TABLE}" for k in range(3)]
    assert not any(value.any() for value in tables.values())
    sum((m * torch.rand_like(m)).sum() for m in ViTPyramid(encoder)(torch.rand(2, 3, 64, 64))).backward()
    assert [name for name, value in encoder.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_a_table_says_where_a_patch_looks(make_weights):
    encoder = build_relative(make_weights("vit_32x2_1", spread=0.1), image_size=(64, 64))
    attention = encoder.blocks[0].attn
    index = attention.relative_position_index[1:, 1:]
    with torch.no_grad():
        getattr(attention, TABLE)[index[9, 0]] = 100.0  # one up, one to the left: patch 9 of rows of 8 looks at 0
    images = torch.rand(1, 3, 64, 64)
    changed = images.clone()
    changed[..., :8, :8] += 1  # patch 0 alone
    with torch.no_grad():
        (a,), (b,) = (encoder.forward_intermediates(i, indices=[0], intermediates_only=True) for i in (images, changed))
    change = (a - b).abs().amax((0, 1)).flatten()
    others = torch.tensor([k for k in range(64) if k // 8 and k % 8 and k != 9])  # all that have such a neighbour
    assert change[9] > 1e-2 and change[others].max() < 1e-5


def test_other_sizes_are_refused(make_weights):
    with pytest.raises(AssertionError, match="64"):
        ViTPyramid(build_relative(make_weights(), image_size=(64, 64)))(torch.rand(1, 3, 96, 64))


def test_relative_positions_under_bfloat16(make_weights):
    pyramid = ViTPyramid(build_relative(make_weights(spread=0.1), image_size=(64, 64)))
    images = torch.rand(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rough = pyramid(images)
    torch.testing.assert_close(rough[2].float(), pyramid(images)[2], atol=0.1, rtol=0.1)
    sum(m.float().square().mean() for m in rough).backward()
    assert all(value.grad.isfinite().all() for value in pyramid.parameters())


def test_checkpointing_computes_relative_blocks_twice_and_changes_nothing(make_weights):
    calls, gradients = [], []
    for checkpointing in (False, True):
        encoder = build_relative(make_weights(spread=0.1), image_size=(64, 64), checkpointing=checkpointing).train()
        calls.append(0)
        for block in encoder.blocks:
            block.norm2.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        encoder.forward_intermediates(images, indices=[1], intermediates_only=True)[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert calls == [2, 4]
    torch.testing.assert_close(*gradients)


def test_drop_path_grows_with_depth_as_in_the_plain_vit(make_weights):
    weights = make_weights("vit_32x2_3")
    encoders = (build(weights, image_size=(64, 64), drop_path=0.2) for build in (build_plain, build_relative))
    plain, relative = ([getattr(b.drop_path2, "drop_prob", 0.0) for b in encoder.blocks] for encoder in encoders)
    assert relative == plain == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_rates_decay_as_in_the_plain_vit(make_weights, depth):
    encoder = build_relative(make_weights(f"vit_32x2_{depth}"), image_size=(64, 64))
    model = torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(32, 7)})
    groups = adamw(
        model, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), fused=False, layer_decay=0.7, encoder=encoder
    ).param_groups
    of = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of) == len(list(model.parameters()))
    for name, parameter in encoder.named_parameters():
        first, *rest = name.split(".")
        layer = int(rest[0]) + 1 if first == "blocks" else 0
        group, spared = of[id(parameter)], parameter.ndim == 1 or first in ("cls_token", "pos_embed") or TABLE in name
        assert group["lr_scale"] == pytest.approx(0.7 ** (depth + 1 - layer), rel=1e-12), name
        assert group["weight_decay"] == (0.0 if spared else 0.05), name
    assert "lr_scale" not in of[id(model["head"].weight)]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit_giant_patch14_dinov2", "GluMlp"), ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_small_patch14_reg4_dinov2", "reg_token"), ("vit_base_patch16_clip_224", r"norm_pre\.weight"),
    ],
)  # fmt: skip
def test_other_transformers_are_refused_in_one_line(name, part):
    arguments = {
        "embed_dim": 48, "num_heads": 2, "depth": 2, "img_size": [32, 32], "patch_size": [8, 8], "in_chans": 3,
        "mlp_ratio": 4, "num_classes": 0,
    }  # fmt: skip
    state = timm.create_model(name, pretrained=False, **arguments).state_dict()
    weights = Weights(name, arguments, state, (0.5,) * 3, (0.25,) * 3)
    expected = f"relative positions need a plain ViT, .* differ in (their )?{part}; leave --relative_positions out"
    with pytest.raises(UserError, match=expected):
        build_relative(weights, image_size=(32, 32))
