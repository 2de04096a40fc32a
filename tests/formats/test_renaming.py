"""Tensors split into parts and joined again; what does not fit is named."""

import pytest
import torch

from mirl.errors import UserError
from mirl.formats.renaming import affine, fit, join, split

NAMES = {"qkv": ("q", "kv", "kv"), "three": ("a", "b", "c"), "alone": ("renamed",)}


def tensors():
    return {"qkv": torch.randn(12, 5), "three": torch.randn(9), "alone": torch.randn(2, 3, 4)}


def test_split_takes_parts_along_the_output_axis_in_their_order():
    given = tensors()
    parts = split(dict(given), NAMES)
    assert {name: tuple(value.shape) for name, value in parts.items()} == {
        "q": (4, 5), "kv": (8, 5), "a": (3,), "b": (3,), "c": (3,), "renamed": (2, 3, 4),
    }  # fmt: skip
    assert torch.equal(parts["q"], given["qkv"][:4]) and torch.equal(parts["kv"], given["qkv"][4:])
    assert torch.equal(parts["b"], given["three"][3:6])


def test_join_inverts_split():
    given = tensors()
    joined = join(split(dict(given), NAMES), NAMES)
    assert joined.keys() == given.keys()
    assert all(torch.equal(joined[name], value) for name, value in given.items())


def test_split_turns_matrices_alone():
    given = {"qkv": torch.randn(5, 12), "three": torch.randn(9), "alone": torch.randn(2, 3, 4)}
    parts = split(dict(given), NAMES, transposed=True)
    assert torch.equal(parts["kv"], given["qkv"].T[4:]) and parts["kv"].is_contiguous()
    assert torch.equal(parts["renamed"], given["alone"]) and torch.equal(parts["a"], given["three"][:3])


def test_both_take_tensors_out_and_leave_others():
    given = tensors() | {"other": torch.zeros(1)}
    parts = split(given, NAMES)
    assert list(given) == ["other"]
    parts["more"] = torch.zeros(1)
    join(parts, NAMES)
    assert list(parts) == ["more"]


def test_parts_of_a_split_tensor_do_not_share_its_memory():
    given = tensors()
    whole = given["qkv"]
    part = split(given, NAMES)["q"]
    assert part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize("function", [split, join])
def test_a_missing_tensor_is_named(function):
    with pytest.raises(UserError, match=r"lacks '(alone|a)' \(and \d+ more\)"):
        function({}, NAMES)


@pytest.mark.parametrize("tensor", [torch.tensor(1.0), torch.zeros(10, 5), torch.zeros(11)])
def test_what_has_no_equal_parts_is_refused(tensor):
    with pytest.raises(UserError, match=r"'qkv' has shape .* not 3 equal parts"):
        split(tensors() | {"qkv": tensor}, NAMES)


def test_affine_names_weight_and_bias():
    assert affine({"a": "b.c"}) == {"a.weight": ("b.c.weight",), "a.bias": ("b.c.bias",)}


def test_fit_adds_and_drops_axes_of_length_1():
    value = torch.randn(3, 4)
    fitted = fit({"a": value, "b": value[None]}, {"a": torch.zeros(1, 3, 4), "b": torch.zeros(3, 4)})
    assert torch.equal(fitted["a"], value[None]) and torch.equal(fitted["b"], value)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"a": (3, 4), "b": (2,), "c": (2,)}, r"'b' \(and 1 more\) has no place in this model"),
        ({}, r"lacks 'a' \(and 0 more\)"),
        ({"a": (4, 3)}, r"'a' has shape \[4, 3\], this model's \[3, 4\]"),
        ({"a": (12,)}, r"'a' has shape \[12\], this model's \[3, 4\]"),
    ],
)
def test_fit_refuses_what_does_not_fit(state, reason):
    with pytest.raises(UserError, match=reason):
        fit({name: torch.zeros(shape) for name, shape in state.items()}, {"a": torch.zeros(3, 4)})
