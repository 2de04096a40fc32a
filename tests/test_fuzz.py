"""Damaged and hostile files, thousands of them: every reader returns or refuses in words, and none crashes or hangs.

Each reader runs in a process of its own with little memory, so that a crash is a finding and not the end of the tests.
More of them: `FUZZ=20000 pytest tests/test_fuzz.py` takes so many for every reader. A finding names reader, seed and
number, by which `mutated` makes the input again.
"""

import io
import json
import mmap
import os
import pickle
import random
import resource
import struct
import tarfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from mirl import cli
from mirl.data.coco_annotations import read_annotations
from mirl.data.decode import BadImage, read_image
from mirl.data.pictures import open_picture
from mirl.data.semantic_classes import read_vocabulary
from mirl.data.sources import open_source
from mirl.data.transforms import RandomCrop
from mirl.errors import UserError
from mirl.formats.paddle import read_checkpoint
from mirl.formats.shapes import Heads
from mirl.models.encoder import build_encoder
from mirl.reports.page import write_report
from mirl.tasks.export import write_encoder
from mirl.tasks.weights import open_weights
from mirl.training import checkpoints
from mirl.training.integrity import digest
from mirl.training.parts import part_name
from mirl.training.runs import RunFolder, read_config

COUNT = int(os.environ.get("FUZZ", 0))
SEED = int(os.environ.get("FUZZ_SEED", time.time_ns() % 2**32))
SLOWEST = 20  # seconds for one input
MEMORY = 2**30  # bytes that a reader may ask for, beside what the process has


def mutated(seeds, number, seed):
    """Return damaged file `number` of those made from `seeds`: cut, flipped, blown up, spliced."""
    chance = random.Random(f"{seed}/{number}")
    content = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        size = len(content)
        where = chance.randrange(size + 1)
        match chance.randrange(8):
            case 0:
                del content[where:]
            case 1:
                content[where : where + 1] = bytes([chance.randrange(256)])
            case 2 if where < size:
                content[where] ^= 1 << chance.randrange(8)
            case 3:  # a number that is as large or as small as they come
                extreme = chance.choice((0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
                form = chance.choice(("<I", ">I", "<Q", ">Q", "<H", ">H"))
                content[where : where + struct.calcsize(form)] = struct.pack(
                    form, extreme % 2 ** (8 * struct.calcsize(form))
                )
            case 4:
                del content[where : where + chance.randrange(64)]
            case 5:
                content[where:where] = content[where : where + chance.randrange(64)] * chance.choice((1, 2, 100))
            case 6:
                other = chance.choice(seeds)
                content[where:] = other[chance.randrange(len(other) + 1) :]
            case 7:  # in text: another value of another type
                words = (
                    b"null",
                    b"-1",
                    b"1e999",
                    b"NaN",
                    b"{}",
                    b"[]",
                    b'""',
                    b"!!python/name:os.system",
                    b"\x00",
                    b"\xff",
                )
                content[where : where + chance.randrange(6)] = chance.choice(words)
    return bytes(content)


def findings(read, seeds, count, folder, name, *, whole=True):
    """Let `read(path)` read `count` damaged files in a process of its own; return what went wrong, or None.

    If `whole`, it must first read the first seed, undamaged: one that refuses everything would be no reader.
    """
    path = folder / name
    progress = mmap.mmap(-1, 8)
    out, into = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.close(out)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, -1))
            warnings.simplefilter("ignore")
            if whole:
                path.write_bytes(seeds[0])
                read(path)
            for number in range(count):
                progress[:8] = struct.pack("q", number)
                path.write_bytes(mutated(seeds, number, SEED))
                try:
                    read(path)
                except (UserError, BadImage) as refusal:
                    if "\n" in str(refusal):
                        raise AssertionError(f"more than one line: {refusal}") from refusal
        except BaseException:
            os.write(into, traceback.format_exc()[-3000:].encode())
            os._exit(1)
        os._exit(0)
    os.close(into)
    last, since = -1, time.monotonic()
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        (number,) = struct.unpack("q", progress[:8])
        if number != last:
            last, since = number, time.monotonic()
        if time.monotonic() - since > SLOWEST:
            os.kill(process, 9)
            os.waitpid(process, 0)
            return f"input {last} of seed {SEED} took more than {SLOWEST} s"
        time.sleep(0.01)
    (number,) = struct.unpack("q", progress[:8])
    said = os.read(out, 4000).decode(errors="replace")
    os.close(out)
    return None if ended[1] == 0 else f"input {number} of seed {SEED}: wait status {ended[1]}\n{said}"


def images():
    """Return a small image in every common format."""
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    colour, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    kinds = {"jpg": colour, "png": colour, "webp": colour, "tif": colour, "bmp": colour, "gif": colour.convert("P")}
    encoded = {suffix: _encoded(image, suffix) for suffix, image in kinds.items()}
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    colour.save(turned, "JPEG", exif=exif, progressive=True)
    array = io.BytesIO()
    np.save(array, pixels)
    return encoded | {"jpeg": turned.getvalue(), "16.png": _encoded(grey, "png"), "npy": array.getvalue()}


def _encoded(image, suffix):
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
    return file.getvalue()


def read_as_image(path):
    for channels in (3,) if path.suffix == ".npy" else (1, 3):
        image = read_image(path, channels)
        assert image.dtype == torch.uint8 and image.shape[0] == channels and image.numel()
    RandomCrop((16, 16), 0.2, flip=True)(open_picture(path))


@pytest.mark.parametrize("suffix", images())
def test_images(suffix, tmp_path):
    assert not (found := findings(read_as_image, [images()[suffix]], COUNT or 400, tmp_path, f"x.{suffix}")), found


def read_everything(path):
    source = open_source(str(path))
    for index in range(min(len(source), 20)):
        source.name_of(index)
        try:
            source.read(index)
        except BadImage:
            continue


def test_lists(tmp_path):
    (tmp_path / "a.png").write_bytes(images()["png"])
    seeds = [b"# mine\na.png\n\nsub/b.jpg\n/etc/passwd\n", b"\xef\xbb\xbfa.png\r\na.png\r\n"]
    assert not (found := findings(read_everything, seeds, COUNT or 300, tmp_path, "x.txt")), found


def shard(**options):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, content in {"a/b.png": images()["png"], "a/b.cls": b"3", "../c.jpg": images()["jpg"]}.items():
            member = tarfile.TarInfo(name * 20 if name[0] == "a" else name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return file.getvalue()


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seeds = [shard(format=form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    assert not (found := findings(read_everything, seeds, COUNT or 300, tmp_path, "x.tar")), found


class Malicious:
    """Unpickling it leaves a file, which proves that code ran."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def checkpoint():
    file = io.BytesIO()
    torch.save({"step": 3, "model": {"w": torch.arange(600.0)}, "version": checkpoints.VERSION, "bad": {}}, file)
    return file.getvalue()


def test_checkpoints(tmp_path, monkeypatch):
    """Each damaged one is refused, or is what was saved; a pickle that calls something is never obeyed."""
    monkeypatch.chdir(tmp_path)

    def read(path):
        state = checkpoints.load_newest(tmp_path, lambda _: None)
        assert torch.equal(state["model"]["w"], torch.arange(600.0)), "damage was not noticed"

    seeds = [checkpoint(), pickle.dumps({"step": 3, "model": Malicious()})]
    assert not (found := findings(read, seeds, COUNT or 400, tmp_path, "step_00000003.pt")), found
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["manifest.json", "rest.pt", part_name(0, 1)])
def test_checkpoints_of_several_files(name, tmp_path):
    """A file that is not the manifest's is noticed, and so is a manifest that is not the files'."""
    folder = tmp_path / "step_00000003"
    folder.mkdir()
    torch.save({"step": 3, "version": checkpoints.VERSION}, folder / "rest.pt")
    torch.save({("model", "w"): torch.arange(600.0)}, folder / part_name(0, 1))
    files = {path.name: digest(path) for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "step": 3, "files": files}))

    def read(path):
        state = checkpoints.load_newest(tmp_path, lambda _: None)
        assert torch.equal(state["model"]["w"], torch.arange(600.0)), "damage was not noticed"

    assert not (found := findings(read, [(folder / name).read_bytes()], COUNT or 200, folder, name)), found


def test_an_archive_that_unpacks_to_far_more(tmp_path):
    """1.25 GiB of zeros in 1.25 MiB, more than a reader may have."""
    with zipfile.ZipFile(io.BytesIO(checkpoint())) as whole, zipfile.ZipFile(tmp_path / "x.pth", "w") as bomb:
        for entry in whole.infolist():
            if not entry.filename.endswith("data/0"):
                bomb.writestr(entry.filename, whole.read(entry))
                continue
            packed = zipfile.ZipInfo(entry.filename)
            packed.compress_type = zipfile.ZIP_DEFLATED
            with bomb.open(packed, "w", force_zip64=True) as file:
                for _ in range(20):
                    file.write(bytes(2**26))
    (tmp_path / "step_00000003.pt").hardlink_to(tmp_path / "x.pth")

    def read(_):
        with pytest.raises(UserError):
            checkpoints.load_newest(tmp_path, lambda _: None)
        with pytest.raises(UserError):
            open_weights(str(tmp_path / "x.pth"))

    assert not (found := findings(read, [b""], 1, tmp_path, "unread")), found


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.pd", "x.onnx", "config.json"])
def test_weights(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = build_encoder(8, 2, 1, (8, 8), (4, 4), 3).state_dict()
    save_file(encoder, tmp_path / "seed.safetensors")
    file = io.BytesIO()
    torch.save({"model": encoder}, file)
    paddle = pickle.dumps({"model": {"cls_token": np.zeros((1, 1, 8), np.float32)}}, 4)
    weights = open_weights(str(tmp_path / "seed.safetensors"), heads=Heads(encoder=2))
    write_encoder(build_encoder(8, 2, 1, (8, 8), (4, 4), 3), weights, tmp_path, "")
    about = (tmp_path / "config.json").read_bytes()
    seeds = {
        "x.safetensors": [(tmp_path / "seed.safetensors").read_bytes()],
        "x.pth": [file.getvalue(), pickle.dumps(Malicious())],
        "x.pd": [paddle, pickle.dumps(Malicious())],
        "x.onnx": [b"\x08\x08\x12\x07pytorch" * 9],
        "config.json": [about],
    }[name]

    def read(path):
        if name == "x.pd":
            read_checkpoint(path)
        else:
            open_weights(str(path.parent if name == "config.json" else path), heads=Heads(encoder=2))

    whole = name != "x.onnx"
    assert not (found := findings(read, seeds, COUNT or 250, tmp_path, name, whole=whole)), found
    assert not (tmp_path / "executed").exists()


def test_recipes(tmp_path, monkeypatch, capfd):
    """A damaged recipe is one line and exit code 2; nothing it names is imported or called."""
    monkeypatch.chdir(tmp_path)
    seeds = [path.read_bytes() for path in sorted(Path(__file__).parents[1].glob("recipes/pretrain/*.yaml"))[:5]]
    seeds.append(b"model: !!python/object/apply:os.mkdir [executed]\ntaps: &a [*a]\n")

    def read(path):
        # There is no run to resume, so that an undamaged one ends here as well.
        assert cli.main(["pretrain", f"--config={path}", "--resume=true", f"--out={tmp_path}/nothing"]) == 2

    assert not (found := findings(read, seeds, COUNT // 10 or 60, tmp_path, "x.yaml")), found
    assert not (tmp_path / "executed").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_configurations_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seeds = [yaml.safe_dump({"data": "shapes", "taps": [1, 2], "seed": 0}).encode(), b"a: !!python/name:os.system\n"]
    assert not (
        found := findings(lambda path: read_config(path.parent), seeds, COUNT or 400, tmp_path, "config.yaml")
    ), found


def metrics():
    rows = [
        {"kind": "data", "step": 0, "samples": 100}, {"kind": "train", "step": 1, "epoch": 0.1, "loss": 0.5, "lr": 1e-3,
         "grad_norm": 1.0, "seconds": 1.0, "data_wait": 0.1, "images_per_second": 3.0},
        {"kind": "held_out", "step": 1, "epoch": 0.1, "loss": 0.5},
        {"kind": "incident", "step": 1, "time": "2026-01-02T03:04:05+00:00", "what": "resumed",
         "text": "<script>1</script>"},
    ]  # fmt: skip
    return "".join(json.dumps(row) + "\n" for row in rows * 3).encode()


def test_metrics(tmp_path):
    (tmp_path / "config.yaml").write_text("data: shapes\nmodel: vit_ti_12\nmethod: mirl\nepochs: 4\n")
    (tmp_path / "log.txt").touch()
    run = RunFolder(tmp_path, resume=True, overwrite=False)

    def read(path):
        run.rows()
        run.last_step()

    assert not (found := findings(read, [metrics()], COUNT or 400, tmp_path, "metrics.jsonl")), found
    run.close()
    assert not (
        found := findings(
            lambda path: write_report(path.parent), [metrics()], COUNT // 20 or 20, tmp_path, "metrics.jsonl"
        )
    ), found


def test_annotations(tmp_path):
    (tmp_path / "a.png").write_bytes(images()["png"])
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": 32, "height": 24}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 12], "area": 100, "iscrowd": 0,
                         "segmentation": [[1, 2, 11, 2, 11, 14]]},
                        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 12], "area": 100, "iscrowd": 1,
                         "segmentation": {"size": [24, 32], "counts": [10, 20, 738]}}],
    }  # fmt: skip
    seeds = [json.dumps(coco).encode()]
    assert not (
        found := findings(lambda path: read_annotations(path, tmp_path, 3), seeds, COUNT or 400, tmp_path, "x.json")
    ), found


def test_classes(tmp_path):
    (tmp_path / "labels").mkdir()
    seeds = [b'{"sky": 0, "road": 1, "void": 255}', b'{"classes": ["a", "b"], "void": [255]}']
    read = lambda path: read_vocabulary(path.parent, path.parent / "labels", [])  # noqa: E731
    assert not (found := findings(read, seeds, COUNT or 400, tmp_path, "classes.json")), found
