"""A segmenter's maps, losses and gradients are what they say, for any depth, patch and batch."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mirl.data.semantic import IGNORE
from mirl.errors import UserError
from mirl.heads.pyramid import build_plain
from mirl.heads.relative import build_relative
from mirl.heads.upernet import build_segmenter


@pytest.fixture
def make_segmenter(make_weights):
    """Make a small segmenter of five classes."""

    def make(name="vit_32x2_2", *, build=build_plain, classes=5, width=16, seed=0, **form):
        weights = make_weights(name, spread=0.05, **form)
        encoder = build(weights, image_size=weights.image_size)
        return build_segmenter(
            encoder, classes=classes, width=width, mean=weights.mean, deviation=weights.deviation, seed=seed
        ).eval()

    return make


def batch(count, height=64, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, height, width, generator=generator)
    labels = torch.randint(5, (count, height, width), generator=generator).to(torch.uint8)
    labels[:, :9] = IGNORE
    return images, labels


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_scores_are_at_a_quarter_of_a_patch(make_segmenter, patch):
    segmenter = make_segmenter(patch=patch)
    assert (segmenter.pyramid.strides[0], segmenter.multiple, segmenter.fixed_size) == (patch // 4, 2 * patch, None)
    with torch.no_grad():
        scores = segmenter(torch.rand(2, 3, 64, 96))
    assert scores.shape == (2, 5, 256 // patch, 384 // patch)


def test_images_are_normalised_within(make_segmenter):
    segmenter, images = make_segmenter(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(segmenter(images), segmenter.scores((images - 0.5) / 0.25))


def test_scores_are_those_of_the_pixels_under_them(make_segmenter):
    segmenter, images = make_segmenter(), torch.rand(1, 3, 128, 128)
    changed = images.clone()
    changed[..., 96:, :32] = 1 - changed[..., 96:, :32]
    with torch.no_grad():
        change = (segmenter(images) - segmenter(changed)).square().sum(1)[0]
    row, column = divmod(int(change.argmax()), change.shape[1])
    assert change.shape == (64, 64) and row >= 44 and column < 20


@pytest.mark.parametrize("build", [build_plain, build_relative])
def test_losses_are_cross_entropies_over_all_pixels(make_segmenter, build):
    segmenter, (images, labels) = make_segmenter(build=build), batch(2)
    with torch.no_grad():
        losses, scores = segmenter(images, labels), segmenter(images)
    large = F.interpolate(scores, (64, 64), mode="bilinear", align_corners=False).log_softmax(1)
    for k in range(2):
        labelled = labels[k] != IGNORE
        truth = labels[k][labelled].long()
        said = large[k][:, labelled]
        expected = -said.gather(0, truth[None]).sum() / (64 * 64)
        torch.testing.assert_close(losses["decode"][k], expected)
        torch.testing.assert_close(losses["accuracy"][k], (said.argmax(0) == truth).double().mean().float())
    assert set(losses) == {"decode", "auxiliary", "accuracy"} and losses["auxiliary"].shape == (2,)
    share = (labels != IGNORE).float().mean()
    torch.testing.assert_close(losses["decode"].mean(), share * torch.tensor(5.0).log(), atol=0.1, rtol=0)


def test_losses_of_a_batch_are_those_of_its_images(make_segmenter):
    segmenter, (images, labels) = make_segmenter(), batch(3)
    with torch.no_grad():
        together = segmenter(images, labels)
        alone = [segmenter(images[k : k + 1], labels[k : k + 1]) for k in range(3)]
    for name, values in together.items():
        torch.testing.assert_close(values, torch.cat([each[name] for each in alone]), atol=1e-6, rtol=1e-5)


def test_it_has_no_statistics_and_drops_channels_in_training_alone(make_segmenter):
    segmenter, (images, labels) = make_segmenter(), batch(1)
    norms = [m for m in segmenter.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert norms == [] and {name for name, _ in segmenter.named_buffers()} == {"mean", "deviation"}
    with torch.no_grad():
        still = [segmenter(images, labels)["decode"] for _ in range(2)]
        moving = [segmenter.train()(images, labels)["decode"] for _ in range(2)]
    assert still[0] == still[1] and moving[0] != moving[1]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("build", "depth"), [(build_plain, 1), (build_plain, 54), (build_relative, 54)])
def test_every_parameter_has_a_gradient(make_segmenter, build, depth, labelled):
    segmenter = make_segmenter(f"vit_16x2_{depth}", build=build, width=8).train()
    images, labels = batch(2)
    losses = segmenter(images, labels if labelled else torch.full_like(labels, IGNORE))
    (losses["decode"] + losses["auxiliary"]).mean().backward()
    gradients = {name: value.grad for name, value in segmenter.named_parameters()}
    assert [name for name, value in gradients.items() if value is None or not value.isfinite().all()] == []
    assert any(value.any() for value in gradients.values()) == labelled
    if not labelled:
        assert [losses[name].tolist() for name in ("decode", "auxiliary", "accuracy")] == [[0.0, 0.0]] * 3


def test_the_smallest_crop_is_two_patches(make_segmenter):
    segmenter = make_segmenter().train()
    losses = segmenter(*batch(1, 16, 16))
    (losses["decode"] + losses["auxiliary"]).sum().backward()
    assert segmenter.eval()(torch.rand(1, 3, 16, 16)).shape == (1, 5, 8, 8)


def test_a_segmenter_under_bfloat16_has_losses_in_float32(make_segmenter):
    segmenter, (images, labels) = make_segmenter(), batch(2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = segmenter(images, labels)
    exact = segmenter(images, labels)
    for name in ("decode", "auxiliary"):
        assert rough[name].dtype == torch.float32
        torch.testing.assert_close(rough[name], exact[name], atol=0.01, rtol=0)
    rough["decode"].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in segmenter.parameters())


def test_fresh_weights_are_drawn_from_the_seed(make_segmenter):
    state = torch.get_rng_state()
    first, same, other = (make_segmenter(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    drawn = {name for name, value in first.items() if not torch.equal(value, other[name])}
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert {name.split(".")[0] for name in drawn} == {"pyramid", "decoder", "classifier", "auxiliary"}
    assert not any(name.startswith("pyramid.encoder.") for name in drawn)
    weight = first["classifier.1.weight"]
    assert weight.std().item() == pytest.approx(0.01, rel=0.3) and not first["classifier.1.bias"].any()


def test_the_width_is_the_encoders_by_default(make_segmenter):
    segmenter = make_segmenter(width=None)
    assert segmenter.classifier[1].weight.shape == segmenter.auxiliary[-1].weight.shape == (5, 32, 1, 1)
    assert make_segmenter(width=300).auxiliary[-1].weight.shape == (5, 256, 1, 1)


def test_a_segmenter_learns_an_image_by_heart(make_segmenter):
    torch.manual_seed(0)
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[:, 10:30, 20:50], labels[:, 40:] = 3, 1
    images = (labels[:, None] / 4 + 0.2 * torch.rand(1, 3, 64, 64)).clamp(max=1)
    segmenter = make_segmenter().train()
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=3e-3)
    for _ in range(40):
        losses = segmenter(images, labels)
        optimizer.zero_grad()
        (losses["decode"] + 0.4 * losses["auxiliary"]).sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert segmenter.eval()(images, labels)["accuracy"].item() > 0.95


def test_without_its_library_the_remedy_is_named(make_segmenter, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("segmentation_models_pytorch"):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UserError, match=r"^mirl segment needs segmentation-models-pytorch; run pip install 'mirl\[seg"):
        make_segmenter()
