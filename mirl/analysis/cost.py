"""What a model costs: parameters and multiply-adds, counted by PyTorch on tensors without storage.

The paper's Table 3 counts multiply-adds of an encoder with a 1000-class head and leaves out the two products inside
attention; both counts are given here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mirl.errors import plural
from mirl.models.autoencoder import Autoencoder
from mirl.models.encoder import embed_visible, parse_model, run_segments
from mirl.models.masking import split
from mirl.models.patches import Size
from mirl.tasks.settings.planning import InfoOptions
from mirl.tasks.settings.pretraining import autoencoder_of

IMAGES = 64
LINEAR = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution, torch.ops.aten.convolution_backward}


@dataclass(frozen=True)
class Cost:
    """Multiply-adds: `linear` of layers with weights, `attention` of the products inside attention."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.linear + other.linear, self.attention + other.attention)

    def __truediv__(self, images: int) -> "Cost":
        return Cost(self.linear / images, self.attention / images)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.linear - other.linear, self.attention - other.attention)


def count(run: Callable[[], object]) -> Cost:
    """Count the multiply-adds of what `run` computes."""
    with FlopCounterMode(display=False) as counter:
        run()
    return _counted(counter)


def _counted(counter: FlopCounterMode) -> Cost:
    operations = counter.get_flop_counts()["Global"]
    linear = sum(flops for operation, flops in operations.items() if operation in LINEAR)
    return Cost(linear / 2, (sum(operations.values()) - linear) / 2)


def encoder_cost(model: nn.Module, image_size: Size, channels: int) -> Cost:
    """Count one forward pass of a timm model over one whole image."""
    with torch.no_grad():
        return count(lambda: model(torch.empty(1, channels, *image_size, device="meta")))


@dataclass(frozen=True)
class StepCost:
    """One image through a pre-training step."""

    encoder: Cost
    decoders: Cost
    forward_and_backward: Cost


def step_cost(model: Autoencoder, mask_ratio: float) -> StepCost:
    """Count a pre-training step of an autoencoder on the meta device for one image of a batch of 64.

    Of a batch, because what is the same in every image (masked patches before the first block) is computed once.
    """
    patches = len(model.positions)
    image = torch.empty(IMAGES, patches, model.patch_values, device="meta")
    visible, masked = split(torch.empty(IMAGES, patches, device="meta"), mask_ratio)
    with torch.no_grad():
        encoder = count(
            lambda: run_segments(model.encoder, embed_visible(model.encoder, image, visible), model.method.taps)
        )
    with FlopCounterMode(display=False) as counter:
        loss = torch.stack([p.sum() for p in model(image, visible, masked)]).sum()
        forward = _counted(counter)
        loss.backward()
        both = _counted(counter)
    return StepCost(encoder / IMAGES, (forward - encoder) / IMAGES, both / IMAGES)


def parameter_count(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class ModelCost:
    """What `mirl info` prints: parameters in numbers, multiply-adds of one image."""

    parameters: int
    parameters_with_head: int
    encoder: Cost
    pretraining_parameters: int
    step: StepCost


def info(model: str, **options: Any) -> ModelCost:
    """Print a model's parameters and cost, as an encoder and in pre-training, and return them.

    Takes the fields of `mirl.InfoOptions`, e.g. `mirl.info("vit_s_54", image_size=96)`.

    Raises:
        UserError: on a mistake in the options.

    Paper: Table 3 (parameters, FLOPs).
    """
    given = InfoOptions(model=model, **options)
    settings = given.of_run(model=model)
    with torch.device("meta"):
        autoencoder = autoencoder_of(settings)
        encoder, step = autoencoder.encoder, step_cost(autoencoder, settings.mask_ratio)
        parameters, trained = parameter_count(encoder), parameter_count(autoencoder)
        encoder.reset_classifier(given.classes)
        cost = ModelCost(
            parameters, parameter_count(encoder), encoder_cost(encoder, settings.image_size, settings.channels),
            trained, step,
        )  # fmt: skip
    width, heads, depth = parse_model(model)
    decoders, shape, built = len(autoencoder.decoders), autoencoder.shape, len(encoder.blocks)
    blocks = plural(depth, "block") if built == depth else f"the first {built} of {depth} blocks"
    (height, across), patch, masked = settings.image_size, settings.patch_size, f"{settings.mask_ratio:.0%}"
    million, giga = (lambda n: f"{n / 1e6:.1f} M"), (lambda n: f"{n / 1e9:.2f} G")
    print(f"""\
{model}: {blocks}, width {width}, {heads} heads, {height}x{across} px, patches of {patch[0]}x{patch[1]}
  parameters   {million(cost.parameters)}; {million(cost.parameters_with_head)} with a {given.classes}-class head
  forward      {giga(cost.encoder.linear)} multiply-adds an image; {giga(cost.encoder.total)} with attention products
pre-training: {settings.method}, {decoders} x {shape.depth} decoder blocks {shape.width} wide, {masked} masked
  parameters   {million(cost.pretraining_parameters)}
  forward      {giga(step.encoder.total)} an image in the encoder, {giga(step.decoders.total)} in the decoders
  step         {giga(step.forward_and_backward.total)} an image, forward and backward""")
    return cost
