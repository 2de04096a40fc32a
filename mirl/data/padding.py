"""Batches of images of different sizes, each padded at the right and the bottom to the largest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from mirl.data.loading import Batch


@dataclass(frozen=True, kw_only=True)
class PaddedBatch(Batch):
    """Images with padding.

    Attributes:
        sizes: int64 [b, 2], height and width of each image without the padding.
        PADDING: names of the tensors [b, ..., h, w] that have it, and their values there.
    """

    PADDING: ClassVar[dict[str, int]] = {"images": 0}

    sizes: Tensor

    @classmethod
    def joined(cls, batches: Sequence[Self]) -> Self:
        """Return one batch of all images of `batches`; `bad` is the first's."""
        height, width = (max(batch.images.shape[side] for batch in batches) for side in (-2, -1))
        return super().joined([batch._padded_to(height, width) for batch in batches])

    def unpadded(self, name: str = "images") -> list[Tensor]:
        """Return the images, [c, h, w] each, or what else is padded, without their padding."""
        sizes = self.sizes.tolist()
        return [one[..., :height, :width] for one, (height, width) in zip(getattr(self, name), sizes, strict=True)]

    def _padded_to(self, height: int, width: int) -> Self:
        missing = (0, width - self.images.shape[-1], 0, height - self.images.shape[-2])
        padded: dict[str, Any] = {
            name: F.pad(getattr(self, name), missing, value=value) for name, value in self.PADDING.items()
        }
        return replace(self, **padded)
