"""Lists of classes and label files: values of any form turned into classes, and faults named in a line."""

import struct
import zlib

import numpy as np
import pytest
from label_folders import HEIGHT, NAMES, WIDTH, bad, label, pair, refused, save, single, write
from PIL import ExifTags, Image

from mirl.data.decode import BadImage
from mirl.data.semantic import (
    IGNORE,
    SemanticClass,
    open_semantic_test,
)
from mirl.errors import UserError


@pytest.mark.parametrize(
    "classes, expected",
    [
        (["a", "b", "c"], [(0, "a"), (1, "b"), (2, "c")]),
        ({"c": 2, "a": 0, "b": 1}, [(0, "a"), (1, "b"), (2, "c")]),
        ({"a": 0, "c": 2, "void_index": [1]}, [(0, "a"), (2, "c")]),
        ({"classes": ["a", "b", "c"], "ignore_index": 1}, [(0, "a"), (2, "c")]),
        ({"classes": [{"index": 2, "name": "c"}, {"index": 0, "name": "a", "color": [1, 2, 3]}], "void_index": 1},
         [(0, "a"), (2, "c")]),
        ({"a": 0, "b": 1, "c": 2, "d": 255}, [(0, "a"), (1, "b"), (2, "c"), (255, "d")]),
        ({"semantic": {"classes": [{"index": k, "name": n} for k, n in enumerate("abc")], "ignore_index": 255}},
         [(0, "a"), (1, "b"), (2, "c")]),
    ],
)  # fmt: skip
def test_classes_have_several_forms(tmp_path, classes, expected):
    split = single(tmp_path, label(255), classes)
    assert [(one.value, one.name) for one in split.source.classes] == expected
    indices = {value: index for index, (value, _) in enumerate(expected)}
    labels = [indices.get(int(value), IGNORE) for value in label(255).flatten()]
    assert split.source.read_semantic(0)[1].flatten().tolist() == labels


@pytest.mark.parametrize(
    "classes, said",
    [
        ('{"classes": [', "is not valid JSON"),
        ("{}", "has no classes beside void; write it as"),
        ("3", "has no classes"),
        ({"classes": ["void"], "void_index": 0}, "has no classes"),
        (["road", "road"], "has the name 'road' twice"),
        ({"road": 0, "car": 0}, "has the value 0 twice"),
        ({"road": 256}, "class 'road' of .* has the value 256; give a whole number from 0 to 255"),
        ({"road": -1}, "has the value -1"),
        ({"road": True}, "has the value True"),
        ({"classes": [{"name": "road"}]}, "has the value None"),
        ({"classes": [{"index": 4}]}, "without a name .its value is 4"),
        ({"classes": ["road"], "void_index": "none"}, "has void_index 'none'"),
        ([f"class {k}" for k in range(256)], "has 256 classes; 255 are the most"),
    ],
)
def test_classes_that_make_no_sense_are_refused(tmp_path, classes, said):
    pair(tmp_path)
    write(tmp_path, classes)
    with pytest.raises(UserError, match=said) as caught:
        open_semantic_test(str(tmp_path))
    assert "\n" not in str(caught.value) and "classes.json" in str(caught.value)


def test_a_missing_list_of_classes_can_be_pasted(tmp_path):
    pair(tmp_path, values=label(255))
    message = refused(tmp_path, val_fraction=0.5)
    assert "has no classes.json; the first labels hold 0 to 2, 255;" in message
    write(tmp_path, message[message.index("{") :])
    assert open_semantic_test(str(tmp_path)).source.classes[2] == SemanticClass(2, "class 2")
    (tmp_path / "classes.json").unlink()
    save(tmp_path / "labels" / "a.png", 255 * (label(255) == 255).astype(np.uint8))
    assert '{"class 0": 0, "class 255": 255}' in refused(tmp_path, val_fraction=0.5)
    save(tmp_path / "labels" / "a.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    assert "is an RGB label" in refused(tmp_path, val_fraction=0.5)


def labels_as(mode):
    grey = Image.fromarray(label())
    if mode == "P":
        palette = Image.fromarray(label()).convert("P")
        palette.putdata(label().flatten().tolist())
        palette.putpalette([255, 0, 0, 0, 255, 0, 9, 9, 9])
        return palette
    return Image.fromarray(label().astype(np.uint16)) if mode == "I;16" else grey.convert(mode)


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_label_files_have_several_modes(tmp_path, mode):
    split = single(tmp_path, labels_as(mode))
    assert split.source.read_semantic(0)[1].tolist() == label().tolist()


def test_palettes_of_few_bits_and_bilevel_labels_keep_their_values(tmp_path):
    bilevel = Image.fromarray(label() == 1)
    assert bilevel.mode == "1"
    split = single(tmp_path, bilevel)
    assert split.source.read_semantic(0)[1].tolist() == (label() == 1).astype(int).tolist()
    save(tmp_path / "labels" / "a.png", labels_as("P"), bits=2)
    assert split.source.read_semantic(0)[1].tolist() == label().tolist()


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_is_not_stretched(tmp_path, bits):
    """Pillow reads such files, and writes none."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    split = single(tmp_path, None)
    rows = np.zeros((HEIGHT, -(-WIDTH * bits // 8) * 8 // bits), int)
    rows[:, :WIDTH] = label()
    each = 8 // bits
    packed = sum(rows[:, k::each] << (8 - bits * (k + 1)) for k in range(each)).astype(np.uint8)
    data = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    (tmp_path / "labels" / "a.png").write_bytes(png)
    assert split.source.read_semantic(0)[1].tolist() == label().tolist()


@pytest.mark.parametrize(
    "values, said",
    [
        (np.zeros((HEIGHT, WIDTH, 3), np.uint8), "is an RGB label; give palette or greyscale values"),
        (np.zeros((HEIGHT, WIDTH, 4), np.uint8), "is an RGBA label"),
        (label(9), "holds 9, which is neither void nor one of the 3 classes, 0 to 2"),
        (label().astype(np.uint16) * 200, "has values up to 400"),
        (np.zeros((HEIGHT, WIDTH + 1), np.uint8), "is 3x5 px, but its label .*a.png. is 3x6 px"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path, values, said):
    split = single(tmp_path, values)
    with pytest.raises(BadImage, match=said):
        split.source.read_semantic(0)
    assert "a.png" in bad(split)


@pytest.mark.parametrize("content, said", [(b"", "is empty (0 bytes)"), (b"text", "is not an image")])
def test_broken_labels_are_named(tmp_path, content, said):
    split = single(tmp_path, None)
    (tmp_path / "labels" / "a.png").write_bytes(content)
    assert bad(split) == f"has a label that cannot be used: {str(tmp_path / 'labels' / 'a.png')!r} {said}"
    (tmp_path / "labels" / "a.png").unlink()
    (tmp_path / "labels" / "a.png").mkdir()
    assert "is not a regular file" in bad(split)


@pytest.mark.parametrize("upright", [True, False])
def test_images_are_turned_as_their_labels_are(tmp_path, upright):
    stored = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    stored[0, 0] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned to the right
    save(tmp_path / "images" / "a.png", stored, exif=exif)
    save(tmp_path / "labels" / "a.png", label().T if upright else label())
    write(tmp_path, NAMES)
    image, labels = open_semantic_test(str(tmp_path)).source.read_semantic(0)
    assert image.shape[1:] == labels.shape == ((WIDTH, HEIGHT) if upright else (HEIGHT, WIDTH))
    assert (image[0] == 255).nonzero().tolist() == [[0, HEIGHT - 1] if upright else [0, 0]]


def test_arrays_of_five_channels_have_labels(tmp_path):
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", np.ones((HEIGHT, WIDTH, 5), np.uint8))
    save(tmp_path / "labels" / "a.png", label())
    write(tmp_path, NAMES)
    split = open_semantic_test(str(tmp_path), channels=5)
    assert split.source.read(0).shape == (5, HEIGHT, WIDTH)
    np.save(tmp_path / "images" / "a.npy", np.ones((WIDTH, HEIGHT, 5), np.uint8))
    assert "is 5x3 px, but its label" in bad(split)
