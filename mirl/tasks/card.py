"""The model card that goes with weights: what they are, how to open them, how they were trained, with what result."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mirl.errors import plural
from mirl.models.weights import AutoencoderWeights, Weights
from mirl.reports.contents import number
from mirl.training.runs import read_rows

# Options of the machine and the folder, which say nothing of the weights.
NOT_OF_THE_RECIPE = (
    *("out", "micro_batch", "devices", "num_nodes", "workers", "checkpoint_minutes", "checkpoint_steps", "max_bad"),
    *("strategy", "evaluate_epochs", "block_figures", "labelled", "report"),
)
OPEN = {
    "timm": """
import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()   # from the hub: "hf-hub:OWNER/NAME"
""",
    "huggingface": """
import transformers
model = transformers.AUTO.from_pretrained("FOLDER")   # from the hub: "OWNER/NAME"
""",
}


def run_of(path: Path) -> Path | None:
    """Return the run folder that `path` is a part of, if any: what merely lies in one is not of that run."""
    path = path.resolve()
    parts = {"encoder": path.parent, "autoencoder.safetensors": path.parent, "model.safetensors": path.parents[1]}
    folder = path if path.is_dir() and path.name != "encoder" else parts.get(path.name, path)
    return folder if (folder / "config.yaml").is_file() and (folder / "log.txt").is_file() else None


def model_card(weights: Weights | AutoencoderWeights, run: Path | None, kind: str) -> str:
    """Return the text of README.md; recipe and figures are those of `run`, where there is one."""
    config = _read(run / "config.yaml", yaml.safe_load) if run else {}
    config = config or (weights.settings if isinstance(weights, AutoencoderWeights) else {})
    classes = weights.classes if isinstance(weights, Weights) else ()
    library = "timm" if kind == "timm" else "transformers"
    header = {
        "library_name": library,
        "pipeline_tag": "image-classification" if classes else "image-feature-extraction",
        "tags": ["mirl", library, *(["masked-image-modeling"] if "mask_ratio" in config else [])],
    }
    auto = "AutoModelForPreTraining" if kind == "huggingface_mae" else "AutoModel"
    auto = "AutoModelForImageClassification" if classes else auto
    code = OPEN["timm" if kind == "timm" else "huggingface"].replace("AUTO", auto)
    sections = [
        "---\n" + yaml.safe_dump(header, sort_keys=False) + "---",
        f"# {_title(weights)}",
        f"```python{code}```",
        "## Input\n\n" + _input(weights),
        *(["## Classes\n\n" + "\n".join(f"{i}. `{name}`" for i, name in enumerate(classes))] if classes else []),
        "## Training\n\n" + (_training(config) or "Not known: these weights came without the folder of their run."),
        *(["## Figures\n\n" + figures] if run and (figures := _figures(run)) else []),
    ]
    return "\n\n".join(sections) + "\n"


def _title(weights: Weights | AutoencoderWeights) -> str:
    if isinstance(weights, AutoencoderWeights):
        return f"{weights.settings['model']}, pre-trained with its decoders ({weights.settings['method']})"
    classes = plural(len(weights.classes), "class", "es")
    return f"{weights.name}, {f'classifier of {classes}' if weights.classes else 'encoder'}"


def _input(weights: Weights | AutoencoderWeights) -> str:
    if isinstance(weights, AutoencoderWeights):
        size, patch, channels = (weights.settings[name] for name in ("image_size", "patch_size", "channels"))
        return f"{size[0]}x{size[1]} px, patches of {patch[0]}x{patch[1]}, {channels} channels."
    (height, width), patch = weights.image_size, weights.patch_size
    mean, deviation = ([round(float(x), 4) for x in values] for values in (weights.mean, weights.deviation))
    return (
        f"{height}x{width} px, patches of {patch[0]}x{patch[1]}, {weights.channels} channels in 0..1, "
        f"normalised by mean {mean} and deviation {deviation}."
    )


def _training(config: dict[str, Any]) -> str:
    """Return a table of the recipe. Of paths only the last part: a card is for others to read."""
    rows = {name: value for name, value in config.items() if value is not None and name not in NOT_OF_THE_RECIPE}
    rows |= {name: Path(str(rows[name])).name for name in ("data", "weights") if name in rows}
    if not rows:
        return ""
    lines = [f"| {name} | {_quoted(value)} |" for name, value in rows.items()]
    return "\n".join(["| option | value |", "| --- | --- |", *lines])


def _quoted(value: object) -> str:
    return str(value).replace("|", "\\|")


def _figures(run: Path) -> str:
    lines = []
    held_out = [row for row in read_rows(run) if row["kind"] == "held_out" and number(row.get("loss")) is not None]
    if held_out:
        first, last = held_out[0], held_out[-1]
        lines.append(
            f"Held-out loss: {first['loss']:.4g} before training, {last['loss']:.4g} after "
            f"{plural(last['step'], 'step')}."
        )
    for name, result in _read(run / "results.json", json.loads).items():
        with suppress(KeyError, TypeError, ValueError):  # what is no accuracy
            low, high = result["interval"]
            lines.append(f"Top-1 accuracy ({name}): {result['top1']:.2%} (95 % interval {low:.2%} to {high:.2%}).")
    return "\n\n".join(lines)


def _read(path: Path, parse: Any) -> dict[str, Any]:
    """Return what a file of a run says, and nothing if it is damaged: the weights can be described without."""
    try:
        return dict(parse(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
