"""What a pre-training step keeps in a device's memory, counted without computing anything.

Tensors without storage go through the model, and whatever a forward pass saves for the backward pass is added up:
each storage once, weights apart. What every image adds are its activations; what is there once are copies of weights in
half precision.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from mirl.models.attention import choose_attention
from mirl.models.autoencoder import Autoencoder
from mirl.models.encoder import recomputed_together
from mirl.models.masking import split
from mirl.objectives.pixels import reconstruction_loss
from mirl.training.processes import Precision

FLOAT = 4  # bytes
HALF: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "16": torch.float16}
Storages = dict[int, int]  # bytes of each storage, by its address


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        trained: parameters that are trained.
        weights: weights, gradients, AdamW's two moments and, with several devices, the buckets they exchange.
        copies: of weights in half precision, and what else does not depend on the images.
        image: activations of an image; checkpointed: the same if blocks are computed again in the backward pass.
    """

    trained: int
    weights: int
    copies: int
    image: int
    checkpointed: int

    def needed(self, images: int, *, checkpointing: bool = False) -> int:
        """Return the bytes of a step over so many images at once."""
        return self.weights + self.copies + images * (self.checkpointed if checkpointing else self.image)

    def fitting(self, size: float, *, checkpointing: bool = False) -> int:
        """Return how many images, a multiple of 8, fit at once in `size` bytes."""
        room = size - self.needed(0)
        return max(0, int(room / (self.checkpointed if checkpointing else self.image))) // 8 * 8


def step_memory(
    model: Autoencoder, mask_ratio: float, precision: Precision, *, devices: int = 1, gpu: bool = True
) -> Memory:
    """Count the memory of a pre-training step, with a GPU's or a CPU's kernels, of a `model` on the meta device.

    The model loses its tensors, which become ones that exist within this count alone.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    # Tensors of a CPU stand for a GPU's, because autocast needs a GPU that is there; only attention differs.
    kernels = patch("mirl.models.attention.fused", return_value=True) if gpu else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), kernels:
        model.to_empty(device="cpu")
        choose_attention(model, torch.device("cpu"), HALF.get(precision, torch.float32))
        # One image alone would share storages that two do not share.
        two, three = (saved_by(model, n, mask_ratio, precision) for n in (2, 3))
    weights = FLOAT * trained * (5 if devices > 1 else 4) + FLOAT * fixed
    image, checkpointed = three.total - two.total, three.checkpointed - two.checkpointed
    return Memory(trained, weights, two.total - 2 * image, image, checkpointed)


def saved_by(model: Autoencoder, images: int, mask_ratio: float, precision: Precision) -> "Saved":
    """Return what a forward pass and its loss save."""
    patches = len(model.positions)
    values = torch.rand(images, patches, model.patch_values)
    visible, masked = split(torch.rand(images, patches), mask_ratio)
    half = HALF.get(precision)
    with Saved.watch(model) as saved, torch.autocast("cpu", half) if half else nullcontext():
        predictions = model(values, visible, masked)
        targets = {term.target: torch.rand_like(predictions[0], dtype=torch.float32) for term in model.method.terms}
        loss, _ = reconstruction_loss(predictions, targets, model.method.terms)
    assert loss.requires_grad
    return saved


class Saved:
    """What autograd saves, in bytes of storages.

    `outside` of what checkpointing computes again, `inside` of each part of that, and what the parts are `given`.
    """

    def __init__(self, weights: set[int]) -> None:
        self.weights = weights
        self.outside: Storages = {}
        self.inside: list[Storages] = []
        self.given: Storages = {}
        self.current = self.outside
        self.alive: list[Tensor] = []  # an address is used again once its tensor is gone

    @classmethod
    @contextmanager
    def watch(cls, model: Autoencoder) -> Iterator["Saved"]:
        """Note what is saved within this block."""
        saved = cls({_address(tensor) for tensor in (*model.parameters(), *model.buffers())})
        with ExitStack() as hooks:
            for together in recomputed(model):
                inside: Storages = {}
                saved.inside.append(inside)
                for module in together:
                    run = partial(saved._within, inside, module.forward, first=module is together[0])
                    hooks.enter_context(patch.object(module, "forward", run))
            hooks.enter_context(saved_tensors_hooks(saved._save, lambda tensor: tensor))
            yield saved

    def _within(
        self, inside: Storages, run: Callable[..., Tensor], *arguments: Any, first: bool, **options: Any
    ) -> Any:
        """Run a module and count what it saves as its own and, if it is the first of its part, what it is given."""
        if first:
            for tensor in (*arguments, *options.values()):
                if isinstance(tensor, Tensor):
                    self._note(tensor, self.given)
        self.current = inside
        result = run(*arguments, **options)
        self.current = self.outside
        return result

    def _save(self, tensor: Tensor) -> Tensor:
        self._note(tensor, self.current)
        return tensor

    def _note(self, tensor: Tensor, among: Storages) -> None:
        if _address(tensor) not in self.weights:
            self.alive.append(tensor)
            among[_address(tensor)] = tensor.untyped_storage().nbytes()

    @property
    def total(self) -> int:
        """The bytes of all that is saved."""
        together = dict(self.outside)
        for each in self.inside:
            together |= each
        return sum(together.values())

    @property
    def kept(self) -> Storages:
        """What stays if blocks are computed again."""
        return self.outside | self.given

    @property
    def checkpointed(self) -> int:
        """The bytes of what is kept and of the inside of one part, the largest, when it is computed again."""
        kept = self.kept
        again = (sum(size for address, size in each.items() if address not in kept) for each in self.inside)
        return sum(kept.values()) + max(again, default=0)


def recomputed(model: Autoencoder) -> Iterator[list[nn.Module]]:
    """List the parts that checkpointing computes again at once: blocks that follow each other, and each decoder."""
    blocks, start = list(model.encoder.blocks), 0
    every = recomputed_together(len(blocks))
    for stop in model.method.taps:
        yield from (blocks[i : min(i + every, stop)] for i in range(start, stop, every))
        start = stop
    yield from ([decoder] for decoder in model.decoders)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # data_ptr is none where there is no data
