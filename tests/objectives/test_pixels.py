"""The loss is the paper's equations and nothing else."""

import pytest
import torch

from mirl.methods import Term, mirl
from mirl.objectives.pixels import pixel_target, reconstruction_loss, to_pixels


def test_one_term_is_equation_6():
    main, residual, truth = torch.randn(3, 2, 5, 12)
    loss, _ = reconstruction_loss([main, residual], {"image": truth}, [Term((1, 2), 1.0)])
    by_hand = ((truth - main - residual) ** 2).sum(-1) / 12  # per patch
    torch.testing.assert_close(loss, by_hand.mean(1))


def test_the_total_is_equation_7():
    predictions, truth = torch.randn(6, 2, 5, 12), torch.randn(2, 5, 12)
    loss, terms = reconstruction_loss(list(predictions), {"image": truth}, mirl(6, 6).terms)
    assert terms.shape == (3, 2)
    torch.testing.assert_close(loss, terms.mean(0))  # lambda_g = 2 / G = 1 / 3


def test_the_deep_decoder_fits_the_residual_of_the_shallow_one():
    truth, main = torch.randn(2, 2, 5, 12)
    loss, _ = reconstruction_loss([main, truth - main], {"image": truth}, [Term((1, 2), 1.0)])
    assert loss.max() < 1e-10


def test_loss_is_float32_even_for_bfloat16_predictions():
    predictions = [torch.randn(2, 5, 12, dtype=torch.bfloat16)]
    assert (
        reconstruction_loss(predictions, {"image": torch.zeros(2, 5, 12)}, [Term((1,), 1.0)])[0].dtype == torch.float32
    )


def test_normalised_targets_have_mean_0_and_unbiased_variance_1():
    target = pixel_target(torch.rand(2, 5, 48) * 7 + 3, "normalised")
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["normalised", "raw"])
def test_to_pixels_undoes_the_target(kind):
    patches = torch.rand(2, 5, 48) * 7 + 3
    torch.testing.assert_close(to_pixels(pixel_target(patches, kind), patches, kind), patches)


def test_a_flat_patch_has_a_finite_target():
    assert pixel_target(torch.full((1, 1, 48), 0.5), "normalised").abs().max() < 1e-2
