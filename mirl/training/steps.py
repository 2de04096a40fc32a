"""One optimizer step: its gradients over micro-batches, and how many images fit in memory at once."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic

import torch
from timm.models import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mirl.data.loading import B, seeded
from mirl.errors import UserError, plural
from mirl.models.attention import choose_attention
from mirl.models.products import fast_products
from mirl.training.allocation import keep_freed_memory
from mirl.training.evaluation import Evaluation, Means
from mirl.training.monitors import Monitor
from mirl.training.processes import Fabric, as_one, full, mesh_of, over_processes
from mirl.training.runs import RunFolder
from mirl.training.sharded import gathered, shard


class Task(ABC, Generic[B]):
    """What a command trains.

    Attributes:
        model: the module.
        average: a running average of its weights, evaluated beside it, or None.
        epoch: how far the run has come, in passes over the data; the loop sets it before each step and evaluation.
        about: what checkpoints say beside tensors, such as names of classes; a resumed run must find it unchanged.
        skeleton: the model without weights, where it is sharded (training/sharded.py), else None.
    """

    model: nn.Module
    average: ModelEmaV3 | None = None
    epoch: float = 0.0
    about: dict[str, Any] = {}  # noqa: RUF012
    skeleton: nn.Module | None = None

    @property
    def followers(self) -> dict[str, nn.Module]:
        """Averages of the model or of parts of it, by the names under which checkpoints keep them."""
        return {"average": self.average.module} if self.average else {}

    def follow(self, step: int) -> None:
        """Bring the followers up to date with the weights; called after each optimizer step that was taken."""
        if self.average:
            self.average.update(self.model, step=step)

    def shard(self, fabric: Fabric) -> None:
        """Share the model's weights among processes, if the strategy says so; before the optimizer is built."""
        if (mesh := mesh_of(fabric)) is not None:
            self.skeleton = shard(self.model, self.parts, mesh)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let `model`, if it is sharded, be an ordinary one with its weights; every process must enter."""
        shards = self.model
        if self.skeleton is not None:
            self.model = gathered(shards, self.skeleton)
        try:
            yield
        finally:
            self.model = shards

    def to(self, device: torch.device) -> None:
        """Move the model, its followers and whatever else the loss needs to `device`."""
        for module in (self.model, *self.followers.values()):
            module.to(device)

    @property
    def encoder(self) -> VisionTransformer | None:
        """The part of the model whose blocks' gradients are followed, if there is one."""
        return None

    @property
    def parts(self) -> list[nn.Module]:
        """Parts of the model, the inner first: a sharded model has whole weights in the one that computes."""
        return list(self.encoder.blocks) if self.encoder else []

    def prepare(self, batch: B) -> B:
        """Return what the loss sees of a training batch: a function of the batch, on the same device."""
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: B) -> dict[str, Tensor]:
        """Return per-image values [b]: `loss`, which is minimised, and whatever else should be recorded."""

    def evaluation(self, fabric: Fabric, model: nn.Module) -> Evaluation[B]:
        """Begin an evaluation of `model`, which is in evaluation mode: by default the means of the loss's values."""
        return Means(fabric, lambda batch: self.loss(model, batch))

    def draw(self, run: RunFolder, monitor: Monitor, step: int, epoch: float) -> None:
        """Write pictures after an evaluation; called in the first process only."""

    def settle(self) -> None:
        """Wait for what is computed beside the training; called in every process, also before each checkpoint."""

    @abstractmethod
    def example(self, size: int) -> B:
        """Return a batch of `size` meaningless images, to measure memory and time with."""

    @abstractmethod
    def names(self, batch: B) -> list[str]:
        """Name the batch's images."""


def place(fabric: Fabric, task: Task[B]) -> None:
    """Move the task to its device, and let its timm blocks use the attention that is fastest there."""
    task.to(fabric.device)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    with fabric.autocast():
        half = torch.is_autocast_enabled(fabric.device.type)
        dtype = torch.get_autocast_dtype(fabric.device.type) if half else torch.float32
    choose_attention(task.model, fabric.device, dtype)


def probe(fabric: Fabric, task: Task[B], micro_batch: int, run: RunFolder) -> tuple[int, float]:
    """Find a micro-batch that fits and measure the seconds that an image takes, by forward and backward passes.

    On a GPU the size is halved until it fits; all processes take the smallest found. A CPU keeps the size given.
    """
    gpu, model = fabric.device.type == "cuda", task.model
    place(fabric, task)
    # Room for AdamW's two moments. A sharded model has more: here it is still whole, with whole gradients.
    moments = 2 if gpu and mesh_of(fabric) is None else 0
    reserve = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(moments)]
    size = micro_batch
    with as_one(fabric):
        while (measured := _try(fabric, task, size if gpu else min(size, 16))) is None:
            if size == 1:
                raise UserError("one image does not fit in GPU memory; choose a smaller model or image")
            size //= 2
    del reserve
    if gpu:
        torch.cuda.empty_cache()
    seconds = measured or 0.0
    size = int(over_processes(fabric, torch.tensor(float(size)), "min"))
    if size < micro_batch:
        run.say(f"{micro_batch} images at once do not fit in GPU memory; taking {size}")
    return size, seconds


def _try(fabric: Fabric, task: Task[B], images: int) -> float | None:
    """Return the seconds an image takes when so many are computed at once, or None if they do not fit."""
    try:
        example = task.example(images).to(fabric.device)  # drawing it may take longer than a GPU's two passes
        for _ in range(2):  # the first pass warms up
            began = time.monotonic()
            with fast_products(task.model, fabric.device):
                with fabric.autocast():
                    loss = task.loss(task.model, task.prepare(example))["loss"].mean()
                loss.backward()
            loss.item()
        return (time.monotonic() - began) / images
    except torch.OutOfMemoryError:
        return None
    finally:
        task.model.zero_grad()


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

    @torch.no_grad()
    def culprits(self, chunks: list[B], key: tuple[int, ...]) -> list[str]:
        """Name the images whose own loss is not finite; if none is, the gradient alone overflowed."""
        names = []
        with seeded(*key), self.task.whole():
            for image in (image for piece in self._pieces(chunks) for image in piece.pieces(1)):
                with self.fabric.autocast():
                    loss = self.task.loss(self.task.model, image)["loss"]
                if not loss.isfinite().all():
                    names += self.task.names(image)
        return names

    @torch.no_grad()
    def highest(self, chunks: list[B], key: tuple[int, ...]) -> list[tuple[float, str]]:
        """Return losses and names of the images with the highest losses."""
        found: list[tuple[float, str]] = []
        with seeded(*key), self.task.whole():
            for piece in self._pieces(chunks):
                with self.fabric.autocast():
                    losses = self.task.loss(self.task.model, piece)["loss"].tolist()
                found += zip(losses, self.task.names(piece), strict=True)
        return sorted(found, reverse=True)[:NAMED]
