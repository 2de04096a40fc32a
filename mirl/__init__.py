"""Masked image residual learning: self-supervised pre-training that makes deep Vision Transformers pay off.

The names below are the public API; they are imported on first use, so that `import mirl` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mirl.analysis.cost import info
    from mirl.errors import UserError
    from mirl.tasks.pretrain import pretrain
    from mirl.tasks.settings import Pretraining

_HOMES = {
    "pretrain": "mirl.tasks.pretrain",
    "Pretraining": "mirl.tasks.settings",
    "info": "mirl.analysis.cost",
    "UserError": "mirl.errors",
}
__all__ = ["Pretraining", "UserError", "__version__", "info", "pretrain"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mirl' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
