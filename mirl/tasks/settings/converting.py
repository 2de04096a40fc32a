"""Options of `mirl convert`."""

from dataclasses import dataclass
from typing import Literal

from mirl.tasks.options import Options

Kind = Literal["timm", "huggingface", "huggingface_mae", "safetensors", "onnx", "torch_export"]


@dataclass(frozen=True)
class ConvertOptions(Options):
    """Options of `mirl convert`."""

    source: str
    """run folder, official checkpoint of MIRL (.pd) or MAE (.pth), timm name, Hugging Face folder or file"""
    destination: str
    """folder for timm and huggingface, else file"""
    to: Kind = "timm"
    """timm or huggingface: the encoder or classifier; huggingface_mae: ViTMAEForPreTraining, of MAE only; safetensors:
    everything, decoders too, in one file that mirl reads; onnx or torch_export: a graph"""
    heads: int | None = None
    """of the encoder's attention, where a file of tensors does not tell them"""
    decoder_heads: int | None = None
    """of the decoders' attention, likewise"""
    taps: list[int] | None = None
    """blocks after which an official MIRL's decoders read; by default segments are equal"""
    fold_weight_norm: bool = False
    """turn weight-normalised predictions into plain ones that compute the same"""
    push_to_hub: str | None = None
    """OWNER/NAME on the Hugging Face hub, where the folder is uploaded too"""
    public: bool = False
    """let the world see what is uploaded"""
    overwrite: bool = False
    """replace what is at the destination"""
