"""A plan's memory equals what autograd saves, its arithmetic adds up, and it says what it does not know."""

from functools import partial

import pytest
import torch

from mirl.analysis import timing
from mirl.analysis.machines import GPUS
from mirl.analysis.memory import HALF, saved_by, step_memory
from mirl.analysis.planning import plan
from mirl.errors import UserError
from mirl.models.attention import choose_attention
from mirl.tasks.settings.planning import PlanOptions
from mirl.tasks.settings.pretraining import autoencoder_of, method_of

TINY = {
    "model": "vit_ti_4", "image_size": 32, "images": 1000, "batch_size": 64, "decoder_width": 32, "decoder_depth": 1
}  # fmt: skip


def tiny_settings(precision="32", **options):
    return PlanOptions(**TINY | options).settings(precision)


def counted(settings, **options):
    with torch.device("meta"):
        model = autoencoder_of(settings)
    return step_memory(model, settings.mask_ratio, settings.precision, **options)


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("method", ["mirl", "mae"])
def test_counted_activations_equal_those_of_a_real_forward_pass(precision, method):
    settings = tiny_settings(precision, method=method)
    memory, model = counted(settings, gpu=False), autoencoder_of(settings)
    choose_attention(model, torch.device("cpu"), HALF.get(precision, torch.float32))
    for images in (2, 5):
        saved = saved_by(model, images, settings.mask_ratio, precision)
        assert saved.total == memory.copies + images * memory.image
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim > 1)
    assert memory.copies == pytest.approx(2 * weights if precision == "bf16" else 0, rel=0.05, abs=0.02 * weights)
    assert counted(settings).image <= memory.image  # a GPU's attention keeps no more


def test_counted_checkpoints_equal_what_training_with_them_keeps():
    settings = tiny_settings()
    memory, model = counted(settings), autoencoder_of(settings)
    few, plain = (saved_by(model, images, settings.mask_ratio, "32") for images in (2, 4))
    model.set_checkpointing()
    again = saved_by(model, 4, settings.mask_ratio, "32")
    assert again.total == pytest.approx(sum(plain.kept.values()), rel=1e-3)
    assert again.total < plain.checkpointed < plain.total
    assert plain.checkpointed - few.checkpointed == 2 * memory.checkpointed
    assert plain.checkpointed <= 4 * memory.checkpointed + memory.copies


def test_what_fits_is_the_largest_multiple_of_eight():
    memory = counted(tiny_settings())
    for checkpointing in (False, True):
        needed = partial(memory.needed, checkpointing=checkpointing)
        assert memory.fitting(needed(31), checkpointing=checkpointing) == 24
        assert memory.fitting(needed(32), checkpointing=checkpointing) == 32
    assert memory.fitting(memory.weights / 2) == 0
    assert counted(tiny_settings(), devices=2).weights - memory.weights == 4 * memory.trained


def test_hours_follow_from_the_vendors_figures_and_are_said_to_be_assumed(capsys):
    found = plan(model="vit_b_4", epochs=800, gpus=32, gpu="h200", price=2.5)
    printed = capsys.readouterr().out
    assert "assumed for a width of 768, not measured on h200" in printed
    arithmetic = found.flops * 4096 * found.steps
    at_peak = arithmetic / (GPUS["h200"].half * found.pace.efficiency) / 3600
    assert found.steps == 1281167 // 4096 * 800
    assert at_peak < found.device_hours < 1.1 * at_peak  # updates of weights besides
    assert found.cost == pytest.approx(2.5 * found.device_hours)
    assert found.images_per_second == pytest.approx(found.steps * 4096 / found.hours / 3600)
    assert found.memory.needed(found.fits) < 0.9 * 139.7 * 2**30 < found.memory.needed(found.fits + 8)


def test_a_given_efficiency_is_taken(capsys):
    slow, fast = (plan(**TINY, gpu="a100", efficiency=share) for share in (0.2, 0.4))
    assert slow.pace.seconds > 1.5 * fast.pace.seconds
    assert "assumed" not in capsys.readouterr().out


def test_a_plan_for_this_machine_measures_it(capsys):
    found = plan(**TINY, precision="32")
    assert "measured here: 2 blocks with all decoders, 2 blocks alone, 8 images at once" in capsys.readouterr().out
    assert 0 < found.pace.efficiency < 1
    assert found.pace.seconds > 8 * found.flops / found.pace.machine.single
    assert found.pace.micro_batch == 64


@pytest.mark.parametrize(
    "options, depth, least",
    [
        ({"model": "vit_ti_54"}, 54, 6),
        ({"model": "vit_ti_12", "taps": [3, 12]}, 12, 2),
        ({"model": "vit_ti_12", "method": "mae"}, 12, 1),
        ({"model": "vit_ti_12", "method": "truncated_mae", "taps": [9]}, 9, 1),
        ({"model": "vit_ti_8", "method": "multi_decoder", "segments": 4, "context": "none"}, 8, 4),
    ],
)
def test_a_steps_time_is_a_line_over_depth_at_as_many_decoders(options, depth, least, monkeypatch):
    class Clock:
        """Blocks that take a second, on top of ten, each with an update of a tenth, on top of one."""

        encoder = None

        def __init__(self, fabric, settings, blocks=None, images=None, like=None):
            method = method_of(settings)
            self.blocks = method.depth if images is None else blocks
            assert len(method.taps) == least
            self.fixed = (10, 1) if images is None else (0, 0)

        def step(self, clock):
            return self.fixed[0] + self.blocks, self.fixed[1] + self.blocks / 10

    monkeypatch.setattr(timing, "_Whole", lambda fabric, settings, images: Clock(fabric, settings))
    monkeypatch.setattr(timing, "_Blocks", Clock)
    found = timing.time_step(None, tiny_settings(**options), images=4)
    assert found.passes == pytest.approx((10 + depth) / 4)
    assert found.update == pytest.approx(1 + depth / 10)
    assert found.blocks[0] == least


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gpu": "h300"}, "--gpu h300 is not known; give one of b200, h200, .* or here"),
        ({"gpu": "h200", "gpus": 3}, "--batch_size 64 cannot be shared by 3 GPUs; give a multiple of 3"),
        ({"gpus": 0}, "--gpus 0 is not allowed; give 1 or more"),
        ({"price": -1}, "--price -1 is not allowed"),
        ({"efficiency": 1.5, "gpu": "h200"}, "--efficiency 1.5 is not allowed; give more than 0 and at most 1"),
        ({"efficiency": 0.5}, "--efficiency has no effect with --gpu here"),
        ({"images": 10}, "--batch_size 64 is more than the 10 images"),
        ({"gpu": "v100", "precision": "bf16"}, "v100 has none; give 16, 32 or auto"),
    ],
)
def test_mistakes_are_said_in_a_line(options, words):
    with pytest.raises(UserError, match=words):
        plan(**TINY | options)
