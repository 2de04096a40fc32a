"""Weights of a small encoder, and small detectors on it."""

from collections.abc import Callable

import pytest
import torch

from mirl.heads.mask_rcnn import Detector, DetectorShape, build_detector
from mirl.heads.pyramid import build_plain, build_windowed
from mirl.models.encoder import ARCHITECTURE, build_encoder, parse_model, timm_arguments
from mirl.models.weights import Weights


@pytest.fixture(scope="session")
def make_weights() -> Callable[..., Weights]:
    """Make weights of a model by name, for square images of so many pixels."""

    def make(name: str = "vit_32x2_2", image: int = 64, patch: int = 8, spread: float = 0.0) -> Weights:
        form, sizes = parse_model(name), ((image, image), (patch, patch))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            state = build_encoder(*form, *sizes, 3).state_dict()
            state = {name: value + spread * torch.randn_like(value) for name, value in state.items()}
        return Weights(ARCHITECTURE, timm_arguments(*form, *sizes, 3), state, (0.5,) * 3, (0.25,) * 3)

    return make


@pytest.fixture(scope="session")
def make_detector(make_weights: Callable[..., Weights]) -> Callable[..., Detector]:
    """Make a small detector of two classes by its protocol, for images of so many pixels."""

    def make(protocol: str, *, pixels: int = 64, largest: int = 96, patch: int = 8, regions: int = 16) -> Detector:
        weights = make_weights("vit_64x2_2", patch=patch)
        shape = DetectorShape(
            classes=2, width=32, fc_width=64, regions=regions, before_suppression=(100, 100),
            after_suppression=(50, 30), protocol=protocol,
        )  # fmt: skip
        if protocol == "vitdet":
            encoder = build_windowed(weights, image_size=(pixels, pixels), window=4)
        else:
            encoder = build_plain(weights)
        return build_detector(
            encoder, shape, image_size=pixels, largest=largest, mean=weights.mean, deviation=weights.deviation
        )

    return make
