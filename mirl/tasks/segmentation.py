"""The task that `mirl segment` trains: UperNet on a ViT, its data, losses, rates and results. Paper: Table 5."""

import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirl.data.semantic import SemanticBatch, SemanticSplit, SemanticViews, View
from mirl.data.semantic_views import crop_view
from mirl.errors import UserError, plural
from mirl.heads.sliding import segment
from mirl.heads.upernet import Segmenter
from mirl.models.weights import Weights
from mirl.tasks.heads import HeadTask, notes_on_data
from mirl.tasks.mean_iou import Overlap
from mirl.tasks.run import HELD_OUT, TRAINING
from mirl.tasks.segmentation_pictures import draw_predictions, draw_training
from mirl.tasks.segmentation_scores import IoUOfHeldOut, judge, write_results
from mirl.tasks.segmenter import described, inference_of, segmenter_of
from mirl.tasks.settings.segmentation import ResolvedSegmentation
from mirl.tasks.trained import save_trained
from mirl.training.monitors import Monitor
from mirl.training.processes import Fabric
from mirl.training.runs import TRAINED, RunFolder
from mirl.training.schedules import learning_rate

AUXILIARY = 0.4  # weight of the auxiliary head's loss


def training_view(settings: ResolvedSegmentation) -> View:
    """Return what training sees of an image: the protocol's random crops, with --overfit unscaled ones."""
    crop, size = settings.crop_size, settings.image_size
    if settings.overfit is not None:
        return crop_view(crop, size, scales=(1.0, 1.0), largest_share=1.0, flip=False, photometric=False)
    return crop_view(crop, size, flip=settings.flip, photometric=settings.photometric)


class SegmentTask(HeadTask[SemanticBatch]):
    """UperNet on a ViT.

    Args:
        settings: resolved; weights: of the encoder; train, val: splits of the same classes.

    Raises:
        UserError: if encoder and sizes do not fit, or there is a single class.
    """

    settings: ResolvedSegmentation
    train: SemanticSplit
    val: SemanticSplit
    model: Segmenter
    training: SemanticViews
    held_out: SemanticViews
    held_out_batch = 1  # images of any size: padded to each other they could be gigabytes

    def __init__(
        self, settings: ResolvedSegmentation, weights: Weights, train: SemanticSplit, val: SemanticSplit
    ) -> None:
        super().__init__(settings, weights, train, val)
        self.classes = train.source.classes
        if len(self.classes) < 2:
            only = self.classes[0].name
            raise UserError(f"{settings.data!r} has a single class, {only!r}; list two or more, the background too")
        self.about = described(weights, self.classes)
        self.model = segmenter_of(settings, weights, len(self.classes), trained=not settings.untrained).train()
        self.training = SemanticViews(
            train.source, train.members, training_view(settings), key=(settings.seed, TRAINING), substitute=True
        )
        self.held_out = SemanticViews(val.source, val.members, key=(0, HELD_OUT))
        self.judged: Overlap | None = None  # at the last evaluation
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # to the run's precision, once known

    @property
    def encoder(self) -> Any:
        return self.model.encoder

    def rate(self, epoch: float) -> float:
        """Return the heads' learning rate after so many epochs."""
        s = self.settings
        warmup = min(s.warmup_epochs, s.epochs)
        return learning_rate(epoch, s.epochs, peak=s.peak_rate, warmup=warmup, schedule="linear")

    def loss(self, model: nn.Module, batch: SemanticBatch) -> dict[str, Tensor]:
        """Return each image's loss [b], its two parts, and the share of right pixels."""
        parts: dict[str, Tensor] = model(batch.images.float() / 255, batch.labels)
        return {"loss": parts["decode"] + AUXILIARY * parts["auxiliary"], **parts}

    def segment(self, model: nn.Module, image: Tensor, *, multi_scale: bool = False) -> Tensor:
        """Return the classes of an image's pixels, uint8 [h, w], from uint8 [c, h, w]."""
        with self.autocast():
            return segment(model, image, inference_of(self.settings, multi_scale=multi_scale))  # type: ignore[arg-type]

    def evaluation(self, fabric: Fabric, model: nn.Module) -> IoUOfHeldOut:
        """Begin to segment held-out images."""
        self.autocast = fabric.autocast
        return IoUOfHeldOut(fabric, partial(self.segment, self.model), self.classes, len(self.held_out), self._keep)

    def _keep(self, found: Overlap) -> None:
        self.judged = found

    def example(self, size: int) -> SemanticBatch:
        """Return random crops with random labels."""
        side = self.settings.crop_size
        return SemanticBatch(
            images=torch.randint(256, (size, self.weights.channels, side, side), dtype=torch.uint8),
            labels=torch.randint(len(self.classes), (size, side, side), dtype=torch.uint8),
            sizes=torch.full((size, 2), side), indices=torch.zeros(size, dtype=torch.int64),
        )  # fmt: skip

    def draw(self, run: RunFolder, _: Monitor, step: int, epoch: float) -> None:
        """Write what the segmenter is shown, before the first step, and what it says of held-out images."""
        if step == 0:
            draw_training(self.training, self.classes, run.pictures / "augmented.png")
        path, title = run.pictures / f"step_{step:08d}.png", f"held-out images · epoch {epoch:g}"
        draw_predictions(partial(self.segment, self.model), self.held_out, self.classes, path, title)

    def summary(self) -> list[str]:
        """Say everything that was chosen, before the first step."""
        s, w = self.settings, self.weights
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        notes = [*notes_on_data(s, self.train, self.val), *self.notes()]
        if s.inference == "whole":
            notes.append("tests look at whole images: --stride has no effect")
        positions = "absolute and relative" if s.relative_positions else "absolute"
        windows = f"windows of {s.crop_size} px every {s.stride}" if s.inference == "slide" else "whole"
        steps = len(self.training) // s.batch_size
        return [
            f"data      {s.data}: {plural(len(self.train), 'image')} to train on, {len(self.val)} to test, "
            f"{plural(len(self.classes), 'class', 'es')}",
            f"model     UperNet on {s.weights}: ViT of {plural(len(self.encoder.blocks), 'block')}, positions "
            f"{positions}, decoder {s.width} wide ({parameters:.1f} M parameters)",
            f"input     crops of {s.crop_size} px of images scaled around {s.image_size} px, patches of "
            f"{s.patch_size}, {plural(w.channels, 'channel')}; tests at {s.image_size} px, {windows}",
            f"recipe    {plural(s.epochs, 'epoch')} of {plural(steps, 'step')} · batch "
            f"{s.batch_size} · peak rate {s.peak_rate:.2g} after {plural(s.warmup_epochs, 'epoch', form='.3g')}, "
            f"then falling to 0 · layer decay {s.layer_decay:g} · drop path {s.drop_path:g} · seed {s.seed}",
            *(f"note      {note}" for note in notes),
        ]

    def finish(self, run: RunFolder) -> None:
        """Write the segmenter, and how good it is."""
        save_trained(self.model, self.settings, self.about, run.path / TRAINED["segment"])
        self.model.eval()
        if self.judged is None:  # a complete run that was started again
            if (run.path / "results.json").exists():
                return
            self.judged, _ = judge(partial(self.segment, self.model), self.val, self.classes, self.settings.workers)
        more: dict[str, Any] = {"data": self.settings.data}
        run.say(str(self.judged))
        if self.settings.multi_scale:
            several = partial(self.segment, self.model, multi_scale=True)
            averaged, _ = judge(several, self.val, self.classes, self.settings.workers)
            run.say(f"with six sizes and their mirror images: {averaged}")
            more["multi_scale"] = averaged.as_json()
        write_results(self.judged, run.path, **more)
        run.say(how_to_segment(run.path, self.weights.channels))


def how_to_segment(path: Path, channels: int) -> str:
    """Return lines that a user can paste."""
    folder = shlex.quote(str(path))
    return f"""
done: {path} · results.json has the IoU of each class, confusion.png what is taken for what

    mirl segment {folder} --predict IMAGES
    mirl evaluate --weights {folder} --data OTHER_LABELS

    import mirl, torch
    segmenter = mirl.load_segmenter("{path}")
    labels = segmenter(torch.zeros({channels}, 480, 640, dtype=torch.uint8))   # [480, 640], as segmenter.classes says
"""
