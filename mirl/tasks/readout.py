"""What a read-out of frozen features is: fitted on one split, judged on another, at one block or at every block."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure

from mirl.data.labels import open_split
from mirl.errors import plural
from mirl.tasks.accuracy import Accuracy, accuracy, write_json
from mirl.tasks.features import cache, open_encoder
from mirl.tasks.places import beside, named_after, results_of
from mirl.tasks.settings.readouts import ReadOutOptions
from mirl.training.files import atomic, check_writable, writing
from mirl.training.runs import console

# Reads classes: (features to fit [n, d], their labels [n], features to test [t, d], classes) -> name: scores [t, k].
Reader = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], dict[str, torch.Tensor]]


def read_out(command: str, options: ReadOutOptions, reader: Reader) -> dict[int, dict[str, Accuracy]]:
    """Compute features of both splits once, read them, print and save what was found.

    Returns:
        For each block (0 for raw pixels) the accuracy of everything that the reader names.
    """
    path = _path(options, command)
    check_writable(path)
    encoder = open_encoder(options, every_block=options.every_block)
    splits = open_split(options.data, channels=encoder.channels, val_fraction=options.val_fraction, seed=options.seed)
    classes = splits[0].classes
    images, kinds = plural(len(splits[0]), "image"), plural(len(classes), "class", "es")
    console.print(f"{options.data}: {images} to fit, {len(splits[1])} to test, {kinds}")
    train, test = (cache(encoder, split, options, "computing features") for split in splits)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = torch.from_numpy(train.labels).to(device)
    found: dict[int, dict[str, Accuracy]] = {}
    for number, block in enumerate(encoder.blocks):
        fit, judge = (torch.from_numpy(split.features[:, number].copy()).to(device) for split in (train, test))
        scores = reader(fit, labels, judge, len(classes))
        found[block] = {name: accuracy(s.cpu().numpy(), test.labels, classes) for name, s in scores.items()}
        for name, result in found[block].items():
            console.print(f"{f'block {block:<3}' if block else 'pixels'} {name:<10} {result}", markup=False)
    about = {"command": command, "options": asdict(options), "fitted_on": len(train.labels), "classes": len(classes)}
    write_json(path, about | {"blocks": found})
    console.print(f"saved {path}", markup=False)
    if options.every_block and len(found) > 1:
        picture = path.with_suffix(".png")
        with writing(picture):
            draw_depth(found, picture, f"{command} on {options.data}")
    return found


def draw_depth(found: dict[int, dict[str, Accuracy]], path: Path, title: str) -> None:
    """Draw top-1 accuracy against the block it was read after, with 95 % intervals, to a PNG."""
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name in next(iter(found.values())):
        results = [accuracies[name] for accuracies in found.values()]
        axes.plot(list(found), [100 * r.top1 for r in results], marker="o", markersize=3, label=name)
        low, high = ([100 * r.interval[i] for r in results] for i in (0, 1))
        axes.fill_between(list(found), low, high, alpha=0.2)
    axes.set(title=title, xlabel="after block", ylabel="top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _path(options: ReadOutOptions, command: str) -> Path:
    """Return --out, or a file in the run folder, or one below readouts/."""
    if options.out:
        return Path(options.out)
    assert options.weights is not None
    folder = beside(options.weights)
    block = "every_block" if options.every_block else f"block{options.block}" if options.block else ""
    untrained = "untrained" if options.untrained else ""
    weights = "" if folder.name else Path(options.weights).name  # where read-outs of others may be, too
    name = "_".join(filter(None, [command, named_after(options.data), untrained, block, options.pool, weights]))
    return results_of(options.data, folder / "readouts", "{}.json", name)
