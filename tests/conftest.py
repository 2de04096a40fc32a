"""Where tests find what is not part of the project, and settings of a tiny run."""

import os
from pathlib import Path

import pytest

# Runs are compared bit for bit with runs in other processes; sums depend on how many threads share them.
os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MIRL_SHARED", REPOSITORY.parent / "shared"))


@pytest.fixture
def golden() -> Path:
    """Outputs of the official implementation."""
    folder = SHARED / "golden" / "official_tiny"
    if not folder.is_dir():
        pytest.skip(f"the official implementation's outputs are not at {folder}; set MIRL_SHARED")
    return folder


@pytest.fixture
def tiny() -> dict[str, object]:
    """Options of a run that takes a second: 4 blocks, 2 segments, 32 px, 106 generated images, 6 steps an epoch.

    98 of the images are trained on.
    """
    return {
        "data": "shapes:106", "model": "vit_ti_4", "image_size": 32, "patch_size": 8, "decoder_width": 32,
        "decoder_depth": 1, "epochs": 2, "batch_size": 16, "workers": 0, "precision": "32", "report": False,
    }  # fmt: skip
