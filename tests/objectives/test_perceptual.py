"""The perceptual loss compares whole images with VGG16's features, from a file that is the user's."""

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import vgg16

from mirl.errors import UserError
from mirl.methods import Term
from mirl.models.patches import patchify
from mirl.objectives.perceptual import open_vgg, perceptual_loss
from mirl.objectives.pixels import pixel_target

SIZES = {"image_size": (16, 16), "patch_size": (8, 8)}


@pytest.fixture(scope="module")
def state():
    """Random weights up to pool5 by torchvision's names."""
    torch.manual_seed(0)
    with torch.device("meta"):
        own = vgg16(weights=None).features.state_dict()
    return {f"features.{name}": torch.randn(value.shape) * 0.05 for name, value in own.items()}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, path)
    return path


@pytest.fixture(scope="module")
def vgg(file):
    return open_vgg(str(file))


@pytest.fixture
def example():
    """Images [2, 3, 16, 16], their patches [2, 4, 192] and indices of the masked ones."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return images, patchify(images, (8, 8)), torch.tensor([[0, 2, 3], [3, 1, 0]])


def of_masked(patches, masked):
    return torch.stack([image[places] for image, places in zip(patches, masked, strict=True)])


def test_it_is_torchvisions_network_up_to_relu3_3_and_frozen(state, vgg, example):
    with torch.device("meta"):
        whole = vgg16(weights=None).features
    whole.load_state_dict({name.removeprefix("features."): value for name, value in state.items()}, assign=True)
    expected = example[0]
    for layer in whole[:16]:
        expected = layer(expected)
    assert isinstance(whole[14], torch.nn.Conv2d) and whole[14].out_channels == 256
    torch.testing.assert_close(vgg(example[0]), expected.detach(), atol=1e-5, rtol=1e-4)
    assert not vgg.training and not any(parameter.requires_grad for parameter in vgg.parameters())


def test_safetensors_are_read_too(state, vgg, example, tmp_path):
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "vgg.safetensors")
    found = open_vgg(str(tmp_path / "vgg.safetensors"))(example[0])
    torch.testing.assert_close(found, vgg(example[0]), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("target", ["normalised", "raw"])
def test_a_perfect_sum_has_no_loss(vgg, example, target):
    _, patches, masked = example
    truth = pixel_target(of_masked(patches, masked), target)
    main = torch.randn_like(truth)
    loss = perceptual_loss(
        vgg, patches, masked, [main, truth - main], [Term((1, 2), 1.0)], target=target, **SIZES
    )  # fmt: skip
    assert loss.shape == (2,) and loss.max() < 1e-8


def test_it_is_the_mean_squared_difference_of_features_of_pasted_images(vgg, example):
    images, patches, masked = example
    prediction = torch.randn_like(of_masked(patches, masked))
    half = Term((1,), 0.5)
    loss = perceptual_loss(vgg, patches, masked, [prediction], [half, half], target="raw", **SIZES)
    for i, image in enumerate(images):
        pasted = image.clone()
        for patch, place in zip(prediction[i], masked[i].tolist(), strict=True):
            row, column = 8 * (place // 2), 8 * (place % 2)
            pasted[:, row : row + 8, column : column + 8] = patch.view(8, 8, 3).permute(2, 0, 1)
        with torch.no_grad():
            expected = (vgg(pasted[None]) - vgg(image[None])).square().mean()
        torch.testing.assert_close(loss[i], expected)


def test_the_prediction_gets_a_gradient_and_the_network_none(vgg, example):
    _, patches, masked = example
    prediction = torch.randn_like(of_masked(patches, masked)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = perceptual_loss(vgg, patches, masked, [prediction], [Term((1,), 1.0)], target="normalised", **SIZES)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert prediction.grad.abs().amin(dim=(0, 2)).shape == (3,) and prediction.grad.abs().sum(dim=2).all()
    assert all(parameter.grad is None for parameter in vgg.parameters())


@pytest.mark.parametrize("content", ["missing", "text", "other", "other.safetensors", "shapes"])
def test_a_file_that_is_no_vgg_is_one_line(content, tmp_path, state):
    path = tmp_path / content
    if content == "text":
        path.write_text("no tensors")
    elif content == "other":
        torch.save({"weight": torch.zeros(2)}, path)
    elif content == "other.safetensors":
        save_file({"weight": torch.zeros(2)}, path)
    elif content == "shapes":
        torch.save(state | {"features.0.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError) as caught:
        open_vgg(str(path))
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"--vgg {path} ")
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in message
