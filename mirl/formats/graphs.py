"""Models as graphs: ONNX and torch.export, with a free batch size and the weights under timm's names.

Both keep what builds the model beside the graph, so that the weights can be read back.
"""

import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mirl.errors import UserError

METADATA = "mirl"
OPSET = 20
ABOUT, WEIGHTS, FLOAT32 = f"extra/{METADATA}", "data/weights/model_weights_config.json", 7  # of torch.export's files
LARGEST = 1e9  # bytes in one ONNX file: it may have 2 GiB, and is held in memory several times over
Tensors = dict[str, Tensor]
Run = Callable[[Tensor], Tensor]


def save_onnx(model: nn.Module, path: Path, example: Tensor, outputs: Sequence[str], about: dict[str, Any]) -> str:
    """Write ONNX as `write_onnx` does, whole or not at all, in a folder that is made if missing.

    Raises:
        UserError: if `path` does not end in .onnx, is a folder or cannot be written.
    """
    if path.suffix != ".onnx" or path.is_dir():
        what = "is a folder" if path.is_dir() else "does not end in .onnx"
        raise UserError(f"{path} {what}; give the name of a file that ends in .onnx")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as folder:
            opset = write_onnx(model, Path(folder) / path.name, example, outputs, about)  # it names PATH.data
            for part in sorted(Path(folder).iterdir(), reverse=True):  # PATH.data first, which PATH refers to
                os.replace(part, path.with_name(part.name))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; give a place that can be written") from error
    return opset


def write_onnx(model: nn.Module, path: Path, example: Tensor, outputs: Sequence[str], about: dict[str, Any]) -> str:
    """Write `model` as ONNX, input `images` [batch, c, h, w], with the names of its outputs; return the opset in words.

    Tensors of more than 2 GiB in all go to a file beside it, PATH.data.
    """
    _needs("onnx", "onnxscript", "onnxruntime")
    batch = torch.export.Dim("batch")
    # Unoptimised, so that the weights keep names and shapes; onnxruntime optimises what it loads.
    program = torch.onnx.export(
        model, (example,), dynamo=True, dynamic_shapes=({0: batch},), input_names=["images"],
        output_names=list(outputs), opset_version=OPSET, optimize=False, verbose=False,
    )  # fmt: skip
    assert program is not None
    program.model.metadata_props[METADATA] = json.dumps(about)
    program.save(str(path), external_data=in_parts(model))
    return f"opset {program.model.opset_imports['']}"


def in_parts(model: nn.Module) -> bool:
    """Tell whether ONNX needs a second file, PATH.data, for the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) > LARGEST


def run_onnx(path: Path) -> Run:
    """Return a function that runs an ONNX file in onnxruntime on the CPU, float32 images in, one output."""
    _needs("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def read_onnx(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Return what `write_onnx` was told about the model, and its tensors.

    Raises:
        UserError: if the file is no ONNX of ours.
    """
    _needs("onnx")
    import onnx
    from onnx import numpy_helper

    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's own
        raise UserError(f"{path} cannot be read as ONNX; write it again with mirl convert --to onnx") from error
    about = next((prop.value for prop in model.metadata_props if prop.key == METADATA), None)
    if about is None:
        raise UserError(f"{path} does not say what model it is; only ONNX that mirl convert wrote can be read back")
    tensors = {}
    for tensor in model.graph.initializer:
        tensors[tensor.name] = torch.from_numpy(np.array(numpy_helper.to_array(tensor, str(path.parent))))
        tensor.Clear()  # memory holds it once
    return json.loads(about), tensors


def write_exported(model: nn.Module, path: Path, example: Tensor, about: dict[str, Any]) -> None:
    """Write `model` as a torch.export program with a free batch size."""
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, str(path), extra_files={METADATA: json.dumps(about)})


def run_exported(path: Path) -> Run:
    """Return a function that runs a torch.export file, which must be trusted: loading it can run code."""
    return torch.export.load(str(path)).module()


def read_exported(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Return what `write_exported` was told about the model, and its tensors.

    Raises:
        UserError: if the file is no torch.export program of ours.
    """
    # Not by torch.export.load, which unpickles and evaluates what a file says.
    try:
        with zipfile.ZipFile(path) as archive:
            files = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            about = archive.read(files[ABOUT]) if ABOUT in files else b""
            if not about:
                raise UserError(
                    f"{path} does not say what model it is; only files that mirl convert wrote can be read back"
                )
            weights = json.loads(archive.read(files[WEIGHTS]))["config"]
            return json.loads(about), {name: _weight(archive, files, entry) for name, entry in weights.items()}
    except UserError:
        raise
    except Exception as error:  # of zip and JSON, and whatever a damaged file lacks
        raise UserError(f"{path} cannot be read by torch.export; write it again with mirl convert") from error


def _weight(archive: zipfile.ZipFile, files: dict[str, zipfile.ZipInfo], entry: dict[str, Any]) -> Tensor:
    """Read one tensor of a torch.export file: plain float32 that the file holds."""
    file, meta = files[f"data/weights/{entry['path_name']}"], entry["tensor_meta"]
    if entry["use_pickle"] or meta["dtype"] != FLOAT32 or file.compress_type != zipfile.ZIP_STORED:
        raise ValueError("not plain float32")
    sizes, strides = ([int(n["as_int"]) for n in meta[kind]] for kind in ("sizes", "strides"))
    if 4 * math.prod(sizes) > file.file_size:
        raise ValueError("larger than its bytes")
    values = torch.frombuffer(bytearray(archive.read(file)), dtype=torch.float32)
    return values.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"]))


def _needs(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise UserError(f"ONNX needs the package {package}: pip install 'mirl[export]'") from error
