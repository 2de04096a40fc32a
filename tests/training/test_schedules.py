"""Learning rates and weight decay."""

import math

import numpy as np
import pytest
import torch

from mirl.models.encoder import build_encoder
from mirl.training.optimizers import adamw
from mirl.training.schedules import learning_rate, undecayed_steps


def test_step_schedule_is_the_papers():
    # 300 epochs, 40 of warm-up, x0.1 at 90 % and x0.01 at 95 %
    plan = {"peak": 1.0, "warmup": 40, "schedule": "step"}
    rates = {epoch: learning_rate(epoch, 300, **plan) for epoch in (0, 20, 40, 269, 270, 284, 285, 299)}
    assert rates == pytest.approx({0: 0, 20: 0.5, 40: 1, 269: 1, 270: 0.1, 284: 0.1, 285: 0.01, 299: 0.01})


def test_cosine_schedule_goes_from_peak_to_zero():
    plan = {"peak": 2.0, "warmup": 10, "schedule": "cosine"}
    assert [learning_rate(done, 100, **plan) for done in (10, 55, 100)] == pytest.approx([2, 1, 0])


def test_linear_schedule_falls_evenly_from_peak_to_its_least():
    plan = {"peak": 2.0, "warmup": 10, "schedule": "linear"}
    assert [learning_rate(done, 100, **plan) for done in (5, 10, 55, 100)] == pytest.approx([1, 2, 1, 0])
    assert [learning_rate(done, 100, **plan, least=0.5) for done in (10, 40, 100)] == pytest.approx([2, 1.5, 0.5])


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(0, 10, peak=1.0, warmup=0, schedule="step") == 1


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(1, 20), (2, 6), (10, 1), (10, 7), (300, 313), (800, 312)])
def test_a_run_is_undecayed_up_to_its_first_decay(epochs, steps_per_epoch):
    def rate(step, length=epochs):
        return learning_rate(step / steps_per_epoch, length, peak=1.5e-4, warmup=0.3, schedule="step")

    kept = undecayed_steps(epochs, steps_per_epoch)
    assert rate(kept - 1) == 1.5e-4 and rate(kept) == pytest.approx(1.5e-5)
    # What came before is to the bit what a run of any greater length does.
    assert [rate(step) for step in range(kept)] == [rate(step, 3 * epochs) for step in range(kept)]


@pytest.mark.parametrize("least", [0.0, 1e-6, 1e-3])
def test_fine_tuning_follows_maes_schedule(least):
    """Epoch e of 100, 5 of them warm-up from zero, then half a cosine to the least rate."""
    peak, warmup, epochs = 2e-3, 5, 100
    for e in np.linspace(0, 100, 301):
        if e < warmup:
            expected = peak * e / warmup
        else:
            expected = least + (peak - least) * 0.5 * (1 + math.cos(math.pi * (e - warmup) / (epochs - warmup)))
        found = learning_rate(e, epochs, peak=peak, warmup=warmup, schedule="cosine", least=least)
        assert found == pytest.approx(expected, abs=1e-12), e


def test_a_run_that_is_all_warm_up_rises_to_its_end():
    rates = [learning_rate(step, 4, peak=2.0, warmup=4, schedule="cosine", least=1e-6) for step in range(4)]
    assert rates == pytest.approx([0, 0.5, 1, 1.5])


def test_norms_and_biases_are_not_decayed():
    encoder = build_encoder(48, 4, 2, (16, 16), (4, 4), 3)
    groups = adamw(encoder, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95), fused=True).param_groups
    decayed = {id(p): group["weight_decay"] == 0.05 for group in groups for p in group["params"]}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert decayed[id(parameter)] == (parameter.ndim > 1), name
    assert id(encoder.pos_embed) not in decayed  # fixed positions are not trained


def test_fused_adamw_is_deterministic():
    def weights() -> torch.Tensor:
        torch.manual_seed(0)
        encoder = build_encoder(48, 4, 2, (16, 16), (4, 4), 3)
        optimizer = adamw(encoder, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95), fused=True)
        for _ in range(3):
            encoder(torch.ones(2, 3, 16, 16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return encoder.blocks[0].attn.qkv.weight.detach()

    assert torch.equal(weights(), weights())
