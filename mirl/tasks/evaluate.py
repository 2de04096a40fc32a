"""`mirl evaluate`: how good a fine-tuned classifier is on other images, where it errs, and whether it knows.

Of a detector: its average precision. Of a segmenter: its mean intersection over union.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

from mirl.data.labels import check_known, open_test
from mirl.data.loading import LabelledImages
from mirl.data.sources import Source
from mirl.data.transforms import evaluation_view
from mirl.errors import UserError, plural
from mirl.tasks.accuracy import Accuracy, Predictions, accuracy, predict, write_json
from mirl.tasks.average_precision import AveragePrecision
from mirl.tasks.confusion import draw_confusion
from mirl.tasks.detection_scores import evaluate_detector
from mirl.tasks.mean_iou import Overlap
from mirl.tasks.places import beside, named_after, results_of
from mirl.tasks.segmentation_scores import evaluate_segmenter
from mirl.tasks.settings.evaluation import EvaluateOptions
from mirl.tasks.trained import trained_by
from mirl.tasks.weights import open_weights
from mirl.training.files import check_writable, writing
from mirl.training.pictures import contact_sheet
from mirl.training.runs import console

WORST = 40
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        accuracy: of the classes that the data have; confusion: images [true class, said class].
        calibration_error: expected, in 0..1, over 15 bins (ECE): how far confidence is from accuracy.
        confidence: mean probability of the class that was said.
    """

    accuracy: Accuracy
    calibration_error: float
    confidence: float
    confusion: list[list[int]]


def evaluate(**options: Any) -> Evaluation | AveragePrecision | Overlap:
    """Judge a classifier on class folders, a detector on COCO annotations, or a segmenter on label maps.

    Of a classifier: accuracies and the expected calibration error as JSON, the confusion matrix, and the worst mistakes
    as a contact sheet. Of a detector: average precision, also of each class, as JSON, and what it found in COCO's
    format of results. Of a segmenter: mean IoU and that of each class as JSON, the confusion as picture and table.
    Takes the fields of `mirl.EvaluateOptions`.

    Raises:
        UserError: on a mistake in options, weights or data.
    """
    settings = EvaluateOptions(**options)
    if not settings.weights:
        raise UserError("--weights is missing; give a run folder of mirl finetune, mirl detect or mirl segment")
    folder = _folder(settings)
    check_writable(folder / "results.json")
    trainer = trained_by(settings.weights)
    if settings.multi_scale and trainer != "segment":
        raise UserError(f"--multi_scale is for segmenters, and {settings.weights} is none; leave it out")
    if trainer == "detect":
        return evaluate_detector(
            settings.weights, settings.data, folder, batch_size=settings.batch_size or 1,
            workers=settings.workers,
        )  # fmt: skip
    if trainer == "segment":
        return evaluate_segmenter(
            settings.weights, settings.data, folder, multi_scale=settings.multi_scale,
            workers=settings.workers,
        )  # fmt: skip
    weights = open_weights(settings.weights, say=console.print)
    if not weights.classes:
        raise UserError(
            f"{settings.weights} has no classifier; make one with mirl finetune --weights {settings.weights}"
        )
    split = open_test(settings.data, channels=weights.channels)
    check_known(settings.data, split.classes, weights.classes)
    known = np.array([weights.classes.index(name) for name in split.classes])
    view = partial(evaluation_view, size=weights.image_size)
    dataset = LabelledImages(split.source, split.members, view, labels=known[split.labels])
    classifier = weights.build().to("cuda" if torch.cuda.is_available() else "cpu")
    found = predict(classifier, dataset, weights.mean, weights.deviation, settings.batch_size or 64, settings.workers)

    result = judge(found, weights.classes)
    write_json(folder / "results.json", {"weights": settings.weights, "data": settings.data, **asdict(result)})
    confusion, worst = folder / "confusion.png", folder / "worst.png"
    with writing(confusion):
        draw_confusion(result.confusion, weights.classes, confusion)
    with writing(worst):
        draw_worst(found, split.source, view, weights.classes, worst)
    images, classes = plural(len(found.labels), "image"), plural(len(split.classes), "class", "es")
    console.print(f"{settings.data}: {images} of {classes}", markup=False)
    for name, reason in found.bad:
        console.print(f"left out {name}: {reason}", markup=False)
    console.print(f"{result.accuracy}", markup=False)
    console.print(f"calibration error {result.calibration_error:.2%}, mean confidence {result.confidence:.2%}")
    files = (file.name for file in (folder / "results.json", confusion, worst) if file.exists())
    console.print(f"saved {folder}: {', '.join(files)}", markup=False)
    return result


def judge(found: Predictions, classes: tuple[str, ...]) -> Evaluation:
    """Compare predictions with the truth."""
    # Slow to import, and only classifiers need them.
    from sklearn.metrics import confusion_matrix
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities = softmax(found.scores, axis=1)
    error = multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(found.labels), len(classes), n_bins=CALIBRATION_BINS
    )
    said = found.scores.argmax(axis=1)
    return Evaluation(
        accuracy(found.scores, found.labels, classes),
        float(error),
        float(probabilities.max(axis=1).mean()),
        confusion_matrix(found.labels, said, labels=np.arange(len(classes))).tolist(),
    )


def draw_worst(
    found: Predictions, source: Source, view: Callable[[Tensor], Tensor], classes: tuple[str, ...], path: Path
) -> None:
    """Draw the mistakes of which the classifier was surest to a PNG; without a mistake there is no picture."""
    path.unlink(missing_ok=True)
    probabilities = softmax(found.scores, axis=1)
    said, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(said != found.labels)
    worst = wrong[np.argsort(-sure[wrong])][:WORST]
    if len(worst):
        images = torch.stack([view(source.read(int(found.indices[i]))) for i in worst])
        captions = [f"{classes[said[i]]} {sure[i]:.0%}\nis {classes[found.labels[i]]}" for i in worst]
        contact_sheet(images, captions, path, f"the {len(worst)} surest of {len(wrong)} mistakes")


def _folder(options: EvaluateOptions) -> Path:
    if options.out:
        return Path(options.out)
    assert options.weights is not None
    folder = beside(options.weights) / "evaluations"
    return results_of(options.data, folder, "{}/results.json", named_after(options.data)).parent
