"""The paper's Table 3: parameters with the 1000-class head, multiply-adds without the attention products."""

import pytest

from mirl.analysis.cost import info

# model: millions of parameters, G multiply-adds, both truncated as the paper prints them
PAPER = {"vit_b_12": (86, 16.8), "vit_s_54": (96, 18.8), "vit_b_24": (171, 33.5), "vit_b_48": (341, 67.0)}


def counted(model: str, **options) -> tuple[float, float]:
    cost = info(model, **options)
    return cost.parameters_with_head / 1e6, cost.encoder.linear / 1e9


@pytest.mark.parametrize("model", PAPER)
def test_counts_equal_table_3_to_the_printed_digit(model):
    parameters, multiply_adds = counted(model)
    assert (int(parameters), int(multiply_adds * 10) / 10) == PAPER[model]


def test_vit_large_differs_from_the_paper_by_what_docs_explain():
    # The paper prints 307 M and 59.7 G, the customary figures for ViT-L; the model itself has 304.3 M and 59.65 G.
    parameters, multiply_adds = counted("vit_l_24")
    assert parameters == pytest.approx(304.3, abs=0.05)
    assert multiply_adds == pytest.approx(59.65, abs=0.01)


def test_a_step_costs_three_forward_passes_and_grows_with_decoders():
    mirl, mae = info("vit_s_54"), info("vit_s_54", method="mae")
    for cost in (mirl, mae):
        forward = cost.step.encoder.total + cost.step.decoders.total
        assert cost.step.forward_and_backward.linear == pytest.approx(3 * forward, rel=0.15)
    assert mirl.step.encoder == mae.step.encoder
    assert mirl.step.decoders.total > mae.step.decoders.total


def test_the_table_is_printed(capsys):
    info("vit_ti_4", image_size=32)
    printed = capsys.readouterr().out
    assert "4 blocks, width 192, 3 heads, 32x32 px, patches of 4x4" in printed
    assert "1000-class head" in printed


def test_decoders_of_equal_blocks_cost_about_the_same_in_every_method(capsys):
    """What `studies/` rests on: twelve decoder blocks in all, one decoder's or shared by two, four or six."""
    sizes = {"image_size": 32, "decoder_width": 96}
    alone = info("vit_ti_24", method="mae", decoder_depth=12, **sizes).step.decoders.total
    for segments in (2, 4, 6):
        for method in ("mirl", "multi_decoder"):
            shared = info("vit_ti_24", method=method, segments=segments, decoder_depth=12 // segments, **sizes)
            assert shared.step.decoders.total == pytest.approx(alone, rel=0.15)


def test_a_truncated_encoder_is_counted_as_it_is_built(capsys):
    whole, truncated = info("vit_ti_8", method="mae"), info("vit_ti_8", method="truncated_mae", taps=[4])
    assert truncated.step.encoder.total == pytest.approx(whole.step.encoder.total / 2, rel=0.05)
    assert "the first 4 of 8 blocks" in capsys.readouterr().out
