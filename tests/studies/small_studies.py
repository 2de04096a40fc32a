"""A study that takes seconds, changes to it, and results that nobody ran."""

from dataclasses import asdict
from pathlib import Path

import yaml

from mirl.studies.definition import read_study
from mirl.studies.results import Result, hardware, versions
from mirl.studies.stages import fingerprint_of, stages_of
from mirl.tasks.accuracy import wilson, write_json

TRAINING = {"epochs": 1, "batch_size": 16, "workers": 0, "precision": "32"}
SMALL = {
    "title": "A small study", "data": "shapes:40:32", "images": 40, "model": "vit_24x2", "decoder_blocks": 4,
    "seeds": [0, 1], "expected": {"minutes": 0.2, "depth": 4, "machine": "a machine"},
    "pretrain": {"image_size": 32, "patch_size": 8, "decoder_width": 16, **TRAINING},
    "finetune": {"randaugment": "none", **TRAINING},
    "probe": {"epochs": 1, "workers": 0}, "knn": {"workers": 0},
    "diagnose": {"labels": True, "images": 4, "labelled_images": 30, "workers": 0},
    "methods": {
        "mae": {"method": "mae"}, "mirl": {}, "mirl_4": {"segments": 4}, "truncated_mae": {"method": "truncated_mae"},
    },
    "panels": [
        {"title": "by depth", "mirrors": "Figure 5", "methods": ["mae", "mirl"], "depths": [2, 4]},
        {"title": "segments", "mirrors": "Table 2b", "methods": ["mirl", "mirl_4"], "depths": [4]},
        {"title": "fresh", "mirrors": "Figure 2", "methods": ["mae", "truncated_mae"], "depths": [4],
         "replaced": [0, 2]},
    ],
}  # fmt: skip
ONE_CELL = {
    "seeds": [0],
    "methods": {"mirl": {}},
    "panels": [SMALL["panels"][0] | {"methods": ["mirl"], "depths": [2]}],
}


def write_study(folder, name="small", **changes):
    """Write the small study, with other values for some names (None leaves one out); return its path."""
    path = Path(folder) / "studies" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({k: v for k, v in (SMALL | changes).items() if v is not None}, sort_keys=False))
    return path


def small_study(folder, **changes):
    return read_study(write_study(folder, **changes))


def pretend(study, cell, top1, *, seconds=10.0, device=None, images=400):
    """Write a result of a cell that was never run."""
    stages = stages_of(study, cell)
    judged = {"top1": top1, "interval": wilson(round(top1 * images), images), "images": images}
    found = {"held_out_loss": 0.5} | {stage.command: judged for stage in stages[1:]}
    result = Result(
        study=study.name, cell=cell, fingerprint=fingerprint_of(stages), date="2026-01-01T00:00:00+00:00",
        versions=versions(), hardware=hardware() | ({"device": device} if device else {}),
        images={"train": 40, "test": images}, seconds={stage.command: seconds for stage in stages},
        commands=[stage.typed for stage in stages], options={}, results=found,
    )  # fmt: skip
    write_json(study.results / f"{cell.name}.json", asdict(result))
