"""What did an encoder learn? Shape classes read from frozen features, against raw pixels and an untrained encoder.

    python examples/read_out.py runs/demo

k-NN (cosine, k = 10) and a linear classifier (ridge regression) are fitted on 4,000 labelled images of the built-in
shapes and tested on 1,000 others. Labels were never used in pre-training. Writes read_out.json into the run folder.
"""

import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mirl.data.shapes import Shapes
from mirl.data.transforms import fixed_view, normalise
from mirl.models.encoder import build_encoder


@torch.inference_mode()
def features(encoder: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    """Return the encoder's mean over patch tokens [b, d] for uint8 images [b, 3, h, w]; nothing is masked."""
    return torch.cat([encoder.eval()(normalise(chunk, 3)) for chunk in images.split(100)]).numpy()


def accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> dict[str, float]:
    """Return the share of test images whose class k-NN and a linear classifier find."""
    knn = KNeighborsClassifier(10, metric="cosine").fit(train, train_labels)
    linear = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(0, 4, 9))).fit(train, train_labels)
    return {"k-NN": knn.score(test, test_labels), "linear": linear.score(test, test_labels)}


def main(run: Path) -> None:
    """Print and save the accuracies of three kinds of features."""
    trained = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True)
    size, patch, blocks = trained.patch_embed.img_size, trained.patch_embed.patch_size, trained.blocks
    torch.manual_seed(0)
    untrained = build_encoder(trained.embed_dim, blocks[0].attn.num_heads, len(blocks), size, patch, 3)
    images, labels = [], []
    for data in (Shapes(4000), Shapes(1000, split="val")):
        images.append(torch.stack([fixed_view(data.read(i), size) for i in range(len(data))]))
        labels.append(np.array([data.label_of(i) for i in range(len(data))]))
    table = {}
    for name, encoder in (("raw pixels", None), ("untrained encoder", untrained), ("this encoder", trained)):
        train, test = (features(encoder, part) if encoder else part.flatten(1).numpy() / 255 for part in images)
        table[name] = accuracy(train, labels[0], test, labels[1])
        print(f"{name:<18} " + "   ".join(f"{kind} {value:6.1%}" for kind, value in table[name].items()), flush=True)
    (run / "read_out.json").write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
