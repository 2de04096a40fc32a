"""Run folders written by hand: everything that a run records, in any number, in no time."""

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

TITLES = ["original", "masked", *(f"pair {pair}: {part}" for pair in (1, 2) for part in ("main", "residual", "sum"))]
CONFIG = {"data": "photos", "model": "vit_ti_12", "method": "mirl", "epochs": 4, "batch_size": 16, "segments": None}


def write_run(
    folder,
    *,
    steps=40,
    evaluations=3,
    blocks=6,
    side=32,
    images=3,
    titles=TITLES,
    finished=True,
    seed=0,
    alike=False,
    **options,
):
    """Write a pre-training run of 4 epochs, its pictures noise, at all moments `alike` or not; return its folder."""
    random = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"out": str(folder)} | options))
    (folder / "log.txt").write_text("2026-01-02 03:04:05 data      photos: 100 images\n")
    if finished:
        (folder / "encoder").mkdir()
    rows = []
    for step in range(1, steps + 1):
        place = {"step": step, "epoch": 4 * step / steps}
        loss = 1 / step + 0.5 + 0.02 * random.standard_normal()
        pairs = {"pair_1": loss, "pair_2": loss + 0.1} if len(titles) > 5 else {}
        rows.append({
            "kind": "train", **place, "loss": loss, **pairs, "lr": 1e-3 * (1 - step / steps), "grad_norm": 2 / step,
            "seconds": 2.0, "data_wait": 0.2, "images_per_second": 8 + random.random(),
        })  # fmt: skip
        if step % 10 == 1:
            norms = (np.linspace(1, 0.1, blocks) / step).tolist()
            rows.append({"kind": "gradients", **place, "encoder": 3 / step, "blocks": norms})
    for step in np.linspace(0, steps, evaluations).astype(int).tolist():
        place = {"step": step, "epoch": 4 * step / steps}
        rows.append({"kind": "held_out", **place, "loss": 2 / (step + 1), **dict.fromkeys(pairs, 2 / (step + 1))})
        rows.append({"kind": "blocks", **place, "rank": (10 + random.random(blocks)).tolist(),
                     "similarity": random.random(blocks).tolist(), "linear": (40 + random.random(blocks)).tolist(),
                     "knn": (30 + random.random(blocks)).tolist()})  # fmt: skip
        name = f"pictures/panels/step_{step:08d}.webp"
        if alike and step:
            (folder / name).hardlink_to(folder / "pictures/panels/step_00000000.webp")
        else:
            write_atlas(folder / name, random, images, len(titles), side)
        rows.append({"kind": "pictures", **place, "file": name, "panels": titles, "images": images, "height": side,
                     "width": side})  # fmt: skip
    write_rows(folder, rows)
    return folder


def write_rows(folder, rows):
    """Append rows to metrics.jsonl."""
    with open(Path(folder) / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_atlas(path, random, images, panels, side):
    """Write cells of noise: the hardest to compress, and no two alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.integers(0, 256, (images * side, panels * side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="WEBP", quality=85)


def write_results(folder, *, data="labelled", top1=0.5, blocks=6):
    """Write what probe, knn, evaluate and finetune leave."""
    accuracy = {"top1": top1, "top5": None, "interval": [top1 - 0.1, top1 + 0.1], "images": 100,
                "per_class": {"cat": 0.25, "dog": 0.75}}  # fmt: skip
    by_block = {str(block): {"linear": accuracy | {"top1": block / 10}} for block in range(1, blocks + 1)}
    documents = {
        "readouts/probe_every_block.json": {"command": "probe", "options": {"data": data}, "blocks": by_block},
        "readouts/knn.json": {"command": "knn", "options": {"data": data}, "blocks": {"6": {"k=10": accuracy}}},
        "evaluations/other/results.json": {"data": data, "accuracy": accuracy, "calibration_error": 0.03,
                                           "confidence": 0.53},
        "results.json": {"data": data, "classes": 2, "weights": accuracy},
    }  # fmt: skip
    for name, document in documents.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))


def write_detector(folder, *, steps=20, evaluations=3, scale=1.0, finished=True, picture=(240, 720), **options):
    """Write a run of mirl detect of 4 epochs, its losses times `scale`, with the picture of its last evaluation."""
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True)
    config = {"weights": "runs/a", "data": "coco", "protocol": "coco_1x", "epochs": 4, "batch_size": 16}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"out": str(folder)} | options))
    rows = []
    for step in range(1, steps + 1):
        parts = {"rpn_class": 0.6, "rpn_box": 0.01, "box_class": 1.0, "box": 0.9, "mask": 3.0}
        parts = {name: scale * value / step for name, value in parts.items()}
        rows.append({
            "kind": "train", "step": step, "epoch": 4 * step / steps, "loss": sum(parts.values()), **parts, "lr": 1e-4,
            "grad_norm": 2 / step, "seconds": 2.0, "data_wait": 0.2, "images_per_second": 8.0,
        })  # fmt: skip
        rows.append({"kind": "gradients", "step": step, "epoch": 4 * step / steps, "encoder": 3.0, "blocks": [2, 1, 1]})
    judged = np.linspace(0, steps, evaluations).astype(int).tolist()
    rows += [{"kind": "held_out", "step": k, "epoch": 4 * k / steps, **_precisions(k / steps)} for k in judged]
    write_rows(folder, rows)
    pixels = np.random.default_rng(0).integers(0, 256, (picture[1] // 4, picture[0] // 4, 3), dtype=np.uint8)
    sheet = Image.fromarray(pixels).resize(picture)  # as hard to compress as a busy photo
    sheet.save(folder / "pictures" / f"step_{steps:08d}.png", compress_level=1)
    if finished:
        write_precisions(folder / "results.json", "coco")
        (folder / "detector.safetensors").touch()
        (folder / "log.txt").write_text(f"""2026-01-02 03:04:05 data      coco
done: {folder} · results.json has the AP of each class

    mirl detect {folder} --predict IMAGES
    mirl evaluate --weights {folder} --data OTHER_ANNOTATIONS

    detector, categories = mirl.load_detector("{folder}")

2026-01-02 03:04:06 open {folder}/report.html to see the run
""")
    return folder


def write_precisions(path, data, *, classes=None):
    """Write average precisions, and beside them what they are of, as training and mirl evaluate leave them."""
    classes = classes or [("cat", 0.5, 0.4), ("<b>dog", 0.25, None), ("unseen", None, None)]
    per_class = [{"category": place, "name": name, "objects": 7, "box_ap": box, "mask_ap": mask}
                 for place, (name, box, mask) in enumerate(classes, start=1)]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"data": data, **_precisions(1.0), "images": 5000, "objects": 7, "per_class": per_class}
    path.write_text(json.dumps(document))
    (path.parent / "detections.json").write_text("[]")


def _precisions(share):
    box = {"box_ap": 0.4, "box_ap50": 0.61, "box_ap75": 0.42, "box_ap_small": 0.2, "box_ap_medium": 0.43}
    mask = {"mask_ap": 0.35, "mask_ap50": 0.58, "mask_ap75": 0.37, "mask_ap_small": 0.17, "mask_ap_medium": 0.38}
    known = {name: share * value for name, value in (box | mask).items()}
    return known | {"box_ap_large": None, "mask_ap_large": None}


def write_segmenter(folder, *, steps=20, evaluations=3, scale=1.0, finished=True, **options):
    """Write a run of mirl segment of 4 epochs, its losses times `scale`, with its pictures."""
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True)
    config = {"weights": "runs/a", "data": "streets", "crop_size": 512, "epochs": 4, "batch_size": 16}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"out": str(folder)} | options))
    rows = []
    for step in range(1, steps + 1):
        decode, auxiliary = scale * 3 / step, scale * 2 / step
        place = {"step": step, "epoch": 4 * step / steps}
        rows.append({
            "kind": "train", **place, "loss": decode + 0.4 * auxiliary, "decode": decode, "auxiliary": auxiliary,
            "accuracy": 1 - 1 / step, "lr": 1e-4, "grad_norm": 2 / step, "seconds": 2.0, "data_wait": 0.2,
            "images_per_second": 8.0,
        })  # fmt: skip
        rows.append({"kind": "gradients", **place, "encoder": 3.0, "blocks": [2, 1, 1]})
    for step in np.linspace(0, steps, evaluations).astype(int).tolist():
        shares = {"miou": 0.4, "aacc": 0.8, "macc": 0.5}
        figures = {name: value * step / steps for name, value in shares.items()}
        rows.append({"kind": "held_out", "step": step, "epoch": 4 * step / steps, **figures})
    write_rows(folder, rows)
    sheet = Image.effect_noise((240, 180), 80)
    sheet.save(folder / "pictures" / f"step_{steps:08d}.png")
    if finished:
        write_overlaps(folder / "results.json", "streets")
        sheet.save(folder / "confusion.png")
        (folder / "segmenter.safetensors").touch()
        (folder / "log.txt").write_text(f"""2026-01-02 03:04:05 data      streets
done: {folder} · results.json has the IoU of each class

    mirl segment {folder} --predict IMAGES
    mirl evaluate --weights {folder} --data OTHER_LABELS

    segmenter = mirl.load_segmenter("{folder}")

2026-01-02 03:04:06 open {folder}/report.html to see the run
""")
    return folder


def write_overlaps(path, data, **more):
    """Write IoUs as training and mirl evaluate leave them; one class is never true, one is not there."""
    classes = [("sky", 0.9, 0.95, 0.6), ("<i>pole", 0.0, None, 0.0), ("road", 0.3, 0.4, 0.4), ("boat", None, None, 0.0)]
    per_class = [{"name": name, "iou": iou, "accuracy": accuracy, "share": share}
                 for name, iou, accuracy, share in classes]  # fmt: skip
    found = {"miou": 0.4, "aacc": 0.8, "macc": 0.5, "images": 2000, "pixels": 10, "per_class": per_class}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": data, **more, **found}))
