"""`mirl finetune`: a classifier from a pre-trained encoder, by MAE's recipe, which the paper follows."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.models import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.data.labels import LabelledSource, open_split
from mirl.data.loading import Batch, LabelledBatch, LabelledImages, spread
from mirl.data.transforms import augmented_view, evaluation_view, standardise
from mirl.errors import UserError, plural
from mirl.models.encoder import check_sizes
from mirl.tasks.accuracy import Accuracy, accuracy, predict, write_json
from mirl.tasks.export import export_classifier, how_to_classify
from mirl.tasks.heads import HeadTask
from mirl.tasks.options import Machine, begun, required
from mirl.tasks.run import HELD_OUT, TRAINING, train
from mirl.tasks.settings.finetuning import Finetuning, ResolvedFinetuning, resolve_finetuning
from mirl.tasks.weights import Weights, open_weights
from mirl.training.monitors import Monitor
from mirl.training.pictures import contact_sheet
from mirl.training.runs import RunFolder
from mirl.training.schedules import learning_rate

HEAD_DEVIATION = 2e-5  # MAE's
PICTURED = 24


def finetune(**options: Any) -> Path:
    """Train a classifier from an encoder on class folders, and return the run folder.

    Takes the fields of `mirl.Finetuning` as keyword arguments, e.g. `mirl.finetune(weights="runs/a", data="labelled")`.

    Raises:
        UserError: on a mistake in the options, the weights, the data or the run folder.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    given = begun(Finetuning(**options), options)
    weights = open_weights(required(given.weights))
    splits = open_split(given.data, channels=weights.channels, val_fraction=given.val_fraction, seed=given.seed)

    def task_for(machine: Machine) -> FinetuneTask:
        settings = resolve_finetuning(
            given, images=len(splits[0]), depth=weights.full_depth or weights.depth, image_size=weights.image_size,
            patch_size=weights.patch_size, **machine,
        )  # fmt: skip
        return FinetuneTask(settings, weights, *splits)

    return train(given, task_for)


@dataclass(frozen=True, kw_only=True)
class MixedBatch(Batch):
    """Normalised, mixed images [b, c, h, w] with `targets` [b, classes], which sum to one."""

    targets: Tensor


class FinetuneTask(HeadTask[Batch]):
    """Classification: a timm ViT with global pooling, a fresh norm and a fresh head.

    Args:
        settings: resolved; weights: what to start from; train, val: splits of the same classes.

    Raises:
        UserError: if sizes do not fit, or an augmentation does not suit the images.
    """

    settings: ResolvedFinetuning
    model: VisionTransformer

    def __init__(
        self, settings: ResolvedFinetuning, weights: Weights, train: LabelledSource, val: LabelledSource
    ) -> None:
        super().__init__(settings, weights, train, val)
        self.classes, self.about = train.classes, {"classes": list(train.classes)}
        check_sizes(settings.image_size, settings.patch_size)
        if settings.reinit_last > settings.depth:
            raise UserError(f"--reinit_last {settings.reinit_last} is more than the {plural(settings.depth, 'block')}")
        self.randaugment = settings.randaugment if weights.channels == 3 else "none"
        self.model = build_classifier(settings, weights, len(self.classes))
        if settings.ema is not None:
            # timm's average with these two numbers is MAE's relatives' min(decay, (1 + t) / (10 + t)).
            self.average = ModelEmaV3(self.model, decay=settings.ema, use_warmup=True, warmup_gamma=9, warmup_power=1)
        try:
            view = augmented_view(settings.image_size, settings.min_crop, settings.flip, self.randaugment)
        except (AssertionError, ValueError, KeyError) as error:
            raise UserError(
                f"--randaugment {settings.randaugment} is not allowed; give timm's description, such as "
                "rand-m9-mstd0.5-inc1, or none"
            ) from error
        self.training = LabelledImages(
            train.source, train.members, view, labels=train.labels, key=(settings.seed, TRAINING), substitute=True
        )
        see = partial(evaluation_view, size=settings.image_size)
        self.held_out = LabelledImages(val.source, val.members, see, labels=val.labels, key=(0, HELD_OUT))
        mixes = settings.mixup > 0 or settings.cutmix > 0
        self.mix = (
            Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=len(self.classes))
            if mixes
            else None
        )

    def rate(self, epoch: float) -> float:
        """Return the head's learning rate after so many epochs."""
        s = self.settings
        warmup = min(s.warmup_epochs, s.epochs)
        return learning_rate(epoch, s.epochs, peak=s.peak_rate, warmup=warmup, schedule="cosine", least=s.min_lr)

    def prepare(self, batch: Batch) -> Batch:
        """Normalise, erase and mix a micro-batch; the last image of an odd number stays unmixed."""
        assert isinstance(batch, LabelledBatch)
        s = self.settings
        images = standardise(batch.images, self.weights.mean, self.weights.deviation)
        erase = RandomErasing(s.erasing, mode="pixel", max_count=1, device=str(images.device))
        images = erase(images)
        targets = mixup_target(batch.labels, len(self.classes), smoothing=s.smoothing)
        if self.mix and len(batch) > 1:
            even = len(batch) // 2 * 2
            _, targets[:even] = self.mix(images[:even], batch.labels[:even])
        return MixedBatch(images=images, indices=batch.indices, targets=targets, bad=batch.bad)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return soft-target cross-entropy [b] in training, cross-entropy and accuracies [b] of labelled images."""
        if isinstance(batch, MixedBatch):
            return {"loss": F.cross_entropy(model(batch.images).float(), batch.targets, reduction="none")}
        assert isinstance(batch, LabelledBatch)
        scores = model(standardise(batch.images, self.weights.mean, self.weights.deviation)).float()
        best = scores.topk(min(5, len(self.classes)), dim=1).indices == batch.labels[:, None]
        top5 = {"top5": best.any(dim=1).float()} if len(self.classes) > 5 else {}
        loss = F.cross_entropy(scores, batch.labels, reduction="none")
        return {"loss": loss, "top1": best[:, 0].float(), **top5}

    @property
    def encoder(self) -> VisionTransformer:
        return self.model

    def example(self, size: int) -> LabelledBatch:
        """Return `size` random images, to measure memory and time with."""
        images = torch.randint(256, (size, self.weights.channels, *self.settings.image_size), dtype=torch.uint8)
        zeros = torch.zeros(size, dtype=torch.int64)
        return LabelledBatch(images=images, indices=zeros, labels=zeros)

    def draw(self, run: RunFolder, _: Monitor, step: int, epoch: float) -> None:
        """Write what the classifier is shown, before the first step, and what it says of held-out images."""
        if step == 0:
            shown = spread(self.training, PICTURED)
            contact_sheet(
                shown.images, self._class_names(shown), run.pictures / "augmented.png", "training images, before mixing"
            )
        batch = spread(self.held_out, PICTURED)
        if not len(batch):
            return
        device = next(self.model.parameters()).device
        scores = self.model(standardise(batch.images.to(device), self.weights.mean, self.weights.deviation))
        said = [self.classes[int(i)] for i in scores.argmax(dim=1)]
        captions = [
            name if name == truth else f"{name}\nis {truth}"
            for name, truth in zip(said, self._class_names(batch), strict=True)
        ]
        contact_sheet(
            batch.images, captions, run.pictures / f"step_{step:08d}.png", f"held-out images · epoch {epoch:g}"
        )

    def _class_names(self, batch: Batch) -> list[str]:
        assert isinstance(batch, LabelledBatch)
        return [self.classes[int(label)] for label in batch.labels]

    def summary(self) -> list[str]:
        """Say everything that was chosen, before the first step."""
        s, w = self.settings, self.weights
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        notes = self.notes()
        pooled = "mean over patches" if s.pool == "mean" else "class token"
        if s.reinit_last:
            notes.append(f"fresh weights for the last {plural(s.reinit_last, 'block')}")
        if self.model.patch_embed.grid_size != tuple(i // p for i, p in zip(w.image_size, w.patch_size, strict=True)):
            notes.append("positions resampled to another number of patches")
        if self.randaugment != s.randaugment:
            notes.append(f"RandAugment works on RGB, and these images have {plural(w.channels, 'channel')}: left out")
        (height, width), (patch_height, patch_width) = s.image_size, s.patch_size
        steps = len(self.training) // s.batch_size
        return [
            f"data      {s.data}: {plural(len(self.train), 'image')} to train on, {len(self.val)} to test, "
            f"{plural(len(self.classes), 'class', 'es')}",
            f"model     {s.weights}: ViT of {plural(s.depth, 'block')} with a fresh head on the {pooled} "
            f"({parameters:.1f} M parameters)",
            f"input     {height}x{width} px, patches of {patch_height}x{patch_width}, {plural(w.channels, 'channel')}",
            f"recipe    {plural(s.epochs, 'epoch')} of {plural(steps, 'step')} · batch {s.batch_size} · peak "
            f"rate {s.peak_rate:.2g} after {plural(s.warmup_epochs, 'epoch', form='.3g')} "
            f"· layer decay {s.layer_decay:g} · drop path {s.drop_path:g} · seed {s.seed}",
            f"images    crops from {s.min_crop:g} of the area · {self.randaugment} · erasing {s.erasing:g} "
            f"· mixup {s.mixup:g} · cutmix {s.cutmix:g} · smoothing {s.smoothing:g}",
            *(f"note      {note}" for note in notes),
        ]

    def finish(self, run: RunFolder) -> None:
        """Judge the last weights, and their average, on the test split; write results.json and the classifier."""
        models = {"weights": self.model} | ({"average": self.average.module} if self.average else {})
        results = {name: self.judge(model) for name, model in models.items()}
        write_json(run.path / "results.json", {"data": self.settings.data, "classes": len(self.classes), **results})
        for name, result in results.items():
            run.say(f"{name}: {result}")
        best = self.average.module if self.average else self.model
        export_classifier(best, self.weights, self.classes, self.settings.image_size, run)
        run.say(how_to_classify(run, self.settings.image_size, self.weights.channels, len(self.classes)))

    def judge(self, model: VisionTransformer) -> Accuracy:
        """Return a model's accuracy on the whole test split."""
        found = predict(
            model, self.held_out, self.weights.mean, self.weights.deviation, self.settings.micro_batch,
            self.settings.workers,
        )  # fmt: skip
        return accuracy(found.scores, found.labels, self.classes)


def build_classifier(settings: ResolvedFinetuning, weights: Weights, classes: int) -> VisionTransformer:
    """Build the model to fine-tune: mean over patches, then a fresh norm and head; drop path. Paper: Sec. 4.

    With `pool` cls the head reads the class token after the encoder's own norm instead.
    """
    pooled = settings.pool == "mean"
    changes: dict[str, Any] = {
        "num_classes": classes, "depth": settings.depth, "img_size": settings.image_size,
        "patch_size": settings.patch_size, "drop_path_rate": settings.drop_path,
        "global_pool": "avg" if pooled else "token", "fc_norm": pooled,
    }  # fmt: skip
    build = partial(weights.build, seed=settings.seed, **changes)
    model = build(trained=not settings.untrained)
    if settings.reinit_last:
        fresh = build(trained=False)
        model.blocks[-settings.reinit_last :].load_state_dict(fresh.blocks[-settings.reinit_last :].state_dict())
    if pooled:
        model.fc_norm.reset_parameters()
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        nn.init.trunc_normal_(model.head.weight, std=HEAD_DEVIATION)
    nn.init.zeros_(model.head.bias)
    return model.train()
