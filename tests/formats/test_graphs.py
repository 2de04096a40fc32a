"""ONNX and torch.export: any batch size, the weights as they were, and what they are kept beside them."""

import io
import json
import os
import zipfile

import onnx
import pytest
import timm
import torch
from torch import nn

from mirl.errors import UserError
from mirl.formats import graphs
from mirl.models.encoder import ARCHITECTURE, timm_arguments

ABOUT = {"architecture": ARCHITECTURE, "arguments": {"depth": 2}, "mean": [0.5], "classes": ["é", "b"]}
KINDS = {
    "onnx": (lambda model, path, images: graphs.write_onnx(model, path, images, ["features"], ABOUT),
             graphs.run_onnx, graphs.read_onnx),
    "pt2": (lambda model, path, images: graphs.write_exported(model, path, images, ABOUT),
            graphs.run_exported, graphs.read_exported),
}  # fmt: skip


def images(batch):
    return torch.randn(batch, 1, 16, 24, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, **timm_arguments(24, 2, 2, (16, 24), (8, 4), 1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """The model as a file of each kind, with what writing it said."""
    folder = tmp_path_factory.mktemp("graphs")
    return {
        kind: (folder / f"model.{kind}", KINDS[kind][0](model, folder / f"model.{kind}", images(2))) for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_size_gives_the_models_outputs(kind, model, written):
    run = KINDS[kind][1](written[kind][0])
    for batch in (1, 2, 5):
        with torch.no_grad():
            expected = model(images(batch))
        assert expected.shape == (batch, 24) and expected.std() > 0.1
        torch.testing.assert_close(run(images(batch)).detach(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_names_tensors_and_what_they_are_come_back_as_they_were(kind, model, written):
    about, tensors = KINDS[kind][2](written[kind][0])
    assert about == ABOUT
    expected = model.state_dict()
    assert expected.keys() == tensors.keys()
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value), name


def test_onnx_states_its_opset_and_names_its_sides(written):
    path, said = written["onnx"]
    content = onnx.load(str(path))
    onnx.checker.check_model(content)
    assert said == f"opset {graphs.OPSET}"
    assert [(opset.domain, opset.version) for opset in content.opset_import if not opset.domain] == [("", graphs.OPSET)]
    assert [side.name for side in content.graph.input] == ["images"]
    assert [side.name for side in content.graph.output] == ["features"]
    batch, *rest = content.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch" and [side.dim_value for side in rest] == [1, 16, 24]


def test_large_tensors_lie_beside_the_onnx_file(model, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "LARGEST", 1000)
    path = tmp_path / "large.onnx"
    graphs.write_onnx(model, path, images(2), ["features"], ABOUT)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    about, tensors = graphs.read_onnx(path)
    assert about == ABOUT
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(graphs.run_onnx(path)(images(3)), model(images(3)).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("largest", "files"), [(1e9, ["a.onnx"]), (1000, ["a.onnx", "a.onnx.data"])])
def test_onnx_is_saved_whole_in_a_new_folder(model, tmp_path, monkeypatch, largest, files):
    monkeypatch.setattr(graphs, "LARGEST", largest)
    path = tmp_path / "new" / "folder" / "a.onnx"
    assert graphs.save_onnx(model, path, images(2), ["features"], ABOUT) == f"opset {graphs.OPSET}"
    assert sorted(file.name for file in path.parent.iterdir()) == files
    torch.testing.assert_close(graphs.run_onnx(path)(images(3)), model(images(3)).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("a.bin", "a.bin does not end in .onnx; give the name of a file that ends in .onnx"),
        ("", "is a folder; give the name of a file"),
        ("folder.onnx", "folder.onnx is a folder; "),
        ("file/a.onnx", "cannot write .*file/a.onnx: .*; give a place that can be written"),
    ],
)
def test_a_place_where_onnx_cannot_be_saved_is_one_line(tmp_path, place, message):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=message) as caught:
        graphs.save_onnx(nn.Identity(), tmp_path / place, images(2), ["features"], ABOUT)
    assert "\n" not in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.onnx"]


def test_onnx_that_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch):
    def full(_, path, *rest):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graphs, "write_onnx", full)
    path = tmp_path / "a.onnx"
    path.write_text("dear")
    with pytest.raises(UserError, match=f"cannot write {path}: No space left on device; give a place"):
        graphs.save_onnx(nn.Identity(), path, images(2), ["features"], ABOUT)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "dear"


def test_a_foreign_onnx_is_refused(written, tmp_path):
    content = onnx.load(str(written["onnx"][0]))
    del content.metadata_props[:]
    onnx.save(content, str(tmp_path / "foreign.onnx"))
    with pytest.raises(UserError, match="does not say what model it is"):
        graphs.read_onnx(tmp_path / "foreign.onnx")


def test_a_foreign_export_is_refused(tmp_path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), str(tmp_path / "foreign.pt2"))
    with pytest.raises(UserError, match="does not say what model it is"):
        graphs.read_exported(tmp_path / "foreign.pt2")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def pickled():
    buffer = io.BytesIO()
    torch.save(Malicious(), buffer)
    return buffer.getvalue()


def rewritten(source, destination, change):
    """Copy an archive; `change` gets each member's name and content and returns the new content."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(destination, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_a_pickle_among_the_weights_is_refused_and_runs_nothing(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def change(name, content):
        if name.endswith("model_weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        return pickled() if "/weight_" in name else content

    rewritten(written["pt2"][0], "bad.pt2", change)
    with pytest.raises(UserError, match="cannot be read by torch.export"):
        graphs.read_exported(tmp_path / "bad.pt2")
    assert not (tmp_path / "owned").exists()


def test_pickles_and_code_beside_the_weights_are_not_run(model, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewritten(
        written["pt2"][0], "bad.pt2",
        lambda name, content: pickled() if name.endswith((".pt", "models/model.json")) else content,
    )  # fmt: skip
    _, tensors = graphs.read_exported(tmp_path / "bad.pt2")
    assert not (tmp_path / "owned").exists()
    assert torch.equal(tensors["cls_token"], model.state_dict()["cls_token"])


def test_a_weight_larger_than_its_bytes_is_refused(written, tmp_path):
    def change(name, content):
        if not name.endswith("model_weights_config.json"):
            return content
        weights = json.loads(content)
        meta = weights["config"]["cls_token"]["tensor_meta"]
        meta["sizes"], meta["strides"] = [{"as_int": 10**6}] * 3, [{"as_int": 0}] * 3
        return json.dumps(weights)

    rewritten(written["pt2"][0], tmp_path / "bomb.pt2", change)
    with pytest.raises(UserError, match="cannot be read by torch.export"):
        graphs.read_exported(tmp_path / "bomb.pt2")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_what_is_no_graph_is_refused_in_a_line(kind, share, written, tmp_path):
    content = written[kind][0].read_bytes()
    path = tmp_path / f"part.{kind}"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="write it again|does not say what model it is") as caught:
        KINDS[kind][2](path)
    assert "\n" not in str(caught.value)
