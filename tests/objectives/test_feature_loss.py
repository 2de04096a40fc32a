"""The feature loss compares directions of tokens, of sums of decoders, with the terms' weights."""

import pytest
import torch

from mirl.methods import Term, coarse_to_fine, mirl
from mirl.objectives.features import feature_loss, standardise_tokens


def tokens(count):
    return torch.randn(count, 2, 5, 24, generator=torch.Generator().manual_seed(0))


def test_standardised_tokens_have_mean_0_and_variance_1():
    found = standardise_tokens(7 * tokens(1)[0].bfloat16() + 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var(-1, unbiased=False), torch.ones(2, 5), atol=1e-4, rtol=0)


def test_it_is_twice_one_minus_the_correlation():
    prediction, teacher = tokens(2)
    loss = feature_loss([prediction], teacher, [Term((1,), 1.0)])
    pairs = zip(prediction.flatten(0, 1), teacher.flatten(0, 1), strict=True)
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).view(2, 5)
    torch.testing.assert_close(loss, 2 * (1 - correlation).mean(1), atol=1e-4, rtol=0)


def test_neither_scale_nor_offset_of_a_token_matters():
    prediction, teacher = tokens(2)
    expected = feature_loss([prediction], teacher, [Term((1,), 1.0)])
    torch.testing.assert_close(feature_loss([9 * prediction - 4], teacher, [Term((1,), 1.0)]), expected)
    assert feature_loss([0.5 * teacher + 1], teacher, [Term((1,), 1.0)]).max() < 1e-4


def test_pairs_are_added_up_and_weighted():
    predictions, teacher = tokens(6), tokens(7)[6]
    terms = mirl(6, 6).terms
    alone = [feature_loss([predictions[g] + predictions[5 - g]], teacher, [Term((1,), 1.0)]) for g in range(3)]
    torch.testing.assert_close(feature_loss(list(predictions), teacher, terms), torch.stack(alone).mean(0))


def test_a_part_of_an_image_has_the_whole_token():
    shallow, teacher = tokens(2)
    terms = coarse_to_fine(6, 2).terms
    assert feature_loss([shallow, teacher], teacher, terms) == pytest.approx(
        feature_loss([shallow], teacher, [Term((1,), 0.5)]), abs=1e-4
    )


def test_a_detached_member_gets_no_gradient():
    main, residual, teacher = (each.requires_grad_() for each in tokens(3))
    feature_loss([main, residual], teacher.detach(), [Term((1, 2), 1.0, detached=(1,))]).sum().backward()
    assert main.grad is None and residual.grad.any()
