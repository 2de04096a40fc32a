"""What did an encoder learn? Shape classes read from frozen features, against raw pixels and an untrained encoder.

    python examples/read_out.py runs/demo

A linear classifier (ridge regression) and k-NN (cosine, k = 10) are fitted on 4,000 labelled images of the built-in
shapes and tested on 1,000 others. Pre-training never saw a label. Writes read_out.json into the run folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

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
def features(encoder: Any, images: torch.Tensor) -> np.ndarray:
    """Return each block's mean over patch tokens, side by side [b, blocks * d], of uint8 images [b, 3, h, w]."""
    chunks = []
    for chunk in torch.split(images, 100):
        options = {"norm": True, "intermediates_only": True, "output_fmt": "NLC"}
        blocks = encoder.eval().forward_intermediates(normalise(chunk, 3), **options)
        chunks.append(torch.cat([tokens.mean(dim=1) for tokens in blocks], dim=1))
    return torch.cat(chunks).numpy()


def pixels(images: torch.Tensor) -> np.ndarray:
    """Return the images themselves [b, 3072], at 32 px to be quick."""
    return fixed_view(images, (32, 32)).flatten(1).numpy() / 255


def accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> dict[str, float]:
    """Return the share of test images whose class each classifier finds."""
    linear = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(0, 5, 6))).fit(train, train_labels)
    knn = KNeighborsClassifier(10, metric="cosine").fit(train, train_labels)
    return {"linear": linear.score(test, test_labels), "k-NN": knn.score(test, test_labels)}


def main(run: Path, train: int = 4000, test: int = 1000) -> dict[str, dict[str, float]]:
    """Print, save and return the accuracies that three kinds of features allow."""
    trained = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True)
    size, heads = trained.patch_embed.img_size, trained.blocks[0].attn.num_heads
    torch.manual_seed(0)
    untrained = build_encoder(trained.embed_dim, heads, len(trained.blocks), size, trained.patch_embed.patch_size, 3)
    images, labels = [], []
    for data in (Shapes(train, size=size), Shapes(test, size=size, split="val")):
        images.append(torch.stack([data.read(i) for i in range(len(data))]))
        labels.append(np.array([data.label_of(i) for i in range(len(data))]))
    print(f"10 classes of shapes, {train} labelled images, {test} test images; chance is 10 %", flush=True)
    table = {}
    for name, encoder in (("raw pixels", None), ("untrained encoder", untrained), ("this encoder", trained)):
        seen, unseen = (features(encoder, part) if encoder else pixels(part) for part in images)
        table[name] = accuracy(seen, labels[0], unseen, labels[1])
        print(f"{name:<18} " + "   ".join(f"{kind} {value:6.1%}" for kind, value in table[name].items()), flush=True)
    (run / "read_out.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


if __name__ == "__main__":
    main(Path(sys.argv[1]))
