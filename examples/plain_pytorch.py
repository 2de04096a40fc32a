"""MIRL in plain PyTorch: no command, no framework, one loop.

    python examples/plain_pytorch.py                 # built-in images, about a minute on two cores

Everything of the method is in three calls: `mirl(...)` says which decoders are summed, the autoencoder predicts the
masked patches once per decoder, and `reconstruction_loss` compares the sums with the pixels.
"""

import argparse

import torch

from mirl.data.shapes import Shapes
from mirl.data.transforms import normalise
from mirl.methods import mirl
from mirl.models.autoencoder import build_autoencoder
from mirl.models.decoder import DecoderShape
from mirl.models.masking import split
from mirl.models.patches import gather, patchify
from mirl.objectives.pixels import pixel_target, reconstruction_loss


def main(steps: int = 200, batch_size: int = 32) -> list[float]:
    """Train a 12-block encoder in 4 segments; return the loss of each step."""
    torch.manual_seed(0)
    patch_size = (8, 8)
    method = mirl(depth=12, segments=4)  # terms (1, 4) and (2, 3): shallow main component, deep residual
    decoders = DecoderShape(width=96, depth=1, heads=3)
    model = build_autoencoder("vit_ti_12", method, decoders, image_size=(64, 64), patch_size=patch_size, channels=3)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=5e-4, betas=(0.9, 0.95), weight_decay=0.05
    )
    images = Shapes(count=2000)
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(images), (batch_size,)).tolist()
        batch = torch.stack([images.read(i) for i in chosen])  # uint8 [b, 3, 64, 64]

        patches = patchify(normalise(batch, channels=3), patch_size)  # [b, n, p]
        visible, masked = split(torch.rand(patches.shape[:2]), mask_ratio=0.75)  # [b, v], [b, m]
        predictions = model(patches, visible, masked)  # one [b, m, p] per decoder
        target = pixel_target(gather(patches, masked), "normalised")
        loss_of_images, loss_of_pairs = reconstruction_loss(predictions, {"image": target}, method.terms)

        loss = loss_of_images.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            pairs = ", ".join(f"{pair:.3f}" for pair in loss_of_pairs.mean(1).tolist())
            print(f"step {step:4d}  loss {losses[-1]:.3f}  pairs {pairs}", flush=True)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pre-train a small encoder on built-in images.")
    parser.add_argument("--steps", type=int, default=200)
    main(**vars(parser.parse_args()))
