"""Where results go: the machine and versions that they came from, and a file that every run adds to."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mirl.training import processes


def machine(fabric: processes.Fabric) -> dict[str, Any]:
    """Return what figures depend on besides the code."""
    cuda = fabric.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    return {
        "device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "python": platform.python_version(), **{name: version(name) for name in ("torch", "torchvision", "timm")},
    }  # fmt: skip


def add(result: dict[str, Any], out: Path) -> None:
    """Append a result to the list in `out`."""
    known = json.loads(out.read_text()) if out.exists() else []
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([*known, result], indent=1) + "\n")
