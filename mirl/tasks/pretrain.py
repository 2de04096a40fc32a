"""`mirl pretrain`: from images to an encoder. Model, objective and data meet here through plain tensors."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from mirl.data.decode import BadImage
from mirl.data.labels import LabelledSource, is_one_folder, open_split
from mirl.data.loading import MaskedBatch, MaskedImages, spread
from mirl.data.order import ends_of, held_out_candidates, sampled_indices
from mirl.data.sources import Source, open_source
from mirl.data.transforms import fixed_view, normalise, training_view
from mirl.errors import UserError, plural
from mirl.methods import Part
from mirl.models.autoencoder import Autoencoder
from mirl.models.decoder import Decoder
from mirl.models.encoder import check_sizes, parse_model
from mirl.models.masking import split, visible_count
from mirl.models.patches import gather, grid_size, patchify
from mirl.models.weights import AutoencoderWeights, Weights
from mirl.objectives.frequency import coarse_part, part_targets
from mirl.objectives.pixels import pixel_target, reconstruction_loss
from mirl.tasks.blocks import BlockMonitor
from mirl.tasks.export import export, how_to_use
from mirl.tasks.extension import begin, extended
from mirl.tasks.objectives import Seen, extra_objectives, feature_values, open_teacher
from mirl.tasks.options import Machine, begun, built_in
from mirl.tasks.run import HELD_OUT, TRAINING, RunnableTask, train
from mirl.tasks.settings.pretraining import Pretraining, Resolved, autoencoder_of, idle_options, resolve
from mirl.tasks.warm_start import open_start, start_from
from mirl.training.checkpoints import saved_steps
from mirl.training.monitors import Monitor
from mirl.training.optimizers import adamw
from mirl.training.pictures import draw
from mirl.training.reconstructions import compose, panels, write_atlas
from mirl.training.runs import RunFolder
from mirl.training.schedules import learning_rate

BETAS = (0.9, 0.95)
HELD_OUT_SHARE, HELD_OUT_MOST = 0.02, 2000
HELD_OUT_LEAST = 8  # that all of these are damaged is unlikely; of fewer than 16 images half are held out
READ_OUT_SHARE = 0.3  # of labelled images without a test split, to test read-outs on
PICTURED = 6
COMPILED_FROM = 3600  # seconds that a run on a GPU takes
SAMPLED = 64  # images looked at to choose the image size


def pretrain(**options: Any) -> Path:
    """Pre-train an encoder on images without labels, by MIRL or MAE, and return the run folder.

    Takes the fields of `mirl.Pretraining` as keyword arguments, e.g. `mirl.pretrain(data="photos", out="runs/photos")`.

    Raises:
        UserError: on a mistake in the options, the data or the run folder.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    given = begun(Pretraining(**options), options)
    if given.resume_from and not given.resume:
        given = extended(given, options)
    start = open_start(given)
    if start and not given.model:
        given = replace(given, model=start.name if isinstance(start, Weights) else start.settings["model"])
    source = open_source(given.data, channels=given.channels, download=given.download)
    training, held_out = split_off_held_out(len(source), ends_of(source))

    def task_for(machine: Machine) -> PretrainTask:
        settings = resolve(given, images=len(training), shorter_side=typical_side(source), **machine)
        torch.manual_seed(settings.seed)
        return PretrainTask(settings, source, training, held_out, start)

    return train(given, task_for)


class PretrainTask(RunnableTask[MaskedBatch]):
    """Masked reconstruction: the autoencoder, its loss, and pictures of held-out images.

    Args:
        settings: resolved.
        training, held_out: indices into `source` of images to learn from, and of images never trained on.
        start: weights to start from.

    Raises:
        UserError: if sizes do not fit each other or the weights.
    """

    settings: Resolved
    model: Autoencoder

    def __init__(
        self,
        settings: Resolved,
        source: Source,
        training: np.ndarray,
        held_out: np.ndarray,
        start: Weights | AutoencoderWeights | None = None,
    ) -> None:
        self.settings, self.source, self.samples = settings, source, len(source)
        self.image_size, self.patch_size = settings.image_size, settings.patch_size
        check_sizes(self.image_size, self.patch_size)
        self.patches = math.prod(grid_size(self.image_size, self.patch_size))
        visible_count(self.patches, settings.mask_ratio)
        teacher = open_teacher(settings)
        self.model = autoencoder_of(settings, features=feature_values(settings, teacher))
        self.model.set_checkpointing(settings.checkpointing)
        self.method = self.model.method
        self.started = start_from(start, self.model, settings.channels) if start else []
        self.extras = extra_objectives(settings, self.method, self.model.encoder, teacher)
        view = training_view(self.image_size, settings.min_crop, settings.flip)
        self.training = self.masked_images(training, view, TRAINING)
        # The same views and masks in every run of this data, whatever its seed, so that losses compare.
        self.held_out = self.masked_images(held_out, partial(fixed_view, size=self.image_size), HELD_OUT, seed=0)
        self.blocks = None
        if settings.block_figures:
            labelled = open_read_out(settings)
            self.blocks = BlockMonitor(
                self.model.encoder, self.held_out, labelled, channels=settings.channels, precision=settings.precision,
                between=settings.evaluate_epochs * len(training),
            )  # fmt: skip

    def masked_images(
        self, members: np.ndarray, view: Callable[[Tensor], Tensor], stream: int, *, seed: int | None = None
    ) -> MaskedImages:
        return MaskedImages(
            self.source, members, view, patches=self.patches, mask_ratio=self.settings.mask_ratio,
            smallest=self.patch_size, key=(self.settings.seed if seed is None else seed, stream), substitute=True,
        )  # fmt: skip

    def optimizer(self) -> torch.optim.Optimizer:
        """Build AdamW for all parameters. Paper: Sec. 4, pre-training setup; the betas are MAE's."""
        settings = self.settings
        return adamw(
            self.model, lr=settings.peak_rate, weight_decay=settings.weight_decay, betas=BETAS,
            fused=settings.precision != "16",
        )  # fmt: skip

    def rate(self, epoch: float) -> float:
        """Return the learning rate after so many epochs."""
        s = self.settings
        warmup = min(s.warmup_epochs, s.epochs)
        return learning_rate(epoch, s.epochs, peak=s.peak_rate, warmup=warmup, schedule=s.schedule)

    @property
    def extensible(self) -> bool:
        """Whether the rate is constant before it decays, so that a longer run can go on from there."""
        return self.settings.schedule == "step"

    def begin(self, run: RunFolder) -> None:
        """Give a run that extends another the checkpoint to start from."""
        if self.settings.resume_from and not saved_steps(run.checkpoints):
            run.write_config(self.settings.saved())  # killed from here on, it is a run that --resume goes on with
            begin(run, self.settings.resume_from)

    def decide(self, device: torch.device, seconds: float) -> None:
        """Compile for long runs on a GPU, unless it was said."""
        compiled = self.settings.compile
        if compiled is None:  # every process measures its own seconds, but each compiles for itself
            compiled = device.type == "cuda" and seconds > COMPILED_FROM
        if compiled:
            self.model.compile_repeated()
        self.settings = replace(self.settings, compile=compiled)

    def loss(self, model: nn.Module, batch: MaskedBatch) -> dict[str, Tensor]:
        """Return the loss [b] of each image and, where there are several, of each objective and of each term.

        In training, objectives beside the pixels look at a share of the images. Paper: Eq. (6), (7).
        """
        images = normalise(batch.images, self.settings.channels)
        patches = patchify(images, self.patch_size)
        predictions, features = self.model.parted(model(patches, batch.visible, batch.masked))
        pixel, of_terms = reconstruction_loss(
            predictions, self.targets(images, patches, batch.masked), self.method.terms
        )
        seen = Seen(batch.images, patches, batch.masked, predictions, features)
        share = self.settings.extra_share if model.training else 1.0
        extras = {extra.name: extra.on_share(seen, share) for extra in self.extras}
        loss = pixel + sum(extra.weight_at(self.epoch) * extras[extra.name] for extra in self.extras)
        names = [term.name for term in self.method.terms]
        return {
            "loss": loss,
            **({"pixel": pixel, **extras} if extras else {}),
            **(dict(zip(names, of_terms, strict=True)) if len(names) > 1 else {}),
        }

    def targets(self, images: Tensor, patches: Tensor, masked: Tensor) -> dict[Part, Tensor]:
        """Return what predictions [b, m, p] of masked patches are compared with, for each part that a term asks for."""
        s, hidden = self.settings, gather(patches, masked)
        if not self.method.separates:
            return {"image": pixel_target(hidden, s.target)}
        coarse = patchify(coarse_part(images, s.separation_sigma, s.separation), self.patch_size)
        return part_targets(hidden, gather(coarse, masked), s.target)

    @property
    def followers(self) -> dict[str, nn.Module]:
        return {f"{extra.name}_average": extra.average.module for extra in self.extras if extra.average}

    def follow(self, step: int) -> None:
        for extra in self.extras:
            extra.follow(self.model.encoder, step, self.epoch)

    def to(self, device: torch.device) -> None:
        super().to(device)
        for extra in self.extras:
            extra.to(device)

    @property
    def encoder(self) -> VisionTransformer:
        return self.model.encoder

    @property
    def parts(self) -> list[nn.Module]:
        decoders = cast(list[Decoder], list(self.model.decoders))
        return [*self.model.encoder.blocks, *(decoder.embed for decoder in decoders), *decoders]

    def names(self, batch: MaskedBatch) -> list[str]:
        return [self.source.name_of(int(index)) for index in batch.indices]

    def example(self, size: int) -> MaskedBatch:
        """Return `size` random images, to measure memory and time with."""
        images = torch.randint(256, (size, self.settings.channels, *self.image_size), dtype=torch.uint8)
        visible, masked = split(torch.rand(size, self.patches), self.settings.mask_ratio)
        indices = torch.zeros(size, dtype=torch.int64)
        return MaskedBatch(images=images, indices=indices, visible=visible, masked=masked)

    def draw(self, run: RunFolder, monitor: Monitor, step: int, epoch: float) -> None:
        """Write the pictures of this moment: six of the held-out images, with fixed masks; what each block learns."""
        if self.blocks:
            self.blocks.observe(self.model.encoder, run, monitor, step, epoch)
        device = self.model.positions.device
        batch = cast(MaskedBatch, spread(self.held_out, PICTURED)).to(device)
        patches = patchify(normalise(batch.images, self.settings.channels), self.patch_size)
        predictions, _ = self.model.parted(self.model(patches, batch.visible, batch.masked, all_patches=True))
        columns = panels(compose(
            patches, batch.visible, batch.masked, predictions, self.method.reconstructions, target=self.settings.target,
            image_size=self.image_size, patch_size=self.patch_size, channels=self.settings.channels,
        ))  # fmt: skip
        name, atlas = f"step_{step:08d}", run.pictures / "panels" / f"step_{step:08d}.webp"
        draw(columns, run.pictures / f"{name}.png", f"{self.settings.model} · {self.method.name} · epoch {epoch:g}")
        height, width = write_atlas(columns, atlas)
        run.record({
            "kind": "pictures", "step": step, "epoch": epoch, "file": str(atlas.relative_to(run.path)),
            "panels": [panel.title for panel in columns], "images": len(batch), "height": height, "width": width,
        })  # fmt: skip

    def settle(self) -> None:
        if self.blocks:
            self.blocks.settle()

    def summary(self) -> list[str]:
        """Say everything that was chosen, before the first step."""
        s, method, model = self.settings, self.method, self.model
        encoder = sum(p.numel() for p in model.encoder.parameters()) / 1e6
        decoders = sum(p.numel() for p in model.parameters()) / 1e6 - encoder
        ignored = getattr(self.source, "ignored", 0)  # only folders have other files in them
        others = f", {plural(ignored, 'other file')} ignored" if ignored else ""
        others += ", known from an earlier start" if getattr(self.source, "remembered", False) else ""
        segments = f", {len(method.taps)} segments, decoders after blocks {', '.join(map(str, method.taps))}"
        segments = segments if len(method.taps) > 1 else ""
        depth = parse_model(s.model)[2]
        first = plural(method.depth, "block")
        built = f", its first {first}; fine-tuning adds the others" if method.depth < depth else ""
        steps = len(self.training) // s.batch_size
        (height, width), (patch_height, patch_width) = s.image_size, s.patch_size
        return [
            f"data      {s.data}: {plural(len(self.training), 'image')} to train on, {len(self.held_out)} held "
            f"out{others}",
            f"model     {s.model} ({encoder:.1f} M parameters) · {method.name}{segments}{built}",
            f"decoders  {len(method.taps)} x {plural(model.shape.depth, 'block')}, width {model.shape.width} "
            f"({decoders:.1f} M)",
            f"input     {height}x{width} px, patches of {patch_height}x{patch_width}, {plural(s.channels, 'channel')} "
            f"· {s.mask_ratio:.0%} of {self.patches} patches masked",
            f"recipe    {plural(s.epochs, 'epoch')} of {plural(steps, 'step')} · batch {s.batch_size} · peak "
            f"rate {s.peak_rate:.2g} after {plural(s.warmup_epochs, 'epoch', form='.3g')}, "
            f"{s.schedule} schedule · seed {s.seed}",
            *(["speed     blocks are compiled: the first steps take about a minute more"] if s.compile else []),
            *(["memory    blocks are computed again in the backward pass"] if s.checkpointing else []),
            *(f"weights   {line}" for line in self.started),
            *([f"parts     coarse and fine, {s.separation}, {s.separation_sigma:g} px"] if method.separates else []),
            *(f"objective {extra.about} · on {s.extra_share:.0%} of each batch" for extra in self.extras),
            *(f"warning: {line}" for line in (*idle_options(s, method), *getattr(self.source, "warnings", ()))),
        ]

    def finish(self, run: RunFolder) -> None:
        """Write the encoder and the autoencoder, and say how to use them."""
        export(self.model, self.settings, run)
        run.say(how_to_use(run, self.settings))


def open_read_out(settings: Resolved) -> tuple[LabelledSource, LabelledSource] | None:
    """Open the images on which blocks are read out: --labelled, or the built-in shapes themselves."""
    data = settings.labelled or (settings.data if built_in(settings.data) else None)
    if data is None:
        return None
    return open_split(data, channels=settings.channels, val_fraction=READ_OUT_SHARE if is_one_folder(data) else None)


def split_off_held_out(count: int, ends: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of training and held-out images: a fixed 2 % are held out, 8 to 2,000, and at most half.

    Args:
        ends: number of images up to the end of each shard; of many shards, a few have all that are held out.
    """
    if count < 2:
        raise UserError(f"{count} image is too few: one is held out for evaluation; give at least 2")
    held_out = min(HELD_OUT_MOST, max(min(count // 2, HELD_OUT_LEAST), round(HELD_OUT_SHARE * count)))
    order = np.random.default_rng(0).permutation(count if ends is None else held_out_candidates(ends, held_out))
    chosen = np.sort(order[:held_out])
    return np.delete(np.arange(count), chosen), chosen


def typical_side(source: Source) -> float:
    """Return the median shorter side, in pixels, of a sample of the images."""
    sides, bad = [], None
    for index in sampled_indices(source, SAMPLED):
        try:
            sides.append(min(source.read(int(index)).shape[-2:]))
        except BadImage as error:
            bad = f"{source.name_of(int(index))} {error.reason}"
    if not sides:
        raise UserError(f"none of the images looked at can be read, e.g. {bad}; check the data")
    return float(np.median(sides))
