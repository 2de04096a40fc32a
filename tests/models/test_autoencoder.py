"""The autoencoder does what the methods say, and computes no more than the loss needs."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mirl.errors import UserError
from mirl.methods import (
    Method,
    coarse_to_fine,
    explicit_residual,
    fine_to_coarse,
    mae,
    mirl,
    multi_decoder,
    truncated_mae,
)
from mirl.models.autoencoder import Autoencoder, build_autoencoder
from mirl.models.decoder import DecoderShape
from mirl.models.encoder import embed_visible, run_segments
from mirl.models.masking import split
from mirl.models.patches import gather, patchify
from mirl.objectives.features import feature_loss
from mirl.objectives.frequency import part_targets
from mirl.objectives.pixels import pixel_target, reconstruction_loss

PAPER = DecoderShape(32, 2, 4)
OFFICIAL = DecoderShape(32, 2, 4, did_blocks="all", did_memory="embedded", weight_norm=True)
FEATURES = DecoderShape(32, 1, 4, features=24)
METHODS = [
    mae(6), truncated_mae(6, 4), mirl(6, 1), mirl(6, 2), mirl(6, taps=(1, 3, 4, 6)), mirl(6, 6), mirl(6, taps=(1, 6)),
    mirl(6, 2, context="none"), mirl(6, 6, context="previous"), multi_decoder(6, 3), coarse_to_fine(6, 6),
    fine_to_coarse(6, 2, context="previous"), explicit_residual(6, 2), explicit_residual(6, 6, context="none"),
]  # fmt: skip


def autoencoder(method: Method, shape: DecoderShape = PAPER, **options) -> Autoencoder:
    torch.manual_seed(0)
    sizes = {"image_size": (32, 32), "patch_size": (8, 8), "channels": 3} | options
    return build_autoencoder("vit_48x4_6", method, shape, **sizes)


def example(model: Autoencoder, images: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    patches = torch.randn(images, len(model.positions), model.patch_values)
    return patches, *split(torch.rand(images, len(model.positions)), 0.75)


def label(value: object) -> str | None:
    return f"{value.name}{len(value.taps)}-{value.context}" if isinstance(value, Method) else None


def targets_of(patches: torch.Tensor, masked: torch.Tensor, *, coarse: float = 0.5) -> dict[str, torch.Tensor]:
    """Return the whole image and parts of it, of which one has a share of every pixel."""
    hidden = gather(patches, masked)
    return {"image": pixel_target(hidden, "normalised")} | part_targets(hidden, coarse * hidden, "normalised")


def loss_of(
    model: torch.nn.Module, method: Method, patches: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    """Return the mean loss; where the model predicts features, of these too, which are pixels here."""
    unwrapped = model.module if isinstance(model, DistributedDataParallel) else model
    pixels, features = unwrapped.parted(model(patches, visible, masked))
    loss, _ = reconstruction_loss(pixels, targets_of(patches, masked), method.terms)
    if unwrapped.shape.features:
        loss = loss + feature_loss(features, gather(patches, masked)[..., : unwrapped.shape.features], method.terms)
    return loss.mean()


@pytest.mark.parametrize("shape", [PAPER, OFFICIAL, FEATURES], ids=["paper", "official", "features"])
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_every_parameter_gets_a_gradient(method, shape):
    model = autoencoder(method, shape)
    loss_of(model, method, *example(model)).backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert without == []


@pytest.mark.parametrize("shape", [PAPER, OFFICIAL, DecoderShape(32, 1, 4)], ids=["paper", "official", "one block"])
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_masked_predictions_equal_the_full_computation(method, shape):
    model = autoencoder(method, shape)
    patches, visible, masked = example(model)
    full = model(patches, visible, masked, all_patches=True)
    for short, whole in zip(model(patches, visible, masked), full, strict=True):
        assert whole.shape[1] == patches.shape[1]
        torch.testing.assert_close(short, whole[:, visible.shape[1] :], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_a_prediction_depends_on_the_blocks_up_to_its_tap_and_no_deeper(method):
    model = autoencoder(method, FEATURES)
    batch = example(model)
    before = model(*batch)
    assert len(model.encoder.blocks) == method.taps[-1]
    for number in range(method.depth, 0, -1):
        for parameter in model.encoder.blocks[number - 1].parameters():
            parameter.add_(0.1)
        after = model(*batch)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [tap < number for tap in method.taps]
        before = after


@torch.no_grad()
@pytest.mark.parametrize(
    ("context", "read"),
    [
        ("none", [{1}, {2}, {3}]),
        ("previous", [{0, 1}, {1, 2}, {2, 3}]),
        ("dense", [{0, 1}, {0, 1, 2}, {0, 1, 2, 3}]),
    ],
)
def test_a_decoder_reads_its_own_segment_and_its_context(context, read):
    """Each z_g is set from outside, so that it tells nothing of those before."""
    model = autoencoder(multi_decoder(6, 3, context=context))
    patches, visible, masked = example(model)
    outputs = torch.randn(3, len(patches), 1 + visible.shape[1], model.encoder.embed_dim)
    for block, output in zip(model.encoder.blocks[1::2], outputs, strict=True):
        block.register_forward_hook(lambda *_, output=output: output)
    before = model(patches, visible, masked)
    for segment in range(4):
        changed = outputs[segment - 1] if segment else patches  # z_0 is the embedding of the patches
        changed += torch.randn_like(changed)
        after = model(patches, visible, masked)
        different = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert different == [segment in sources for sources in read]
        before = after


def gradients(model: Autoencoder, losses: torch.Tensor) -> list[bool]:
    """Tell of each decoder whether these losses train it."""
    model.zero_grad()
    losses.sum().backward()
    return [any(p.grad is not None and p.grad.any() for p in decoder.parameters()) for decoder in model.decoders]


def test_every_term_trains_its_decoders_and_no_other():
    """Of an explicit residual, the deep one alone: what the shallow one predicts is taken as it is."""
    expected = {
        mirl(6, 2): [[True, True]], multi_decoder(6, 2): [[True, False], [False, True]],
        coarse_to_fine(6, 2): [[True, False], [False, True]], explicit_residual(6, 2): [[True, False], [False, True]],
    }  # fmt: skip
    for method, trained in expected.items():
        model = autoencoder(method)
        patches, visible, masked = example(model)
        for number, decoders in enumerate(trained):
            losses = reconstruction_loss(model(patches, visible, masked), targets_of(patches, masked), method.terms)[1]
            assert gradients(model, losses[number]) == decoders, method.name


@pytest.mark.parametrize(("build", "parts"), [(coarse_to_fine, "coarse fine"), (fine_to_coarse, "fine coarse")])
def test_shallow_and_deep_learn_different_parts(build, parts):
    model = autoencoder(build(6, 2))
    patches, visible, masked = example(model)
    predictions, targets = model(patches, visible, masked), targets_of(patches, masked, coarse=0.9)
    _, losses = reconstruction_loss(predictions, targets, model.method.terms)
    for loss, prediction, part in zip(losses, predictions, parts.split(), strict=True):
        torch.testing.assert_close(loss, (prediction - targets[part]).square().mean(dim=(1, 2)))
    assert not torch.allclose(targets["coarse"], targets["fine"], atol=0.1)


def two_steps(model: torch.nn.Module, method: Method, *batch: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # an unused parameter is an error in the second
        optimizer.zero_grad()
        loss_of(model, method, *batch).backward()
        optimizer.step()


def be_one_of_two(rank: int, rendezvous: str) -> None:
    """Train each method on half a batch; the first process compares with the whole batch in one."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for method in METHODS:
        together = autoencoder(method, FEATURES)
        batch = example(together, images=4)
        two_steps(
            DistributedDataParallel(together, find_unused_parameters=False), method,
            *(each[2 * rank : 2 * rank + 2] for each in batch),
        )  # fmt: skip
        if rank == 0:
            alone = autoencoder(method, FEATURES)
            two_steps(alone, method, *batch)
            torch.testing.assert_close(together.state_dict(), alone.state_dict(), atol=1e-5, rtol=1e-4)
    torch.distributed.destroy_process_group()


def test_two_processes_train_every_method_as_one_does(tmp_path):
    torch.multiprocessing.spawn(be_one_of_two, (str(tmp_path / "rendezvous"),), nprocs=2)


def test_only_visible_patches_matter_for_predictions():
    model = autoencoder(mirl(6, 2))
    patches, visible, masked = example(model)
    changed = patches.scatter(1, masked[..., None].expand(-1, -1, patches.shape[-1]), 9.0)
    for a, b in zip(model(patches, visible, masked), model(changed, visible, masked), strict=True):
        assert torch.equal(a, b)


def test_visible_embedding_equals_timms_own():
    model = autoencoder(mae(6), image_size=(32, 48), patch_size=(8, 4), channels=5)
    images = torch.randn(2, 5, 32, 48)
    everything = torch.arange(len(model.positions)).expand(2, -1)
    tokens = embed_visible(model.encoder, patchify(images, (8, 4)), everything)
    ours = model.encoder.norm(run_segments(model.encoder, tokens, (6,))[-1])
    torch.testing.assert_close(ours, model.encoder.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"image_size": (24, 40), "patch_size": (8, 4), "channels": 1}, {"image_size": (4, 4), "patch_size": (1, 1)},
    {"image_size": (32, 32), "patch_size": (16, 8), "channels": 7},
])  # fmt: skip
def test_any_size_patch_and_channels(options):
    model = autoencoder(mirl(6, 2), **options)
    predictions = model(*example(model))
    assert [p.shape for p in predictions] == [(2, predictions[0].shape[1], model.patch_values)] * 2


def test_weight_norm_gives_each_input_feature_unit_length():
    model = autoencoder(mirl(6, 2), OFFICIAL)
    torch.testing.assert_close(model.decoders[0].predict.weight.norm(dim=0), torch.ones(32))


def test_bfloat16_is_close_to_float32():
    model = autoencoder(mirl(6, 2))
    batch = example(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*batch)
    for a, b in zip(low, model(*batch), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.05)


def test_patches_that_do_not_tile_are_refused_with_a_near_size():
    with pytest.raises(UserError, match=r"choose --image_size \[32,32\]"):
        autoencoder(mae(6), image_size=(30, 33))
