"""UperNet on a plain ViT, put together from segmentation_models_pytorch's decoder. Paper: Table 5.

Four depths of the encoder become four maps (`ViTPyramid`, as in detection), which the decoder joins at the finest; an
auxiliary head reads the map of patches in training. Differs from BEiT's in the norms: each position's own, where they
take SyncBatchNorm's. A norm without statistics takes single images, does not depend on how a batch is split, and
is the same in evaluation. Symbols: b images, n classes, c channels, h and w pixels, s the finest stride, a quarter of
a patch's side.
"""

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.data.semantic import IGNORE
from mirl.errors import UserError
from mirl.heads.pyramid import ViTPyramid
from mirl.models.patches import Size

DROPOUT = 0.1  # of the channels that are classified
AUXILIARY_WIDTH = 256  # at most
PATCHES = 2  # place of the pyramid's map whose positions are patches


class Segmenter(nn.Module):
    """Images to scores of classes, or with labels to losses.

    Args:
        pyramid: of the encoder.
        decoder: of `upernet_decoder`, to maps of `width` channels.
        classes: how many; mean, deviation: by which images are normalised, one number per channel.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, pyramid: ViTPyramid, decoder: nn.Module, width: int, classes: int,
        mean: Sequence[float], deviation: Sequence[float],
    ) -> None:  # fmt: skip
        super().__init__()
        self.classes, self.pyramid, self.decoder = classes, pyramid, decoder
        self.classifier = _classifier(width, classes)
        narrow = min(AUXILIARY_WIDTH, width)
        convolution = nn.Conv2d(pyramid.channels[PATCHES], narrow, 3, padding=1, bias=False)
        nn.init.kaiming_uniform_(convolution.weight, nonlinearity="relu")
        self.auxiliary = nn.Sequential(
            convolution, LayerNorm2d(narrow), nn.ReLU(inplace=True), *_classifier(narrow, classes)
        )
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None])

    @property
    def encoder(self) -> nn.Module:
        """The timm model."""
        return self.pyramid.encoder

    @property
    def multiple(self) -> int:
        """Pixels that divide the sides of images: two patches'."""
        return 2 * self.pyramid.patch_size

    @property
    def fixed_size(self) -> Size | None:
        """Height and width of the only images it takes; None if it takes those of any size."""
        embedding = self.encoder.patch_embed
        return embedding.img_size if embedding.strict_img_size else None  # type: ignore[union-attr, return-value]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Return `losses` where there are labels, else the scores [b, n, h / s, w / s]; images [b, c, h, w] in 0..1."""
        return self.scores(self.normalised(images)) if labels is None else self.losses(images, labels)

    def normalised(self, images: Tensor) -> Tensor:
        """Return images [b, c, h, w], given in 0..1, as the encoder takes them."""
        return (images - self.mean) / self.deviation

    def scores(self, images: Tensor) -> Tensor:
        """Return scores (logits) [b, n, h / s, w / s] of normalised images, whose sides `multiple` divides."""
        return self._decoded(self.pyramid(images))

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the losses of both heads, and how much of the labels the first has right: [b] each.

        A loss is the sum of labelled pixels' cross-entropies by the number of all pixels (mmseg's): the mean over
        images does not depend on how these are put into batches.

        Args:
            images: float [b, c, h, w] in 0..1; labels: uint8 [b, h, w], IGNORE where there is none.

        Returns:
            "decode" and "auxiliary"; "accuracy", the share of the labelled pixels, 0 where there are none.
        """
        maps = self.pyramid(self.normalised(images))
        truth, size = labels.long(), labels.shape[-2:]
        decoded, auxiliary = (
            F.interpolate(scores.float(), size, mode="bilinear", align_corners=False)
            for scores in (self._decoded(maps), self.auxiliary(maps[PATCHES]))
        )
        right = (decoded.detach().argmax(1) == truth).sum((1, 2))
        return {
            "decode": _cross_entropy(decoded, truth),
            "auxiliary": _cross_entropy(auxiliary, truth),
            "accuracy": right / (truth != IGNORE).sum((1, 2)).clamp(min=1),
        }

    def _decoded(self, maps: list[Tensor]) -> Tensor:
        scores: Tensor = self.classifier(self.decoder([None, None, *maps]))  # no maps of strides s / 4 and s / 2
        return scores


def build_segmenter(
    encoder: nn.Module,
    *,
    classes: int,
    mean: Sequence[float],
    deviation: Sequence[float],
    width: int | None = None,
    seed: int = 0,
) -> Segmenter:
    """Build a segmenter on `encoder`, of `build_plain` or `build_relative`; its own weights are drawn from `seed`.

    Args:
        classes: how many, 255 at most; mean, deviation: by which images are normalised, one number per channel.
        width: channels of the decoder; None: as many as the encoder has.

    Raises:
        UserError: if segmentation_models_pytorch is missing, or the encoder's patches have no quarter.
    """
    assert 1 <= classes <= IGNORE, classes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pyramid = ViTPyramid(encoder)
        width = width or pyramid.channels[0]
        return Segmenter(pyramid, upernet_decoder(pyramid.channels, width), width, classes, mean, deviation)


def upernet_decoder(channels: Sequence[int], width: int) -> nn.Module:
    """Build smp's decoder for maps of so many channels, finest first, to one of `width` channels at the finest scale.

    Raises:
        UserError: if segmentation_models_pytorch is missing.
    """
    try:  # here, because this takes seconds
        from segmentation_models_pytorch.base.initialization import initialize_decoder
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError as error:
        raise UserError("mirl segment needs segmentation-models-pytorch; run pip install 'mirl[segment]'") from error
    decoder: nn.Module = UPerNetDecoder([0, 0, *channels], len(channels) + 1, decoder_channels=width)
    _without_statistics(decoder)
    initialize_decoder(decoder)
    return decoder


def _without_statistics(module: nn.Module) -> None:
    """Replace batch norms in `module` by each position's own."""
    for name, part in module.named_children():
        if isinstance(part, nn.BatchNorm2d):
            setattr(module, name, LayerNorm2d(part.num_features))
        else:
            _without_statistics(part)


def _classifier(width: int, classes: int) -> nn.Sequential:
    """Return dropout of channels and a layer that classifies each position, nearly uniform at first."""
    layer = nn.Conv2d(width, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(DROPOUT), layer)


def _cross_entropy(scores: Tensor, truth: Tensor) -> Tensor:
    """Return each image's cross-entropy [b] of scores [b, n, h, w] and labels [b, h, w], over all pixels."""
    return F.cross_entropy(scores, truth, ignore_index=IGNORE, reduction="none").mean((1, 2))
