"""Names of models say their width, heads and depth, and nothing else."""

import pytest

from mirl.errors import UserError
from mirl.models.encoder import WIDTHS, build_encoder, model_name, parse_model


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("vit_ti_4", (192, 3, 4)),
        ("vit_s_54", (384, 12, 54)),
        ("vit_b_48", (768, 12, 48)),
        ("vit_l_24", (1024, 16, 24)),
        ("vit_512x8_24", (512, 8, 24)),
        ("vit_384x6_12", (384, 6, 12)),  # timm's small, which is not ours
        ("vit_4x1_100", (4, 1, 100)),
    ],
)
def test_a_name_and_its_form_are_the_same_thing(name, form):
    assert parse_model(name) == form
    assert model_name(*form) == name


def test_numbers_may_name_what_has_a_letter():
    for letter, (width, heads) in WIDTHS.items():
        assert parse_model(f"vit_{width}x{heads}_7") == parse_model(f"vit_{letter}_7")
        assert model_name(width, heads, 7) == f"vit_{letter}_7"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_512x12_4", "model 'vit_512x12_4': give a width that 4 and the heads divide, e.g. vit_512x8_24"),
        ("vit_30x3_4", "model 'vit_30x3_4': give a width that 4 and the heads divide, e.g. vit_512x8_24"),
        *((name, f"unknown model '{name}'; use vit_{{ti,s,b,l}}_DEPTH or vit_WIDTHxHEADS_DEPTH, e.g. vit_s_54 or")
          for name in ("vit_h_32", "vit_s_0", "vit_s", "vit_0x1_4", "vit_64x0_4", "vit_064x4_4", "vit_64x_4",
                       "vit_64_4", "vit_64x4_-1", "vit_s_4\n", "resnet50", "")),
    ],
)  # fmt: skip
def test_another_name_is_one_line(name, message):
    with pytest.raises(UserError) as caught:
        parse_model(name)
    assert str(caught.value).startswith(message)


def test_the_name_builds_the_form():
    encoder = build_encoder(*parse_model("vit_64x2_3"), (16, 16), (8, 8), 3)
    assert (encoder.embed_dim, encoder.blocks[0].attn.num_heads, len(encoder.blocks)) == (64, 2, 3)
