"""The task that `mirl detect` trains: Mask R-CNN on a ViT, its data, losses, rates and results. Paper: Table 4."""

import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirl.data.instance_views import coco_view, jitter_view, whole_view
from mirl.data.instances import InstanceBatch, Instances, InstanceSplit, InstanceViews, View
from mirl.data.loading import collate
from mirl.errors import plural
from mirl.heads.mask_rcnn import Detector
from mirl.models.weights import Weights
from mirl.tasks.accuracy import write_json
from mirl.tasks.average_precision import AveragePrecision
from mirl.tasks.detection_pictures import draw_found, draw_training
from mirl.tasks.detection_scores import PrecisionOfHeldOut, Results, judge, write_detections
from mirl.tasks.detector import described, detector_of
from mirl.tasks.heads import HeadTask, notes_on_data
from mirl.tasks.run import HELD_OUT, TRAINING
from mirl.tasks.settings.detection import PROTOCOLS, Detection, ResolvedDetection
from mirl.tasks.trained import save_trained
from mirl.training.monitors import Monitor
from mirl.training.processes import Fabric
from mirl.training.runs import TRAINED, RunFolder
from mirl.training.schedules import learning_rate


def training_view(settings: ResolvedDetection) -> View:
    """Return what training sees of an image: the protocol's random views, or with --overfit what tests see."""
    size, vitdet = settings.image_size, settings.protocol == "vitdet"
    if settings.overfit is not None:
        return whole_view(size, size if vitdet else settings.largest)
    return jitter_view(size, flip=settings.flip) if vitdet else coco_view(size, settings.largest, flip=settings.flip)


class DetectTask(HeadTask[InstanceBatch]):
    """Mask R-CNN on a ViT.

    Args:
        settings: resolved; weights: of the encoder; train, val: splits of the same categories.

    Raises:
        UserError: if encoder, sizes and protocol do not fit.
    """

    settings: ResolvedDetection
    train: InstanceSplit
    val: InstanceSplit
    model: Detector
    training: InstanceViews
    held_out: InstanceViews
    held_out_batch = 1  # images of any size: padded to each other they could be gigabytes

    def __init__(self, settings: ResolvedDetection, weights: Weights, train: InstanceSplit, val: InstanceSplit) -> None:
        super().__init__(settings, weights, train, val)
        self.names_of_classes = [category.name for category in train.source.categories]
        self.about = described(weights, train.source.categories)
        self.model = detector_of(settings, weights, len(self.names_of_classes), trained=not settings.untrained).train()
        self.training = InstanceViews(
            train.source, train.members, training_view(settings), key=(settings.seed, TRAINING), substitute=True
        )
        self.held_out = InstanceViews(val.source, val.members, key=(0, HELD_OUT))
        self.judged: tuple[AveragePrecision, Results] | None = None  # at the last evaluation

    @property
    def encoder(self) -> Any:
        return self.model.backbone.encoder

    def rate(self, epoch: float) -> float:
        """Return the heads' learning rate after so many epochs."""
        s = self.settings
        return learning_rate(
            epoch, s.epochs, peak=s.peak_rate, warmup=min(s.warmup_epochs, s.epochs), schedule="step",
            decays=PROTOCOLS[s.protocol].decays,
        )  # fmt: skip

    def loss(self, model: nn.Module, batch: InstanceBatch) -> dict[str, Tensor]:
        """Return the batch's loss and its five parts, the same [b] for every image."""
        images = [image.float() / 255 for image in batch.unpadded()]
        parts = model(images, [instances.target() for instances in batch.instances])
        return {name: part.expand(len(batch)) for name, part in {"loss": sum(parts.values()), **parts}.items()}

    def evaluation(self, fabric: Fabric, model: nn.Module) -> PrecisionOfHeldOut:
        """Begin to find objects in held-out images."""
        return PrecisionOfHeldOut(fabric, model, self.val, self._keep)

    def _keep(self, found: AveragePrecision, results: Results) -> None:
        self.judged = found, results

    def example(self, size: int) -> InstanceBatch:
        """Return random images as large as training has them, lying and upright, with a few objects each."""
        s = self.settings
        long = s.image_size if s.protocol == "vitdet" else s.largest
        shapes = [(s.image_size, long), (long, s.image_size)]
        return collate([example(self.weights.channels, *shapes[i % 2]) for i in range(size)])

    def draw(self, run: RunFolder, _: Monitor, step: int, epoch: float) -> None:
        """Write what the detector is shown, before the first step, and what it finds in held-out images."""
        if step == 0:
            draw_training(self.training, self.names_of_classes, run.pictures / "augmented.png")
        path, title = run.pictures / f"step_{step:08d}.png", f"held-out images · epoch {epoch:g}"
        draw_found(self.model, self.held_out, self.names_of_classes, path, title)

    def summary(self) -> list[str]:
        """Say everything that was chosen, before the first step."""
        s, w = self.settings, self.weights
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        notes = [*notes_on_data(s, self.train, self.val), *self.notes()]
        if s.window != Detection.window and s.protocol != "vitdet":
            notes.append("--window has no effect without --protocol vitdet")
        seen = f"squares of {s.image_size} px" if s.protocol == "vitdet" else f"{s.image_size} px, at most {s.largest}"
        attention = f"windows of {s.window} patches" if s.protocol == "vitdet" else "among all patches"
        steps = len(self.training) // s.batch_size
        return [
            f"data      {s.data}: {plural(len(self.train), 'image')} to train on, {len(self.val)} to test, "
            f"{plural(len(self.names_of_classes), 'class', 'es')}",
            f"model     Mask R-CNN on {s.weights}: ViT of {plural(len(self.encoder.blocks), 'block')}, "
            f"attention {attention}, heads {s.width} wide, {plural(s.regions, 'region')} an image "
            f"({parameters:.1f} M parameters)",
            f"input     {seen}, patches of {s.patch_size}, {plural(w.channels, 'channel')}",
            f"recipe    {s.protocol} · {plural(s.epochs, 'epoch')} of {plural(steps, 'step')} · batch {s.batch_size} · "
            f"peak rate {s.peak_rate:.2g} after {plural(s.warmup_epochs, 'epoch', form='.3g')} "
            f"· layer decay {s.layer_decay:g} · drop path {s.drop_path:g} · seed {s.seed}",
            *(f"note      {note}" for note in notes),
        ]

    def finish(self, run: RunFolder) -> None:
        """Write the detector, and what the last evaluation found."""
        save_trained(self.model, self.settings, self.about, run.path / TRAINED["detect"])
        if self.judged is None:  # a complete run that was started again
            found, results, _ = judge(
                self.model.eval(), self.val, self.val.source.categories, batch_size=1, workers=self.settings.workers
            )
            self.judged = found, results
        found, results = self.judged
        write_json(run.path / "results.json", {"data": self.settings.data, **found.as_json()})
        write_detections(results, run.path)
        run.say(str(found))
        run.say(how_to_detect(run.path, self.weights.channels))


def example(channels: int, height: int, width: int) -> InstanceBatch:
    """Return a batch of one random image with three objects of class 1."""
    corners = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.3, 0.4, 0.9, 0.8], [0.6, 0.1, 0.7, 0.3]])
    boxes = (corners * torch.tensor([width, height, width, height])).round()
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    objects = Instances(boxes=boxes, labels=torch.ones(len(boxes), dtype=torch.int64), masks=masks)
    images = torch.randint(256, (1, channels, height, width), dtype=torch.uint8)
    return InstanceBatch(
        images=images, sizes=torch.tensor([[height, width]]), indices=torch.zeros(1, dtype=torch.int64),
        instances=(objects,),
    )  # fmt: skip


def how_to_detect(path: Path, channels: int) -> str:
    """Return lines that a user can paste."""
    folder = shlex.quote(str(path))
    return f"""
done: {path} · results.json has the AP of each class, pictures/ shows what is found

    mirl detect {folder} --predict IMAGES
    mirl evaluate --weights {folder} --data OTHER_ANNOTATIONS

    import mirl, torch
    detector, categories = mirl.load_detector("{path}")
    found = detector([torch.rand({channels}, 480, 640)])   # of each image boxes, labels, scores, masks
"""
