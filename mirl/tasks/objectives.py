"""What `--feature` and `--vgg` add to the pixel loss: modules that own the network they compare with.

Paper: Sec. 3.1 ("additional pre-training objective losses"), Table 2a. Each looks at a share of a batch only, because
whole images through another network cost as much as the masked step itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.models import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.data.transforms import channel_statistics, standardise
from mirl.errors import UserError, plural
from mirl.methods import Method
from mirl.models.encoder import parse_model
from mirl.models.patches import gather, grid_size
from mirl.objectives.features import feature_loss
from mirl.objectives.perceptual import open_vgg, perceptual_loss
from mirl.tasks.options import Precision
from mirl.tasks.settings.pretraining import Resolved
from mirl.tasks.weights import open_weights

# The decay of the teacher's average by epochs, in between linear: BootMAE's, which the official code keeps.
EPOCHS, DECAYS = (0, 100, 400), (0.999, 0.9999, 0.99999)


@dataclass(frozen=True)
class Seen:
    """What the loss knows of some images.

    Attributes:
        images: uint8 [b, c, h, w]; patches: [b, n, p] of them, normalised; masked: [b, m].
        predictions: [b, m, p] and features: [b, m, d], one of each per decoder, on masked patches.
    """

    images: Tensor
    patches: Tensor
    masked: Tensor
    predictions: Sequence[Tensor]
    features: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> "Seen":
        """Return the first `count` of the images."""
        return Seen(
            self.images[:count], self.patches[:count], self.masked[:count],
            [prediction[:count] for prediction in self.predictions], [feature[:count] for feature in self.features],
        )  # fmt: skip


class Objective(nn.Module):
    """Something to learn beside the pixels; a module so that it moves with the model, of which it is no part.

    Its `forward` maps what is `Seen` to values [b].

    Args:
        weight: of these in the loss; growth: epochs over which it grows linearly from 0 to that.
        about: what the summary says of it.
        average: of the encoder's weights, which it owns, or None.

    Attributes:
        name: what records call its values.
    """

    name: str

    def __init__(self, weight: float, about: str, *, growth: float = 0.0, average: ModelEmaV3 | None = None) -> None:
        super().__init__()
        self.weight, self.growth, self.average = weight, growth, average
        self.about = f"{weight:g} x {self.name}: {about}"

    def weight_at(self, epoch: float) -> float:
        """Return the weight after so many epochs: of these alone, because a run's length may be extended."""
        return self.weight * (min(1.0, epoch / self.growth) if self.growth else 1.0)

    def on_share(self, seen: Seen, share: float) -> Tensor:
        """Return values [b] of the first ceil(`share` b) images, which are random ones, and 0 for the others.

        They are scaled so that their mean over all is what it would be, on average, of all.
        """
        images, count = len(seen), math.ceil(share * len(seen))
        return F.pad(self(seen.first(count)) * (images / count), (0, images - count))

    def follow(self, encoder: VisionTransformer, step: int, epoch: float) -> None:
        """Take the encoder's weights after optimizer step `step` into the average, if there is one."""
        if self.average:
            self.average.decay = float(np.interp(epoch, EPOCHS, DECAYS))
            self.average.update(encoder, step=step)


class Teacher(nn.Module):
    """A ViT that sees whole images: what its last block says of each patch, before the final norm.

    Args:
        encoder: of the student's grid of patches, at its own image size.
        mean, deviation: by which its images in 0..1 are normalised.
    """

    def __init__(self, encoder: VisionTransformer, mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.mean, self.deviation = mean, deviation

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 images [b, c, h, w] of the student's size to tokens [b, n, d], without class or other tokens."""
        size = self.encoder.patch_embed.img_size
        images = standardise(images, self.mean, self.deviation)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        (tokens,) = self.encoder.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True)
        return tokens


class FeatureObjective(Objective):
    """`--feature`: predict a teacher's tokens of the masked patches.

    Args:
        teacher: whose tokens.
        average: the teacher's weights as an average of the encoder's, or None if they stay as they are.
    """

    name = "feature"

    def __init__(self, settings: Resolved, method: Method, teacher: Teacher, average: ModelEmaV3 | None) -> None:
        of = "an average of the encoder" if average else settings.feature
        growth = min(settings.warmup_epochs, settings.epochs)  # with the learning rate
        about = f"tokens of {of}, growing over {plural(growth, 'epoch', form='.3g')}"
        super().__init__(settings.feature_weight, about, growth=growth, average=average)
        self.teacher, self.terms = teacher, method.terms
        self.precision: Precision = settings.precision

    def forward(self, seen: Seen) -> Tensor:
        with autocast(seen.images.device, self.precision):
            tokens = self.teacher(seen.images)
        return feature_loss(seen.features, gather(tokens, seen.masked), self.terms)


class PerceptualObjective(Objective):
    """`--vgg`: give the reconstruction the features that a VGG16 sees in the image.

    A VGG knows whole images only: the coarse and the fine part that a pair predicts are compared as their sum.

    Raises:
        UserError: if the images are not RGB, or the file holds no VGG16.
    """

    name = "vgg"

    def __init__(self, settings: Resolved, method: Method) -> None:
        assert settings.vgg is not None
        super().__init__(settings.vgg_weight, f"relu3_3 of a VGG16, {settings.vgg}")
        if settings.channels != 3:
            raise UserError(
                f"--vgg sees images of 3 channels and these have {settings.channels}; leave out --vgg, or give "
                "--channels 3"
            )
        self.vgg = open_vgg(settings.vgg)
        self.terms = method.reconstructions if method.separates else method.terms
        # Deep in a VGG, numbers overflow fp16.
        self.precision: Precision = "bf16" if settings.precision == "bf16" else "32"
        self.target, self.image_size, self.patch_size = settings.target, settings.image_size, settings.patch_size

    def forward(self, seen: Seen) -> Tensor:
        with autocast(seen.images.device, self.precision):
            return perceptual_loss(
                self.vgg, seen.patches, seen.masked, seen.predictions, self.terms, target=self.target,
                image_size=self.image_size, patch_size=self.patch_size,
            )  # fmt: skip


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Compute a network that is no part of the model in `precision`, whatever that of the code around."""
    dtype = torch.float16 if precision == "16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "32")


def open_teacher(settings: Resolved) -> Teacher | None:
    """Open the trained ViT that `--feature` names; None if it names none, or an average of the model's own encoder.

    Raises:
        UserError: if there is nothing like that, or it sees other channels.
    """
    if settings.feature in (None, "ema"):
        return None
    try:
        weights = open_weights(settings.feature, say=lambda _: None)
    except UserError as error:
        raise UserError(f"--feature: {error}; or ema, an average of the encoder") from error
    if weights.channels != settings.channels:
        raise UserError(
            f"--feature {settings.feature} sees images of {plural(weights.channels, 'channel')} and these have "
            f"{settings.channels}; give another ViT, or --feature ema"
        )
    grid = grid_size(settings.image_size, settings.patch_size)
    size = tuple(count * side for count, side in zip(grid, weights.patch_size, strict=True))
    return Teacher(weights.build(img_size=size, num_classes=0), weights.mean, weights.deviation)


def feature_values(settings: Resolved, teacher: Teacher | None) -> int:
    """Return how many values of each patch the decoders predict besides pixels: the width of the teacher, or 0."""
    if teacher:
        return teacher.encoder.embed_dim
    return parse_model(settings.model)[0] if settings.feature else 0


def extra_objectives(
    settings: Resolved, method: Method, encoder: VisionTransformer, teacher: Teacher | None
) -> list[Objective]:
    """Build the objectives that the settings name; with `--feature ema` the teacher begins as a copy of `encoder`."""
    found: list[Objective] = []
    if settings.feature:
        average = None
        if teacher is None:
            # timm's average with these two numbers has the decay min(decay, (1 + t) / (10 + t)), t two steps behind.
            average = ModelEmaV3(encoder, use_warmup=True, warmup_gamma=9, warmup_power=1)
            teacher = Teacher(average.module, *channel_statistics(settings.channels))
        found.append(FeatureObjective(settings, method, teacher, average))
    if settings.vgg:
        found.append(PerceptualObjective(settings, method))
    return found
