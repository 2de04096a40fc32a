"""An autoencoder that shows what it makes of masked images, and the masks to show it with.

Symbols: b images, c channels, h and w pixels, gh and gw rows and columns of patches, n = gh * gw.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.transforms.v2.functional import center_crop

from mirl.data.transforms import normalise
from mirl.errors import UserError
from mirl.methods import Term
from mirl.models.masking import split
from mirl.models.patches import grid_size, pair, patchify
from mirl.tasks.options import SEED
from mirl.tasks.settings.pretraining import Resolved
from mirl.tasks.weights import build_autoencoder, open_autoencoder
from mirl.training.reconstructions import Reconstruction, compose
from mirl.training.runs import console


class Reconstructor:
    """An autoencoder that shows its predictions.

    Args:
        weights: a run folder, its autoencoder.safetensors, or an official checkpoint with decoders.
        image_size: pixels, one number or (height, width); by default as trained, else positions are resampled.

    Attributes:
        image_size, patch_size, grid: (height, width) in pixels, pixels and patches; channels: of its images.
        mask_ratio: share of patches that was masked in training; terms: whose predictions are shown together.

    Raises:
        UserError: if `weights` holds no decoders, or its patches do not tile `image_size`.
    """

    def __init__(self, weights: str, *, image_size: int | Sequence[int] | None = None) -> None:
        opened = open_autoencoder(weights, say=console.print)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settings = Resolved(**opened.settings)
        self.model = build_autoencoder(opened, image_size=None if image_size is None else pair(image_size))
        self.model.to(self.device)
        self.image_size, self.patch_size = self.model.image_size, self.model.patch_size
        self.grid = grid_size(self.image_size, self.patch_size)
        self.channels, self.mask_ratio, self.target = settings.channels, settings.mask_ratio, settings.target
        self.name, self.method = settings.model, self.model.method
        self.terms: tuple[Term, ...] = self.method.reconstructions

    @torch.inference_mode()
    def __call__(self, images: Tensor, hidden: Tensor) -> Reconstruction:
        """Show what is made of uint8 `images` [b, c, h, w] of `image_size` without the patches in `hidden`.

        Args:
            hidden: bool [b, gh, gw], True where a patch is masked, as many in each image.

        Raises:
            UserError: if images or masks are of another form, or masks hide nothing, everything, or unequal numbers.
        """
        form = (len(hidden), self.channels, *self.image_size)
        if images.dtype != torch.uint8 or tuple(images.shape) != form:
            raise UserError(f"images are {images.dtype} {list(images.shape)}; give torch.uint8 {list(form)}")
        if hidden.dtype != torch.bool or tuple(hidden.shape[1:]) != self.grid:
            raise UserError(f"masks are {hidden.dtype} {list(hidden.shape)}; give torch.bool [b, {self.grid}]")
        flags = hidden.flatten(1)
        masked_count = int(flags[0].sum())
        if not 0 < masked_count < flags.shape[1] or bool((flags.sum(dim=1) != masked_count).any()):
            raise UserError("masks must hide some patches, not all, and as many in each image")
        order = flags.to(torch.uint8).argsort(dim=1, stable=True).to(self.device)
        visible, masked = order[:, : flags.shape[1] - masked_count], order[:, flags.shape[1] - masked_count :]
        patches = patchify(normalise(images.to(self.device), self.channels), self.patch_size)
        predictions = self.model(patches, visible, masked, all_patches=True)
        return compose(
            patches, visible, masked, predictions, self.terms, target=self.target, image_size=self.image_size,
            patch_size=self.patch_size, channels=self.channels,
        )  # fmt: skip

    def random_mask(self, mask_ratio: float | None = None, seed: int = 0) -> Tensor:
        """Return bool [gh, gw], True for a random `mask_ratio` of the patches, by default as many as in training.

        Raises:
            UserError: if `mask_ratio` is no share, `seed` is negative, or no patch, or every patch, would be visible.
        """
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        if not 0 < ratio < 1:  # which NaN is not either
            raise UserError(f"--mask_ratio {ratio} is not allowed; give more than 0 and less than 1")
        if not SEED[0](seed):
            raise UserError(f"--seed {seed} is not allowed; give {SEED[1]}")
        noise = torch.rand(math.prod(self.grid), generator=torch.Generator().manual_seed(seed))
        _, masked = split(noise, ratio)
        hidden = torch.zeros_like(noise, dtype=torch.bool)
        hidden[masked] = True
        return hidden.view(self.grid)

    def block_mask(self, block: Sequence[float]) -> Tensor:
        """Return bool [gh, gw], True for patches whose centre is in (top, left, bottom, right), shares of the sides.

        Raises:
            UserError: if that is no rectangle in the image, or hides no patch, or every one.
        """
        if len(block) != 4 or not (0 <= block[0] < block[2] <= 1 and 0 <= block[1] < block[3] <= 1):
            raise UserError(f"--block {list(block)} is not allowed; give top, left, bottom, right in 0..1")
        rows, columns = ((torch.arange(count) + 0.5) / count for count in self.grid)
        inside = (rows >= block[0]) & (rows < block[2]), (columns >= block[1]) & (columns < block[3])
        return self._some(inside[0][:, None] & inside[1][None])

    def drawn_mask(self, mask: Tensor) -> Tensor:
        """Return bool [gh, gw], True for patches of which at least half is drawn.

        Args:
            mask: bool [h, w] of `image_size`, or of any other, of which that part counts that is seen of images.

        Raises:
            UserError: if it hides no patch, or every one.
        """
        scale = min(drawn / side for drawn, side in zip(mask.shape, self.image_size, strict=True))
        seen = center_crop(mask, [max(1, round(side * scale)) for side in self.image_size])
        return self._some(adaptive_avg_pool2d(seen[None].float(), self.grid)[0] >= 0.5)

    def _some(self, hidden: Tensor) -> Tensor:
        if not 0 < int(hidden.sum()) < hidden.numel():
            raise UserError(f"the mask hides {int(hidden.sum())} of {hidden.numel()} patches; hide some, not all")
        return hidden
