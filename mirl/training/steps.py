"""One optimizer step: its gradients over micro-batches, and the images that spoil it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic

import torch
from timm.models import VisionTransformer
from torch import Tensor

from mirl.data.loading import B, seeded
from mirl.errors import UserError, plural
from mirl.models.products import fast_products
from mirl.training.processes import Fabric, full, over_processes
from mirl.training.runs import RunFolder
from mirl.training.task import Task

NAMED = 5  # images


@dataclass(frozen=True)
class Step:
    """What an optimizer step leaves to record.

    Attributes:
        means: of each recorded value over the batch; norm: of the gradient, before clipping.
        blocks: gradient norm of the whole encoder, then of each of its blocks; None if they were not measured.
    """

    means: dict[str, float]
    norm: float
    blocks: list[float] | None = None

    @property
    def finite(self) -> bool:
        """Whether the step was taken: a loss can overflow where its gradient does not, and the other way round."""
        return math.isfinite(self.means["loss"]) and math.isfinite(self.norm)


def block_norms(encoder: VisionTransformer) -> list[float]:
    """Return the gradient norm of the encoder, then of each of its blocks. Paper: Appendix C."""
    modules = [encoder, *encoder.blocks]
    gradients = [[p.grad for p in module.parameters() if p.grad is not None] for module in modules]
    return torch.stack([full(torch.nn.utils.get_total_norm(group)) for group in gradients]).tolist()


class Accumulator(Generic[B]):
    """Gradients of a step over its micro-batches; computes smaller pieces at once when a GPU's memory is short."""

    def __init__(
        self,
        fabric: Fabric,
        task: Task[B],
        model: Any,
        optimizer: torch.optim.Optimizer,
        clip_grad: float | None,
        run: RunFolder,
    ) -> None:
        self.fabric, self.task, self.model, self.optimizer, self.run = fabric, task, model, optimizer, run
        self.clip = clip_grad or math.inf
        self.piece = 0  # images computed at once; 0: whole micro-batches

    def step(self, chunks: list[B], key: tuple[int, ...], *, number: int, by_block: bool = False) -> Step:
        """Do optimizer step `number`, and measure each block's gradient if `by_block`.

        Whatever is random in it (drop path, mixing) is a function of `key`, so that a resumed run repeats it.
        """
        while (means := self._gradients_that_fit(chunks, key)) is None:
            self._halve(len(chunks[0]), number)
        total = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.clip, error_if_nonfinite=False)
        assert total is not None
        # Read at once: a GPU has nothing to do while it is waited for.
        *values, norm = torch.stack([*means.values(), full(total)]).tolist()
        blocks = None
        if by_block and self.task.encoder is not None and math.isfinite(norm):
            clipped = max(1.0, norm / self.clip)  # what clipping has divided by
            blocks = [value * clipped for value in block_norms(self.task.encoder)]
        step = Step(dict(zip(means, values, strict=True)), norm, blocks)
        if step.finite:
            self.optimizer.step()
        elif scaler := getattr(self.fabric.strategy.precision, "scaler", None):
            scaler.update()  # float16's loss scale, which an overflow lowers
        self.optimizer.zero_grad()
        return step

    def _gradients_that_fit(self, chunks: list[B], key: tuple[int, ...]) -> dict[str, Tensor] | None:
        try:
            with seeded(*key):
                return self._gradients(chunks)
        except torch.OutOfMemoryError:  # memory is free again only once this error, which holds activations, is gone
            return None

    def _gradients(self, chunks: list[B]) -> dict[str, Tensor]:
        images = sum(len(chunk) for chunk in chunks)
        done = 0
        sums: dict[str, Tensor] = {}
        for piece in self._pieces(chunks):
            done += len(piece)
            wait = self.fabric.no_backward_sync(self.model, enabled=done < images)
            with fast_products(self.task.model, self.fabric.device), wait:
                values = self.task.loss(self.model, piece)
                self.fabric.backward(values["loss"].sum() / images)
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach().sum()
        means = torch.stack(list(sums.values())) / images
        return dict(zip(sums, over_processes(self.fabric, means, "mean"), strict=True))

    def _pieces(self, chunks: list[B]) -> Iterator[B]:
        """Prepare whole micro-batches, which may mix their images, then cut them into what fits."""
        for chunk in chunks:
            yield from self.task.prepare(chunk.to(self.fabric.device)).pieces(self.piece or len(chunk))

    def _halve(self, micro_batch: int, step: int) -> None:
        size = self.piece or micro_batch
        if size == 1 or self.fabric.world_size > 1:  # processes must agree on the number of pieces
            remedy = "a smaller model or image" if size == 1 else f"--micro_batch {max(1, size // 2)}"
            raise UserError(f"out of GPU memory with {plural(size, 'image')} at once; try {remedy}")
        self.piece = size // 2
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()
        self.run.incident(step, "memory", f"out of GPU memory with {size} images at once; going on with {self.piece}")

    def culprits(self, chunks: list[B], key: tuple[int, ...]) -> list[str]:
        """Name the images whose own loss is not finite, computed one by one where those of a piece are not."""
        with seeded(*key), self.task.whole():
            suspects = [piece for piece in self._pieces(chunks) if not self._losses(piece).isfinite().all()]
            images = (image for piece in suspects for image in piece.pieces(1))
            return [
                name for image in images if not self._losses(image).isfinite().all() for name in self.task.names(image)
            ]

    def highest(self, chunks: list[B], key: tuple[int, ...]) -> list[tuple[float, str]]:
        """Return losses and names of the images with the highest losses."""
        found: list[tuple[float, str]] = []
        with seeded(*key), self.task.whole():
            for piece in self._pieces(chunks):
                found += zip(self._losses(piece).tolist(), self.task.names(piece), strict=True)
        return sorted(found, reverse=True)[:NAMED]

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]  # each shape would be compiled
    def _losses(self, piece: B) -> Tensor:
        """Compute losses [b] beside the steps, by the module itself: its wrapper would wait for other processes."""
        with self.fabric.autocast():
            return self.task.loss(self.task.model, piece)["loss"]
