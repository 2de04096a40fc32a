"""Where an encoder's weights began, as far as that can be known, and how far each block's are from there."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mirl.models.weights import Weights
from mirl.training.runs import read_config


def first_seed(weights: str) -> tuple[int | None, str]:
    """Return the seed from which a pre-training run drew its first weights, or None and why that is not known."""
    run = Path(weights).expanduser()
    if not (run / "config.yaml").exists():
        return None, "only a folder of mirl pretrain says how its weights began"
    config = read_config(run)
    if config.get("weights"):
        return None, f"the run began with the weights of {config['weights']}"
    if "method" not in config or "seed" not in config:
        return None, "its config.yaml is not of mirl pretrain"
    return int(config["seed"]), ""


def distances(weights: Weights, seed: int) -> list[float]:
    """Return for each block ||W - W0|| / ||W0|| over all of its weights, W0 drawn again from `seed`.

    Pre-training builds the encoder first, right after it sets the seed, as `Weights.build` does. Weight decay moves
    weights too: a distance says that a block was changed, not that it learned.
    """
    now, first = weights.build(num_classes=0), weights.build(trained=False, seed=seed, num_classes=0)
    pairs = zip(now.blocks, first.blocks, strict=True)
    return [float((_vector(a) - (start := _vector(b))).norm() / start.norm()) for a, b in pairs]


def _vector(block: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in block.parameters()])
