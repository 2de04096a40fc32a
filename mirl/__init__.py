"""Masked image residual learning: self-supervised pre-training that makes deep Vision Transformers pay off.

The names below are the public API; they are imported on first use, so that `import mirl` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mirl.analysis.app import app as app
    from mirl.analysis.cost import info as info
    from mirl.analysis.degradation import diagnose as diagnose
    from mirl.analysis.planning import RunPlan as RunPlan
    from mirl.analysis.planning import plan as plan
    from mirl.analysis.reconstruct import reconstruct as reconstruct
    from mirl.analysis.reconstructor import Reconstructor as Reconstructor
    from mirl.checkup.doctor import doctor as doctor
    from mirl.checkup.report import DataReport as DataReport
    from mirl.errors import UserError as UserError
    from mirl.reports.options import ReportOptions as ReportOptions
    from mirl.reports.page import report as report
    from mirl.studies.study import study as study
    from mirl.tasks.convert import Conversion as Conversion
    from mirl.tasks.convert import convert as convert
    from mirl.tasks.detect import detect as detect
    from mirl.tasks.detector import load_detector as load_detector
    from mirl.tasks.embed import embed as embed
    from mirl.tasks.evaluate import evaluate as evaluate
    from mirl.tasks.finetune import finetune as finetune
    from mirl.tasks.knn import knn as knn
    from mirl.tasks.pretrain import pretrain as pretrain
    from mirl.tasks.probe import probe as probe
    from mirl.tasks.segment import segment as segment
    from mirl.tasks.segmenter import load_segmenter as load_segmenter
    from mirl.tasks.settings.checkup import DoctorOptions as DoctorOptions
    from mirl.tasks.settings.converting import ConvertOptions as ConvertOptions
    from mirl.tasks.settings.detection import Detection as Detection
    from mirl.tasks.settings.detection import DetectOptions as DetectOptions
    from mirl.tasks.settings.diagnosis import DiagnoseOptions as DiagnoseOptions
    from mirl.tasks.settings.evaluation import EvaluateOptions as EvaluateOptions
    from mirl.tasks.settings.features import EmbedOptions as EmbedOptions
    from mirl.tasks.settings.finetuning import Finetuning as Finetuning
    from mirl.tasks.settings.planning import InfoOptions as InfoOptions
    from mirl.tasks.settings.planning import PlanOptions as PlanOptions
    from mirl.tasks.settings.pretraining import Pretraining as Pretraining
    from mirl.tasks.settings.readouts import KNNOptions as KNNOptions
    from mirl.tasks.settings.readouts import ProbeOptions as ProbeOptions
    from mirl.tasks.settings.reconstruction import AppOptions as AppOptions
    from mirl.tasks.settings.reconstruction import ReconstructOptions as ReconstructOptions
    from mirl.tasks.settings.segmentation import Segmentation as Segmentation
    from mirl.tasks.settings.segmentation import SegmentOptions as SegmentOptions
    from mirl.tasks.settings.sharding import ShardOptions as ShardOptions
    from mirl.tasks.settings.studying import StudyOptions as StudyOptions
    from mirl.tasks.shard import shard as shard
    from mirl.tasks.weights import load_autoencoder as load_autoencoder
    from mirl.tasks.weights import load_encoder as load_encoder

_HOMES = {
    "pretrain": "mirl.tasks.pretrain",
    "Pretraining": "mirl.tasks.settings.pretraining",
    "finetune": "mirl.tasks.finetune",
    "Finetuning": "mirl.tasks.settings.finetuning",
    "detect": "mirl.tasks.detect",
    "DetectOptions": "mirl.tasks.settings.detection",
    "Detection": "mirl.tasks.settings.detection",
    "load_detector": "mirl.tasks.detector",
    "segment": "mirl.tasks.segment",
    "SegmentOptions": "mirl.tasks.settings.segmentation",
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
    "ConvertOptions": "mirl.tasks.settings.converting",
    "shard": "mirl.tasks.shard",
    "ShardOptions": "mirl.tasks.settings.sharding",
    "Conversion": "mirl.tasks.convert",
    "reconstruct": "mirl.analysis.reconstruct",
    "ReconstructOptions": "mirl.tasks.settings.reconstruction",
    "Reconstructor": "mirl.analysis.reconstructor",
    "diagnose": "mirl.analysis.degradation",
    "DiagnoseOptions": "mirl.tasks.settings.diagnosis",
    "doctor": "mirl.checkup.doctor",
    "DoctorOptions": "mirl.tasks.settings.checkup",
    "DataReport": "mirl.checkup.report",
    "report": "mirl.reports.page",
    "ReportOptions": "mirl.reports.options",
    "app": "mirl.analysis.app",
    "AppOptions": "mirl.tasks.settings.reconstruction",
    "load_encoder": "mirl.tasks.weights",
    "load_autoencoder": "mirl.tasks.weights",
    "info": "mirl.analysis.cost",
    "InfoOptions": "mirl.tasks.settings.planning",
    "plan": "mirl.analysis.planning",
    "PlanOptions": "mirl.tasks.settings.planning",
    "RunPlan": "mirl.analysis.planning",
    "study": "mirl.studies.study",
    "StudyOptions": "mirl.tasks.settings.studying",
    "UserError": "mirl.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mirl' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return ["__version__", *_HOMES]


if not TYPE_CHECKING:  # type checkers read the imports above
    __all__ = __dir__()
