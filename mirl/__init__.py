"""Masked image residual learning: self-supervised pre-training that makes deep Vision Transformers pay off.

The names below are the public API; they are imported on first use, so that `import mirl` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mirl.analysis.app import app
    from mirl.analysis.cost import info
    from mirl.analysis.degradation import diagnose
    from mirl.analysis.planning import RunPlan, plan
    from mirl.analysis.reconstruct import reconstruct
    from mirl.analysis.reconstructor import Reconstructor
    from mirl.checkup.doctor import doctor
    from mirl.checkup.report import DataReport
    from mirl.errors import UserError
    from mirl.reports.page import report
    from mirl.studies.study import study
    from mirl.tasks.convert import Conversion, convert
    from mirl.tasks.detect import detect
    from mirl.tasks.detector import load_detector
    from mirl.tasks.embed import embed
    from mirl.tasks.evaluate import evaluate
    from mirl.tasks.finetune import finetune
    from mirl.tasks.knn import knn
    from mirl.tasks.pretrain import pretrain
    from mirl.tasks.probe import probe
    from mirl.tasks.segment import segment
    from mirl.tasks.segmenter import load_segmenter
    from mirl.tasks.settings.detection import Detection
    from mirl.tasks.settings.diagnosis import DiagnoseOptions
    from mirl.tasks.settings.evaluation import EvaluateOptions
    from mirl.tasks.settings.features import EmbedOptions
    from mirl.tasks.settings.finetuning import Finetuning
    from mirl.tasks.settings.planning import PlanOptions
    from mirl.tasks.settings.pretraining import Pretraining
    from mirl.tasks.settings.readouts import KNNOptions, ProbeOptions
    from mirl.tasks.settings.segmentation import Segmentation
    from mirl.tasks.shard import shard
    from mirl.tasks.weights import load_autoencoder, load_encoder

_HOMES = {
    "pretrain": "mirl.tasks.pretrain",
    "Pretraining": "mirl.tasks.settings.pretraining",
    "finetune": "mirl.tasks.finetune",
    "Finetuning": "mirl.tasks.settings.finetuning",
    "detect": "mirl.tasks.detect",
    "Detection": "mirl.tasks.settings.detection",
    "load_detector": "mirl.tasks.detector",
    "segment": "mirl.tasks.segment",
    "Segmentation": "mirl.tasks.settings.segmentation",
    "load_segmenter": "mirl.tasks.segmenter",
    "evaluate": "mirl.tasks.evaluate",
    "EvaluateOptions": "mirl.tasks.settings.evaluation",
    "probe": "mirl.tasks.probe",
    "ProbeOptions": "mirl.tasks.settings.readouts",
    "knn": "mirl.tasks.knn",
    "KNNOptions": "mirl.tasks.settings.readouts",
    "embed": "mirl.tasks.embed",
    "EmbedOptions": "mirl.tasks.settings.features",
    "convert": "mirl.tasks.convert",
    "shard": "mirl.tasks.shard",
    "Conversion": "mirl.tasks.convert",
    "reconstruct": "mirl.analysis.reconstruct",
    "Reconstructor": "mirl.analysis.reconstructor",
    "diagnose": "mirl.analysis.degradation",
    "DiagnoseOptions": "mirl.tasks.settings.diagnosis",
    "doctor": "mirl.checkup.doctor",
    "DataReport": "mirl.checkup.report",
    "report": "mirl.reports.page",
    "app": "mirl.analysis.app",
    "load_encoder": "mirl.tasks.weights",
    "load_autoencoder": "mirl.tasks.weights",
    "info": "mirl.analysis.cost",
    "plan": "mirl.analysis.planning",
    "PlanOptions": "mirl.tasks.settings.planning",
    "RunPlan": "mirl.analysis.planning",
    "study": "mirl.studies.study",
    "UserError": "mirl.errors",
}
__all__ = ["Conversion", "DataReport", "Detection", "DiagnoseOptions", "EmbedOptions", "EvaluateOptions", "Finetuning",
           "KNNOptions", "PlanOptions", "Pretraining", "ProbeOptions", "Reconstructor", "RunPlan", "Segmentation",
           "UserError", "__version__", "app", "convert", "detect", "diagnose", "doctor", "embed", "evaluate",
           "finetune", "info", "knn", "load_autoencoder", "load_detector", "load_encoder", "load_segmenter", "plan",
           "pretrain", "probe", "reconstruct", "report", "segment", "shard", "study"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mirl' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
