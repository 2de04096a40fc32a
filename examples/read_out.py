"""What did an encoder learn? Shape classes read from frozen features, against raw pixels and an untrained encoder.

    python examples/read_out.py runs/demo

A linear classifier (ridge regression) and k-NN (cosine, k = 10) are fitted on 3,000 labelled images of the built-in
shapes and tested on 1,000 others. Pre-training never saw a label. Writes read_out.json into the run folder.
`mirl probe` and `mirl knn` do this for any images.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from mirl import UserError
from mirl.data.shapes import Shapes
from mirl.data.transforms import fixed_view
from mirl.tasks.blocks import linear_accuracy
from mirl.tasks.features import Encoder, FrozenEncoder, RawPixels
from mirl.tasks.knn import vote
from mirl.tasks.weights import open_weights


def main(run: Path, train: int = 3000, test: int = 1000) -> dict[str, dict[str, float]]:
    """Print, save and return the accuracies that three kinds of features allow."""
    if not run.is_dir():
        raise UserError(f"{run} is no folder; give that of a run, e.g. runs/demo")
    weights = open_weights(str(run))
    blocks = range(1, weights.depth + 1)  # the means over patches of every block, side by side
    encoders: dict[str, Encoder] = {
        "raw pixels": RawPixels(),
        "untrained encoder": FrozenEncoder(weights, untrained=True, blocks=blocks),
        "this encoder": FrozenEncoder(weights, blocks=blocks),
    }
    splits = [Shapes(train, size=weights.image_size), Shapes(test, size=weights.image_size, split="val")]
    images = [torch.stack([split.read(i) for i in range(len(split))]) for split in splits]
    fit_labels, test_labels = (torch.tensor([split.label_of(i) for i in range(len(split))]) for split in splits)
    print(f"10 classes of shapes, {train} labelled images, {test} test images; chance is 10 %", flush=True)
    table = {}
    for name, encoder in encoders.items():
        views = [fixed_view(part, encoder.size) for part in images]
        fit, judged = (torch.cat([encoder(chunk).flatten(1).cpu() for chunk in part.split(100)]) for part in views)
        (votes,) = vote(fit, fit_labels, judged, 10, ks=[10], temperature=0.07).values()
        table[name] = {
            "linear": linear_accuracy(fit, fit_labels, judged, test_labels),
            "k-NN": float((votes.argmax(dim=1) == test_labels).float().mean()),
        }
        print(f"{name:<18} " + "   ".join(f"{kind} {value:6.1%}" for kind, value in table[name].items()), flush=True)
    (run / "read_out.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Read shape classes from an encoder's frozen features.")
    parser.add_argument("run", type=Path, help="folder of a run, e.g. runs/demo")
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        sys.exit(f"error: {error}")
