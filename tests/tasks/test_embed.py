"""Row i of the features is the image in row i of the table, whatever the batches; a failure leaves nothing behind."""

import csv
import math
import shutil
import tracemalloc

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from tiny_runs import assert_one_line

import mirl
from mirl.cli import main
from mirl.data.sources import open_source
from mirl.data.transforms import fixed_view
from mirl.errors import UserError
from mirl.tasks.embed import _growing_array
from mirl.tasks.features import FrozenEncoder
from mirl.tasks.weights import open_weights

COUNT = 12
BAD = ("a/04.png", "deep/er/09.png")


@pytest.fixture
def photos(tmp_path):
    """Twelve readable images of several sizes in nested folders, and two files that are none."""
    for index in range(COUNT):
        path = tmp_path / "photos" / ("a", "b b", "deep/er")[index % 3] / f"{index:02},é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (20 + index, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    for name, content in zip(BAD, (b"", b"no image"), strict=True):
        (tmp_path / "photos" / name).write_bytes(content)
    return tmp_path / "photos"


@pytest.fixture
def embed(finished, photos, tmp_path):
    """Embed the photos; return the features and the paths."""

    def run(name="out", **options):
        given = {"weights": str(finished), "data": str(photos), "out": str(tmp_path / name), "workers": 0} | options
        array = mirl.embed(**given)
        assert array == tmp_path / f"{name}.npy"
        return np.load(array), [row["path"] for row in table(tmp_path / f"{name}.csv")]

    return run


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def readable(photos):
    return sorted(str(path) for path in photos.rglob("*,é.png"))


@pytest.mark.parametrize("pool", ["mean", "cls", "patch"])
def test_each_row_is_the_image_that_the_table_names(embed, finished, photos, pool):
    features, paths = embed(pool=pool, batch_size=5)
    assert paths == readable(photos)
    assert features.dtype == np.float32 and features.shape == (COUNT, *([16] if pool == "patch" else []), 192)
    encoder, source = FrozenEncoder(open_weights(str(finished)), pool=pool), open_source(photos)
    names = [source.name_of(index) for index in range(len(source))]
    images = torch.stack([fixed_view(source.read(names.index(path)), (32, 32)) for path in paths])
    np.testing.assert_allclose(features, encoder(images)[:, 0], atol=1e-5)
    assert np.abs(features[1:] - features[:-1]).max(axis=tuple(range(1, features.ndim))).min() > 0.01


def test_files_that_cannot_be_read_are_listed(embed, photos, tmp_path, capfd):
    embed()
    assert [row["row"] for row in table(tmp_path / "out.csv")] == [str(i) for i in range(COUNT)]
    assert [tuple(row.values()) for row in table(tmp_path / "out_bad.csv")] == [
        (str(photos / BAD[0]), "is empty (0 bytes)"), (str(photos / BAD[1]), "is not an image"),
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.csv", "out.npy", "out_bad.csv"]
    said = capfd.readouterr().out
    assert f"saved {tmp_path}/out.npy (12 x 192) and {tmp_path}/out.csv" in said and "left out 2 files, listed" in said
    for name in BAD:
        (photos / name).unlink()
    embed()
    assert not (tmp_path / "out_bad.csv").exists()


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 1}, {"batch_size": 7}, {"workers": 1}, {"workers": 2, "batch_size": 2}], ids=str
)
def test_batches_and_workers_do_not_change_features(embed, options):
    expected, paths = embed("one")
    features, names = embed("another", **options)
    np.testing.assert_allclose(features, expected, atol=1e-6 if options else 0, rtol=0)
    assert names == paths


def test_other_options_are_other_features(embed):
    features, _ = embed()
    for options in ({"untrained": True}, {"block": 2}, {"image_size": 48}, {"precision": "bf16"}):
        other, _ = embed(**options)
        assert other.shape == features.shape and np.abs(other - features).max() > 1e-4, options


def test_a_parquet_table_is_the_csv_table(embed, photos, tmp_path):
    embed()
    mirl.embed(weights="pixels", data=photos, out=tmp_path / "other.npy", table="parquet", workers=0, batch_size=5)
    read = pyarrow.parquet.read_table(tmp_path / "other.parquet").to_pylist()
    assert read == [{"row": int(row["row"]), "path": row["path"]} for row in table(tmp_path / "out.csv")]
    pixels = np.load(tmp_path / "other.npy")
    assert pixels.shape == (COUNT, 3 * 32 * 32) and 0 <= pixels.min() < 0.1 and 0.9 < pixels.max() <= 1
    assert sorted(path.name for path in tmp_path.glob("other*")) == ["other.npy", "other.parquet", "other_bad.csv"]


@pytest.mark.parametrize("rows", [0, 1, 9, 10, 99, 100, 12_345])
@pytest.mark.parametrize("shape", [(1,), (3, 2), (1, 1, 1)], ids=str)
def test_the_header_fits_any_number_of_rows(tmp_path, rows, shape):
    values = np.arange(rows * math.prod(shape), dtype=np.float32).reshape(rows, *shape)
    with _growing_array(tmp_path / "x.npy", shape) as file:
        for part in np.array_split(values, 3):
            file.write(part.tobytes())
        assert not (tmp_path / "x.npy").exists()
    for mode in (None, "r") if rows else (None,):  # no system maps an empty file
        read = np.load(tmp_path / "x.npy", mmap_mode=mode)
        assert read.dtype == np.float32 and read.shape == (rows, *shape) and np.array_equal(read, values)
    assert (tmp_path / "x.npy").stat().st_size == 128 + values.nbytes


def test_features_are_mapped_as_they_are_written(embed, tmp_path):
    features, _ = embed()
    mapped = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, features)
    assert (tmp_path / "out.npy").stat().st_size == 128 + 4 * COUNT * 192


def test_features_go_to_the_disk_at_once(tmp_path):
    part = np.ones((256, 1024), np.float32).tobytes()  # 1 MiB
    tracemalloc.start()
    with _growing_array(tmp_path / "x.npy", (1024,)) as file:
        for written in range(1, 33):
            file.write(part)
            assert (tmp_path / "x.npy.tmp").stat().st_size > (written - 1) * len(part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(part)
    assert np.load(tmp_path / "x.npy", mmap_mode="r").shape == (32 * 256, 1024)


def test_memory_holds_a_batch_of_features(tmp_path):
    options = {"weights": "pixels", "out": tmp_path / "x", "workers": 0, "batch_size": 16}
    mirl.embed(**options, data="shapes:32:16")
    tracemalloc.start()
    mirl.embed(**options, data="shapes:500:16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (tmp_path / "x.npy").stat().st_size / 4


def test_by_default_features_lie_in_the_run_or_here(finished, photos, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mirl.embed(weights="~/run", data=photos, workers=0) == run / "features.npy"
    assert (run / "features.csv").exists() and (run / "features_bad.csv").exists()
    assert main(["embed", "--weights", "run/encoder", "--data", "shapes:7:32", "--pool", "patch", "--workers=0"]) == 0
    assert np.load("features.npy").shape == (7, 16, 192)
    assert table("features.csv")[6] == {"row": "6", "path": "shapes/train/000006"}
    assert not capfd.readouterr().err


def test_folders_are_made_and_old_files_replaced(embed, tmp_path):
    expected, _ = embed("new/folder/out")
    (tmp_path / "new/folder/out.npy").write_bytes(b"old")
    assert np.array_equal(embed("new/folder/out")[0], expected)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_bad_files_alone_are_one_line_and_leave_nothing(tmp_path, kind):
    (tmp_path / "photos").mkdir()
    for name in ("1.jpg", "2.png"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of 2 images can be read, e.g. .*/1.jpg is not an image; check the data"):
        mirl.embed(weights="pixels", data=tmp_path / "photos", out=tmp_path / "out", table=kind, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("option", ["weights", "data"])
def test_a_mistake_leaves_earlier_features_alone(embed, tmp_path, option):
    features, _ = embed()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="nowhere"):
        embed(**{option: "nowhere"})
    assert sorted(tmp_path.iterdir()) == before and np.array_equal(np.load(tmp_path / "out.npy"), features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--weights is missing"),
        (["--weights=pixels", "--data=nowhere"], "'nowhere' does not exist"),
        (["--weights=pixels", "--data=shapes:3", "--out=file/x"], "cannot write file/x.npy: .*; choose another --out"),
        (["--weights=pixels", "--data=shapes:3", "--table=xls"], "--table xls is not allowed; give csv or parquet"),
        (["--weights=pixels", "--data=shapes:3", "--pool=max"], "--pool max is not allowed; give mean or cls or patch"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert_one_line(main(["embed", *arguments]), capfd.readouterr().err, message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
