"""What is said to users is said in words that fit."""

import pytest

from mirl.errors import plural


@pytest.mark.parametrize(
    "count, noun, options, text",
    [
        (0, "image", {}, "0 images"),
        (1, "image", {}, "1 image"),
        (2, "class", {"ending": "es"}, "2 classes"),
        (1.0, "epoch", {"form": ".3g"}, "1 epoch"),
        (0.999999, "epoch", {"form": ".3g"}, "1 epoch"),
        (0.25, "epoch", {"form": ".3g"}, "0.25 epochs"),
        (1281167, "image", {"form": ","}, "1,281,167 images"),
    ],
)
def test_a_noun_agrees_with_the_number_as_it_is_written(count, noun, options, text):
    assert plural(count, noun, **options) == text
