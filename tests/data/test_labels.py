"""Classes come from folders' names; two splits share them and no image, and a folder that cannot be split says why."""

import re

import numpy as np
import pytest
from PIL import Image

from mirl.data.labels import check_known, is_one_folder, open_labelled, open_split, open_test
from mirl.data.shapes import Shapes
from mirl.errors import UserError


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Make the current folder hold `data` with so many images in each of its folders."""
    monkeypatch.chdir(tmp_path)

    def make(**counts):
        for folder, count in counts.items():
            path = tmp_path / "data" / folder.replace("__", "/")
            path.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                Image.new("L", (2, 2), index).save(path / f"{index:02}.png")
        return "data"

    return make


def named(split):
    """Return the (class, file) pairs of a split."""
    return [(split.classes[split.labels[i]], split.source.name_of(int(i))) for i in split.members]


def mistake(*arguments, **options):
    with pytest.raises(UserError) as caught:
        open_split(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "val"), ("train", "valid"), ("train", "validation"), ("train", "test"), ("training", "validation")],
)
def test_two_folders_are_two_splits_of_the_same_classes(images, train, test):
    data = images(**{f"{train}__dog": 2, f"{train}__cat": 3, f"{test}__cat": 1, f"{test}__dog": 2})
    assert not is_one_folder(data)
    one, other = open_split(data)
    assert one.classes == other.classes == ("cat", "dog")
    assert named(one) == [("cat", f"data/{train}/cat/0{i}.png") for i in range(3)] + [
        ("dog", f"data/{train}/dog/0{i}.png") for i in range(2)
    ]
    assert named(other) == [("cat", f"data/{test}/cat/00.png")] + [
        ("dog", f"data/{test}/dog/0{i}.png") for i in range(2)
    ]
    assert (len(one), len(other)) == (5, 3) and one.labels.dtype == np.int64


def test_val_comes_before_test(images):
    data = images(train__a=2, train__b=2, val__a=1, val__b=1, test__a=2, test__b=2)
    assert {name.split("/")[1] for _, name in named(open_split(data)[1])} == {"val"}


def test_images_may_lie_deeper_than_their_class(images):
    split = open_labelled(images(**{"a__x__y": 2, "a-b": 1, "a": 1}))
    assert split.classes == ("a", "a-b")
    assert sorted(label for label, _ in named(split)) == ["a", "a", "a", "a-b"]
    assert all(name.startswith(f"data/{label}/") for label, name in named(split))


@pytest.mark.parametrize(("fraction", "expected"), [(0.3, [3, 2, 1]), (0.01, [1, 1, 1]), (0.99, [9, 4, 1])])
def test_a_fraction_of_each_class_is_kept_for_testing(images, fraction, expected):
    train, test = open_split(images(a=10, b=5, c=2), val_fraction=fraction)
    assert [int((test.labels[test.members] == label).sum()) for label in range(3)] == expected
    assert sorted([*train.members, *test.members]) == list(range(17))
    assert train.classes == test.classes == ("a", "b", "c")
    assert all(name.startswith(f"data/{label}/") for split in (train, test) for label, name in named(split))


def test_the_division_depends_on_the_seed_alone(images):
    data = images(a=20, b=20)
    first, again, other = (open_split(data, val_fraction=0.5, seed=seed)[1].members for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first[:10].tolist() == [1, 3, 6, 8, 10, 12, 13, 15, 16, 18]  # for good: older runs trained on the others


def test_shapes_have_their_classes():
    train, test = open_split("shapes:80:32")
    assert train.classes == test.classes == Shapes.classes
    assert [int(label) for label in test.labels] == [test.source.sample(i).label for i in range(20)]


def test_a_classifier_is_judged_on_the_test_split_or_on_all_there_is(images):
    data = images(train__a=3, train__b=3, test__a=1, test__b=1)
    assert named(open_test(data)) == [("a", "data/test/a/00.png"), ("b", "data/test/b/00.png")]
    assert len(open_test(f"{data}/train")) == 6
    with pytest.raises(UserError, match="'nowhere' does not exist"):
        open_test("nowhere")


@pytest.mark.parametrize(
    ("folders", "options", "message"),
    [
        ({"train__a": 1, "train__b": 1, "val__a": 1}, {}, "class 'b' has no folder in data/val; both splits need"),
        ({"train__a": 1, "test__a": 1, "test__b": 1, "test__c": 1}, {}, "class 'b' and 1 more has no folder in"),
        ({"train__a": 1, "train__b": 1, "train__c": 0, "val__a": 1, "val__b": 1}, {},
         "class folder 'c' in 'data/train' has no images; remove it or fill it"),
        ({"a": 2, "b": 2, "c": 0}, {"val_fraction": 0.5}, "class folder 'c' in 'data' has no images"),
        ({"a": 2, "b": 2, ".": 1}, {"val_fraction": 0.5}, "images outside class folders, e.g. 00.png; put each into"),
        ({"train__a": 1, "val__a": 1, "val": 1}, {}, "'data/val' has images outside class folders"),
        ({"a": 2, "b": 2}, {}, "'data' has no train/ with val/ or test/; make them, or split .* --val_fraction 0.2"),
        ({"val__a": 2, "test__b": 2}, {}, "'data' has no train/ with val/ or test/"),
        ({"train__a": 1, "val__a": 1}, {"val_fraction": 0.5}, "has train/ and val/ already; leave out --val_fraction"),
        ({"a": 2, "b": 1}, {"val_fraction": 0.5}, "class 'b' has 1 image; a split needs two or more"),
        ({"train__a": 3, "train__b": 3}, {"val_fraction": 0.5}, "a single class, 'train'; give a folder of two"),
        ({"train__a": 3, "val__a": 3}, {}, "'data' has a single class, 'a'"),
        ({"a": 0}, {"val_fraction": 0.5}, "'data' has no images"),
    ],
    ids=str,
)  # fmt: skip
def test_a_folder_that_cannot_be_split_says_why(images, folders, options, message):
    assert re.search(message, mistake(images(**folders), **options))


def test_what_is_not_a_folder_has_no_classes(images):
    images(a=1)
    assert "'nowhere' does not exist" in mistake("nowhere")
    assert "'data/*/*.png' has no classes; give a folder of class folders, or shapes" in mistake("data/*/*.png")
    with open("list.txt", "w") as file:
        file.write("data/a/00.png\n")
    assert "'list.txt' has no classes" in mistake("list.txt", val_fraction=0.5)
    with pytest.raises(UserError, match="'list.txt' has no classes"):
        open_labelled("list.txt")


def test_classes_that_a_model_does_not_know_are_named():
    check_known("data", ["b"], ["a", "b"])
    with pytest.raises(UserError, match=re.escape("'data' has classes that the model does not know, e.g. 'd'; it")):
        check_known("data", ["b", "d"], ["a", "b", "c"])
