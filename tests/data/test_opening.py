"""Whatever reads labels opens the built-in shapes, and names what is not there, alike."""

import pytest

from mirl.data.instances import open_instance_test, open_instance_training, open_instances
from mirl.data.labels import open_split, open_test
from mirl.data.opening import folder_in, shapes_in
from mirl.data.semantic import open_semantic, open_semantic_test, open_semantic_training
from mirl.data.shapes import Shapes
from mirl.errors import UserError

IN_TWO = [open_split, open_instances, open_semantic]
TO_TRAIN = [open_instance_training, open_semantic_training]
TO_JUDGE = [open_test, open_instance_test, open_semantic_test]


def shapes_of(split):
    """Return what a split says of its shapes, all of which belong to it."""
    shapes = split.source if isinstance(split.source, Shapes) else split.source.shapes
    assert split.members.tolist() == list(range(shapes.count)) and shapes.seed == 0
    return shapes.split, shapes.count, shapes.size


@pytest.mark.parametrize(
    ("data", "size", "count", "held_out"),
    [("shapes:80:48", 48, 80, 20), ("shapes:12", 64, 12, 10), ("shapes:7:32", 32, 7, 10)],  # every class at least once
)
def test_shapes_have_a_held_out_split_a_quarter_as_large(data, size, count, held_out):
    size = size, size
    for opener in IN_TWO:
        assert [shapes_of(one) for one in opener(data)] == [("train", count, size), ("val", held_out, size)]
    assert [shapes_of(opener(data)) for opener in TO_TRAIN] == [("train", count, size)] * 2
    assert [shapes_of(opener(data)) for opener in TO_JUDGE] == [("val", count, size)] * 3


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("shapes:40", {"val_fraction": 0.5}, "shapes have a held-out split already; leave out --val_fraction"),
        ("shapes:many", {}, "no valid count"),
        ("shapes:40", {"channels": 1}, "shapes are RGB"),
    ],
)
@pytest.mark.parametrize("opener", IN_TWO)
def test_shapes_that_cannot_be_are_one_line(opener, data, options, message):
    with pytest.raises(UserError, match=message) as caught:
        opener(data, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("file", "^'file' is a file; give the folder that holds images$"),
        ("nowhere", "^'nowhere' does not exist; give a folder with images, or shapes$"),
        ("shape", "^'shape' does not exist; did you mean 'shapes'?"),
    ],
)
def test_what_is_no_folder_is_named(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        folder_in(data, "images")


def test_a_folder_may_be_called_shapes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    assert shapes_in("./shapes", 3) is None and folder_in("./shapes", "images").is_dir()
