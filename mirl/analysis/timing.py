"""How long a pre-training step of a deep model takes here, measured in seconds on a shallow one.

A step's time is a line over the encoder's depth as long as the number of decoders, which cost the same wherever they
stand, does not change. A model of the fewest blocks gives one point of the line, blocks alone give its slope: the
difference of two whole models would be small beside what both spend in decoders, and lost in a busy machine's noise.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from mirl.data.sources import open_source
from mirl.methods import SEGMENTED
from mirl.models.encoder import build_encoder, model_name, parse_model, run_segments
from mirl.models.masking import visible_count
from mirl.models.patches import grid_size
from mirl.tasks.pretrain import BETAS, PretrainTask, split_off_held_out
from mirl.tasks.settings.pretraining import Resolved, method_of
from mirl.training.optimizers import adamw
from mirl.training.processes import Fabric
from mirl.training.task import place

ROUNDS, FEWEST = 5, 2
SECONDS = 8.0  # after which no further round begins
STACK = 1 / 3  # of the model's depth: blocks that are measured alone


@dataclass(frozen=True)
class Timing:
    """Seconds on one device, medians over rounds.

    Attributes:
        passes: forward and backward pass, of one image; update: gradient norm and AdamW, once a step.
        blocks: of the shallow model, and of the stack of blocks; images: at once.
    """

    passes: float
    update: float
    blocks: tuple[int, int]
    images: int
    rounds: int


def time_step(
    fabric: Fabric, settings: Resolved, images: int, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Measure a step of the model in `settings` over `images` at once, by a `clock` in seconds."""
    small = shallow(settings)
    depth, least = (method_of(each).depth for each in (settings, small))
    stack = max(2, round(STACK * depth))
    whole = _Whole(fabric, small, images)
    blocks = _Blocks(fabric, settings, stack, images, whole.encoder)
    rounds: list[tuple[float, float]] = []
    began = time.perf_counter()
    for turn in range(ROUNDS + 1):
        if turn > FEWEST and time.perf_counter() - began > SECONDS:
            break
        point, slope = whole.step(clock), blocks.step(clock)
        if turn:  # the first warms up
            passes, update = (a + (depth - least) / stack * b for a, b in zip(point, slope, strict=True))
            rounds.append((passes / images, update))
    return Timing(
        median(passes for passes, _ in rounds),
        median(update for _, update in rounds),
        (least, stack),
        images,
        len(rounds),
    )


def shallow(settings: Resolved) -> Resolved:
    """Return the settings of a model of as many decoders, with one block before each."""
    width, heads, _ = parse_model(settings.model)
    blocks = len(method_of(settings).taps)
    segmented, truncated = settings.method in SEGMENTED, settings.method == "truncated_mae"
    taps = list(range(1, blocks + 1)) if segmented or truncated else None
    return replace(settings, model=model_name(width, heads, blocks + truncated), segments=None, taps=taps)


class _Trial(ABC):
    """A module whose steps are timed."""

    fabric: Fabric
    module: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def loss(self) -> Tensor:
        """Compute a scalar to go back from."""

    def step(self, clock: Callable[[], float]) -> tuple[float, float]:
        """Return the seconds of the forward and the backward pass, and those of the update."""
        began = self._now(clock)
        with self.fabric.autocast():
            loss = self.loss()
        loss.backward()
        middle = self._now(clock)
        nn.utils.clip_grad_norm_(self.module.parameters(), math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return middle - began, self._now(clock) - middle

    def _now(self, clock: Callable[[], float]) -> float:
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return clock()


class _Whole(_Trial):
    """The training step of a model."""

    def __init__(self, fabric: Fabric, settings: Resolved, images: int) -> None:
        source = open_source(settings.data)
        self.fabric, self.task = fabric, PretrainTask(settings, source, *split_off_held_out(len(source)))
        place(fabric, self.task)
        self.module = self.task.model.train()
        self.encoder = self.task.model.encoder
        self.optimizer = self.task.optimizer()
        self.batch = self.task.example(images).to(fabric.device)

    def loss(self) -> Tensor:
        return self.task.loss(self.module, self.batch)["loss"].mean()


class _Blocks(_Trial):
    """Blocks of the encoder alone, on as many tokens as are visible, with the attention kernel of `like`."""

    def __init__(self, fabric: Fabric, settings: Resolved, blocks: int, images: int, like: VisionTransformer) -> None:
        width, heads, _ = parse_model(settings.model)
        size, patch = settings.image_size, settings.patch_size
        visible = visible_count(math.prod(grid_size(size, patch)), settings.mask_ratio)
        self.fabric, self.count = fabric, blocks
        self.encoder = build_encoder(width, heads, blocks, size, patch, settings.channels).to(fabric.device)
        self.module = self.encoder.blocks
        for block in self.encoder.blocks:
            block.attn.fused_attn = like.blocks[0].attn.fused_attn
        fused = settings.precision != "16"
        self.optimizer = adamw(self.module, lr=1e-5, weight_decay=settings.weight_decay, betas=BETAS, fused=fused)
        self.tokens = torch.randn(images, 1 + visible, width, device=fabric.device, requires_grad=True)

    def loss(self) -> Tensor:
        return run_segments(self.encoder, self.tokens, [self.count])[-1].float().square().mean()
