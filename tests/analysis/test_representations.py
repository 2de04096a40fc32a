"""Measures of representations agree with arithmetic by hand, with timm's own attention, and with what was planted."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from mirl.analysis.representations import Observation, attention_entropy, cka, cka_between, finite, observe
from mirl.data.loading import Views
from mirl.data.sources import open_source
from mirl.data.transforms import fixed_view, standardise
from mirl.errors import UserError
from mirl.models.weights import Weights
from mirl.tasks.features import FrozenEncoder
from mirl.tasks.settings.features import ReadingOptions

OPTIONS = ReadingOptions(batch_size=8, workers=0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(size=(32, 32), depth=3, **changes):
    """Return a ViT of random weights, of timm's kinds too."""
    arguments = {
        "img_size": size, "patch_size": (8, 8), "in_chans": 3, "embed_dim": 32, "num_heads": 4, "num_classes": 0,
        "class_token": True, "global_pool": "avg",
    } | changes  # fmt: skip
    form = Weights("vit_tiny_patch16_224", arguments, {f"blocks.{depth - 1}.x": torch.empty(0)}, (0.5,) * 3, (0.2,) * 3)
    state = form.build(seed=1, trained=False).state_dict()
    return replace(form, state={name: value + 0.1 * random(*value.shape) for name, value in state.items()})


def shapes(size=(32, 32), count=20):
    source = open_source(f"shapes:{count}:32")
    return Views(source, torch.arange(count).numpy(), lambda image: fixed_view(image, size))


def test_cka_is_one_for_the_same_up_to_rotation_scale_and_shift():
    rows = random(60, 10)
    rotation = torch.linalg.qr(random(10, 10, seed=1))[0]
    assert cka(rows, rows) == pytest.approx(1, abs=1e-5)
    assert cka(rows, 7 * rows @ rotation + 3) == pytest.approx(1, abs=1e-5)


def test_cka_by_hand():
    """Song et al. (2012), Eq. 5, written out."""

    def hsic(a, b):
        a, b, n = a - a.diag().diag(), b - b.diag().diag(), len(a)
        ones = torch.ones(n, dtype=a.dtype)
        middle = (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2))
        return ((a @ b).trace() + middle - 2 / (n - 2) * (ones @ a @ b @ ones)) / (n * (n - 3))

    one, other = random(12, 4).double(), random(12, 4).double() + random(12, 4, seed=1).double()
    a, b = one @ one.T, other @ other.T
    assert cka(one, other) == pytest.approx((hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()).item(), abs=1e-6)


def test_cka_of_independent_rows_is_nothing_even_where_they_are_fewer_than_the_width():
    found = [cka(random(30, 200, seed=i), random(30, 200, seed=1000 + i)) for i in range(40)]
    assert abs(sum(found) / 40) < 0.02 and max(found) < 0.2
    assert cka_between([random(30, 200), random(30, 200, seed=1), random(30, 200)])[0].tolist() == pytest.approx(
        [1, cka(random(30, 200), random(30, 200, seed=1)), 1], abs=1e-5
    )


def test_what_a_block_keeps_is_judged_without_what_positions_share():
    positions, content, other = 10 * random(1, 6, 8), random(40, 6, 8, seed=1), random(40, 6, 8, seed=2)
    rows = [(positions + part).flatten(0, 1) for part in (content, content, other, torch.zeros(40, 6, 8))]
    still = dict.fromkeys(("similarity", "norm", "update", "cosine"), [0.0] * 3)
    measures = Observation(rows, still, 40, ()).measures()
    assert measures.cka[1][2] > 0.95 and measures.kept[0] == pytest.approx(1) and abs(measures.kept[1]) < 0.1
    assert math.isnan(measures.kept[2])


def test_rows_that_are_all_alike_have_no_cka():
    assert math.isnan(cka(torch.ones(20, 5) / 3, random(20, 5)))
    assert finite({"a": [1.0, math.nan], "b": (math.inf, "c", None)}) == {"a": [1.0, None], "b": [None, "c", None]}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_entropy_is_that_of_timms_own_maps(qk_norm):
    torch.manual_seed(0)
    attention = Attention(24, num_heads=3, qkv_bias=True, qk_norm=qk_norm, norm_layer=torch.nn.LayerNorm).eval()
    attention.fused_attn = False
    maps = []
    attention.attn_drop.register_forward_pre_hook(lambda _, given: maps.append(given[0]))
    tokens = 3 * random(2, 9, 24)
    with torch.no_grad():
        attention(tokens)
        found = attention_entropy(attention, tokens)
        entropy = -(maps[0] * maps[0].log()).sum(-1).mean((1, 2)) / math.log(9)
        torch.testing.assert_close(found, entropy)
        assert 0.2 < entropy.mean() < 0.98
        attention.qkv.weight[:24].zero_()
        attention.qkv.bias[:24].zero_()
        torch.testing.assert_close(attention_entropy(attention, tokens), torch.ones(2))


@pytest.mark.parametrize("changes", [{}, {"class_token": False}, {"reg_tokens": 2, "init_values": 0.1}], ids=str)
def test_blocks_are_measured_as_by_hand(changes):
    opened, images = weights(**changes), shapes(count=12)
    encoder = FrozenEncoder(opened)
    seen = observe(encoder, images, OPTIONS, "")
    measures = seen.measures()
    model: VisionTransformer = encoder.encoder
    with torch.no_grad():
        pixels = standardise(torch.cat([images[0, i].images for i in range(12)]), opened.mean, opened.deviation)
        tokens = [model.norm_pre(model._pos_embed(model.patch_embed(pixels)))]
        for block in model.blocks:
            tokens.append(block(tokens[-1]))
    tokens = [t[:, model.num_prefix_tokens :] for t in tokens]
    assert seen.images == 12 and measures.depth == 3 and len(measures.rank) == 4
    assert measures.norm == pytest.approx([t.norm(dim=-1).mean().item() for t in tokens], rel=1e-4)
    pairs = list(pairwise(tokens))
    assert measures.update == pytest.approx(
        [((b - a).norm(dim=-1) / a.norm(dim=-1)).mean().item() for a, b in pairs], rel=1e-4
    )
    cosines = [F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in pairs]
    assert measures.cosine == pytest.approx(cosines, rel=1e-4)
    rows = [F.layer_norm(t, (32,)).flatten(0, 1) for t in tokens]
    assert [len(part) for part in seen.rows] == [12 * 16] * 4
    assert measures.cka[1][3] == pytest.approx(cka(rows[1], rows[3]), abs=1e-4)
    assert measures.cka[2][2] == pytest.approx(1)
    content = [(r - r.mean(dim=0)).flatten(0, 1) for r in (rows[i].unflatten(0, (12, 16)) for i in (1, 2))]
    assert measures.kept[1] == pytest.approx(cka(*content), abs=1e-4) and len(measures.kept) == 3
    assert all(0 < value <= 1 for value in measures.entropy)
    assert not any(block._forward_hooks for block in model.blocks)


def test_any_form_of_image_is_looked_at():
    encoder = FrozenEncoder(weights(), image_size=(16, 48))
    measures = observe(encoder, shapes((16, 48)), OPTIONS, "").measures()
    assert all(math.isfinite(value) for row in measures.cka for value in row)


def test_attention_that_is_not_timms_own_has_no_entropy():
    class Other(Attention):
        pass

    encoder = FrozenEncoder(weights())
    encoder.encoder.blocks[1].attn.__class__ = Other
    measures = observe(encoder, shapes(), OPTIONS, "").measures()
    assert measures.entropy is None and len(measures.update) == 3


def test_damaged_weights_are_named_by_their_block():
    opened = weights()
    opened.state["blocks.1.mlp.fc2.bias"][3] = math.nan
    with pytest.raises(UserError, match="tokens after block 2 are not finite numbers: the weights are damaged"):
        observe(FrozenEncoder(opened), shapes(), OPTIONS, "")


def test_too_few_patches_are_an_error():
    with pytest.raises(UserError, match="8 patches in all are too few to look at; give more --images"):
        observe(FrozenEncoder(weights((16, 16))), shapes((16, 16), 2), OPTIONS, "")
    with pytest.raises(UserError, match="cuts an image into a single patch"):
        observe(FrozenEncoder(weights((8, 8))), shapes((8, 8), 2), OPTIONS, "")
