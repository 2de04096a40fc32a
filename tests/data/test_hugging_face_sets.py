"""Hugging Face data sets are read by their own package, and their images decoded by ours."""

import io
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.data.decode import BadImage
from mirl.data.sources import open_source
from mirl.errors import UserError


def encoded(seed, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "hub" / "datasets")
    monkeypatch.setattr(found.config, "HF_HUB_OFFLINE", True)
    found.disable_progress_bars()
    return found


def error(data, **options):
    with pytest.raises(UserError) as caught:
        open_source(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_parquet_files_and_one_that_was_saved(datasets, tmp_path):
    cells = [{"bytes": encoded(i), "path": "same.png"} for i in range(4)]
    cells += [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": b"no picture", "path": None}, None]
    (tmp_path / "secret.png").write_bytes(encoded(9))
    features = datasets.Features({"label": datasets.Value("int64"), "photo": datasets.Image()})
    rows = datasets.Dataset.from_dict({"label": range(7), "photo": cells}, features=features)
    (tmp_path / "table").mkdir()
    rows.select(range(3)).to_parquet(tmp_path / "table" / "a.parquet")
    rows.select(range(3, 7)).to_parquet(tmp_path / "table" / "b.parquet")
    datasets.DatasetDict(test=rows.select([0]), train=rows.select(range(4))).save_to_disk(tmp_path / "saved")
    source = open_source("hf:table")
    assert len(source) == 7 and source.name_of(3) == "hf:table[3]"
    for index in range(4):
        expected = torch.from_numpy(np.array(Image.open(io.BytesIO(encoded(index))))).permute(2, 0, 1)
        assert torch.equal(source.read(index), expected)
    assert source.open(0).size == (8, 9)
    for index, reason in ((4, "a path, which is not followed"), (5, "is not an image"), (6, "is empty")):
        with pytest.raises(BadImage, match=reason):
            source.read(index)
    saved = open_source("hf:saved")
    assert len(saved) == 4 and torch.equal(saved.read(2), source.read(2))
    rows.select_columns(["label"]).to_parquet(tmp_path / "labels" / "a.parquet")
    assert error("hf:labels") == "hf:labels has no column of images; it has label"


def test_a_table_that_another_program_wrote(datasets, tmp_path):
    cells = [{"bytes": encoded(i), "path": "same.png"} for i in range(2)]
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, column in (("structs", cells), ("plain", [cell["bytes"] for cell in cells])):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"label": [0, 1], "picture": column}), tmp_path / name / "a.parquet")
        assert open_source(f"hf:{name}").read(1).shape == (3, 8, 9)


def test_nothing_is_asked_of_the_network_without_download(datasets, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # as it is for users
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    assert "add --download" in error("hf:no/such_set")
    assert not asked


def test_what_is_not_there_is_said_in_one_line(datasets, tmp_path):
    assert error("hf:").startswith("hf: names no data set; give hf:NAME")
    assert error("hf:nothing/").startswith("hf:nothing/ does not exist; give a folder")
    (tmp_path / "empty").mkdir()
    assert error("hf:empty").startswith("'empty' has no .parquet or .arrow files")
    assert error("hf:no/such_set").endswith("check the name, or add --download to fetch it")
