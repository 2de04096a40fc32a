"""The perceptual objective: features of a VGG16 of the reconstruction and of the image. Paper: Table 2a, [26].

The paper leaves layers and weight to an appendix that is not published; relu3_3 is Johnson et al.'s content layer.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg16

from mirl.errors import UserError
from mirl.methods import Target, Term
from mirl.models.patches import Size, unpatchify
from mirl.objectives.pixels import to_pixels, total, weighted

RELU3_3 = 16  # layers of torchvision's `features` up to and with relu3_3
REMEDY = "give torchvision's VGG16, as .pth or .safetensors: https://download.pytorch.org/models/vgg16-397923af.pth"


def open_vgg(path: str) -> nn.Sequential:
    """Return a VGG16's layers up to and with relu3_3, frozen, with the weights in a file.

    Its images are RGB, normalised by ImageNet's mean and deviation.

    Raises:
        UserError: if `path` is no file with the tensors `features.*` of a VGG16.
    """
    if not Path(path).expanduser().is_file():
        raise UserError(f"--vgg {path} is no file; {REMEDY}")
    with torch.device("meta"):
        vgg = vgg16(weights=None, init_weights=False).features[:RELU3_3]
    try:
        state = _read(Path(path).expanduser())
        vgg.load_state_dict({name: state[f"features.{name}"].float() for name in vgg.state_dict()}, assign=True)
    except Exception as error:  # a damaged or foreign file may end in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"--vgg {path} holds no VGG16 ({reason}); {REMEDY}") from error
    return vgg.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def perceptual_loss(
    vgg: nn.Module, patches: Tensor, masked: Tensor, predictions: Sequence[Tensor], terms: Sequence[Term],
    *, target: Target, image_size: Size, patch_size: Size,
) -> Tensor:  # fmt: skip
    """Compare features of what each term reconstructs with those of the image.

    A reconstruction has the visible patches of the image itself, and the predicted ones with the statistics of the true
    ones. The predictions must be of the image, not of its coarse or fine part.

    Args:
        vgg: maps images [b, 3, h, w] to features.
        patches: [b, n, p], normalised as images are; masked: [b, m].
        predictions: one [b, m, p] per decoder, shallow to deep, on masked patches.

    Returns:
        The weighted mean squared difference [b] of each image, in float32.
    """

    def features(values: Tensor) -> Tensor:
        images = unpatchify(values, image_size, patch_size)
        return vgg(images.contiguous(memory_format=torch.channels_last))

    with torch.no_grad():
        truth = features(patches)
    places = masked[..., None].expand(-1, -1, patches.shape[-1])
    hidden = patches.gather(1, places)
    losses = []
    for term in terms:
        pasted = patches.scatter(1, places, to_pixels(total(predictions, term), hidden, target))
        losses.append(F.mse_loss(features(pasted).float(), truth.float(), reduction="none").mean(dim=(1, 2, 3)))
    return weighted(losses, terms)
