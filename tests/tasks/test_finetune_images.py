"""What fine-tuning shows to the model: images of the right channels, augmented, erased and mixed as said."""

import json
import shutil

import pytest
import timm
import torch
from tiny_classes import PLAIN, task_of, write_encoder
from torch._subclasses.fake_tensor import FakeTensorMode

import mirl
from mirl.data.loading import LabelledBatch, seeded
from mirl.data.transforms import evaluation_view, fixed_view, standardise


def labelled(count, *, size=16, channels=3):
    """Return a batch of images of noise, `count` of class 0, 1, 2, ..."""
    images = torch.randint(256, (count, channels, size, size), dtype=torch.uint8)
    return LabelledBatch(images=images, indices=torch.arange(count), labels=torch.arange(count) % 10)


@pytest.fixture(scope="module")
def grey(patterns, tmp_path_factory):
    """A run from weights of one channel on RGB files, of which some cannot be read."""
    folder = tmp_path_factory.mktemp("grey")
    data = shutil.copytree(patterns, folder / "data")
    (data / "val" / "down" / "03.png").write_bytes(b"not an image")
    (data / "train" / "plain" / "05.png").write_bytes(b"")
    weights = write_encoder(folder / "encoder", channels=1)
    options = PLAIN | {"epochs": 1, "randaugment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, "mixup": 0.8}
    return mirl.finetune(**options, weights=weights, data=data, out=folder / "run")


def test_the_weights_channels_are_the_images(grey):
    log = (grey / "log.txt").read_text()
    assert "note      RandAugment works on RGB, and these images have 1 channel: left out" in log
    assert "16x16 px, patches of 8x8, 1 channel" in log and "· none · erasing" in log
    cfg = timm.create_model(f"local-dir:{grey / 'encoder'}", pretrained=True).pretrained_cfg
    assert [tuple(cfg[key]) for key in ("input_size", "mean", "std")] == [(1, 16, 16), (0.5,), (0.25,)]


def test_images_that_cannot_be_read_are_named_and_left_out(grey):
    assert json.loads((grey / "results.json").read_text())["weights"]["images"] == 23
    log = (grey / "log.txt").read_text()
    for name, reason in (("val/down/03.png", "is not an image"), ("train/plain/05.png", "is empty (0 bytes)")):
        assert f"skipped {grey.parent}/data/{name}: {reason}" in log


@pytest.mark.parametrize("count", [2, 7, 1])
@pytest.mark.parametrize("mixing", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}, {}], ids=str)
def test_targets_say_what_was_mixed(encoder, count, mixing):
    """Images of one colour each: a mixed one's mean is that of its two classes, in the shares that its target has."""
    task = task_of(encoder, erasing=0.0, **mixing)
    grey = torch.arange(count, dtype=torch.uint8) * 30
    labels = torch.arange(count)
    images = grey.view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    with seeded(count):
        mixed = task.prepare(LabelledBatch(images=images, indices=labels, labels=labels))
    assert mixed.images.shape == (count, 3, 16, 16) and mixed.targets.shape == (count, 10)
    assert torch.equal(mixed.indices, labels)
    torch.testing.assert_close(mixed.targets.sum(dim=1), torch.ones(count))
    shares = (mixed.targets - 0.1 / 10) / 0.9  # without the smoothing
    even = count // 2 * 2
    share = shares[labels, labels]
    expected = torch.diag(share)
    expected[range(even), range(even - 1, -1, -1)] += 1 - share[:even]
    torch.testing.assert_close(shares[:, :count], expected, atol=1e-6, rtol=0)
    pixels = standardise(images, task.weights.mean, task.weights.deviation)
    means = shares[:, :count] @ pixels.mean(dim=(2, 3))
    torch.testing.assert_close(mixed.images.mean(dim=(2, 3)), means, atol=1e-5, rtol=0)
    assert torch.equal(mixed.images[even:], pixels[even:])  # the last of an odd number stays as it is
    assert (share[:even] < 1).all() and (share[even:] == pytest.approx(1))
    values = {len(image[0].unique()) for image in mixed.images[:even]}
    assert values <= ({1} if "cutmix" in mixing and not mixing["cutmix"] else {2} if mixing else {1, 2})


def test_without_mixing_targets_are_smoothed_labels(encoder):
    targets = task_of(encoder, mixup=0.0, cutmix=0.0, smoothing=0.2).prepare(labelled(3)).targets
    assert targets[1].tolist() == pytest.approx([0.02, 0.82] + [0.02] * 8)
    targets = task_of(encoder, mixup=0.0, cutmix=0.0, smoothing=0.0).prepare(labelled(3)).targets
    assert torch.equal(targets, torch.eye(10)[:3])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_images_loses_a_rectangle(encoder, share):
    task, batch = task_of(encoder, mixup=0.0, cutmix=0.0, erasing=share), labelled(400, size=32)
    with seeded(5):
        images = task.prepare(batch).images
    changed = (images != standardise(batch.images, task.weights.mean, task.weights.deviation)).any(dim=1)
    erased = changed.flatten(1).any(dim=1)
    assert erased.float().mean() == pytest.approx(share, abs=0.07)
    for image, mask in zip(images[erased], changed[erased], strict=True):
        rectangle = mask[mask.any(dim=1)][:, mask.any(dim=0)]
        assert rectangle.float().mean() > 0.99  # all of it, for noise seldom repeats a value
        assert 0.01 < rectangle.numel() / 32**2 < 0.4
        assert ((image[:, mask].std(dim=1) - 1).abs() < 0.7).all()  # pixel by pixel


def test_images_are_erased_before_they_are_mixed(encoder):
    """So each of two mixed images shows both rectangles."""
    task = task_of(encoder, mixup=0.8, cutmix=0.0, erasing=1.0)
    plain = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    with seeded(1):
        images = task.prepare(LabelledBatch(images=plain, indices=torch.arange(8), labels=torch.arange(8))).images
    shown = (images != images.flatten(2).mode(dim=2).values[..., None, None]).any(dim=1)
    assert torch.equal(shown, shown.flip(0)) and not torch.equal(shown[0], shown[1])


def test_what_is_random_in_a_step_is_a_function_of_its_key(encoder):
    task, batch = task_of(encoder), labelled(16)

    def prepared(key):
        with seeded(0, key):
            return task.prepare(batch)

    first, again, other = prepared(1), prepared(1), prepared(2)
    assert torch.equal(first.images, again.images) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.images, other.images)


def test_views_of_training_images_differ_by_epoch_and_repeat(encoder):
    task = task_of(encoder)
    assert torch.equal(task.training[3, 0].images, task.training[3, 0].images)
    assert not torch.equal(task.training[3, 0].images, task.training[4, 0].images)
    assert torch.equal(task.held_out[3, 0].images, task.held_out[4, 0].images)
    assert not torch.equal(task.training[3, 0].images, task_of(encoder, seed=1).training[3, 0].images)


def test_a_step_stays_on_the_device(encoder):
    task = task_of(encoder)
    with FakeTensorMode(allow_non_fake_inputs=True), seeded(0):  # tensors without data that claim to be on a GPU
        batch = task.prepare(labelled(7).to(torch.device("cuda")))
        loss = task.loss(lambda images: images.mean(dim=(2, 3)) @ images.new_ones(3, 10), batch)["loss"]
    assert {tensor.device.type for tensor in (batch.images, batch.targets, loss)} == {"cuda"}


def test_large_images_are_judged_on_their_centre(encoder):
    task = task_of(encoder, image_size=96, data="shapes:10:128")
    image = task.val.source.read(0)
    assert torch.equal(task.held_out[0, 0].images[0], evaluation_view(image, (96, 96)))
    assert not torch.equal(task.held_out[0, 0].images[0], fixed_view(image, (96, 96)))


def test_the_loss_of_soft_targets_is_their_cross_entropy(encoder):
    task = task_of(encoder)
    with seeded(1):
        batch = task.prepare(labelled(6))
    task.model.eval()
    logs = torch.log_softmax(task.model(batch.images), dim=1)
    torch.testing.assert_close(task.loss(task.model, batch)["loss"], -(batch.targets * logs).sum(dim=1))
