"""Methods as data: what each constructor promises, and what it refuses."""

import pytest

from mirl.errors import UserError
from mirl.methods import Method, Term, default_segments, mae, mirl


def test_mirl_pairs_shallow_with_deep():
    method = mirl(54, 6)
    assert method.taps == (9, 18, 27, 36, 45, 54)
    assert [term.decoders for term in method.terms] == [(1, 6), (2, 5), (3, 4)]
    assert all(term.weight == pytest.approx(1 / 3) for term in method.terms)  # lambda = 2 / G


def test_one_segment_has_nothing_to_pair():
    method = mirl(24, 1)
    assert method.taps == (24,)
    assert method.terms == (Term((1,), 1.0),)


@pytest.mark.parametrize(("depth", "segments"), [(12, 2), (24, 4), (48, 6), (54, 6), (10, 2)])
def test_default_segments_are_the_papers(depth, segments):
    assert default_segments(depth) == segments
    assert len(mirl(depth).taps) == segments


def test_dense_context_is_every_earlier_segment_and_the_input():
    method = mirl(12, 4)
    assert [method.memory(g) for g in (1, 2, 3, 4)] == [(0,), (1, 0), (2, 1, 0), (3, 2, 1, 0)]
    assert mirl(12, 4, context="none").memory(4) == ()


def test_mae_has_one_decoder_after_the_last_block():
    assert mae(12) == Method("mae", (12,), "none", (Term((1,), 1.0),))


def test_uneven_segments_are_given_as_taps():
    assert mirl(13, taps=(4, 13)).taps == (4, 13)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mirl(54, 4), "choose 1, 2, 6, 18, 54 or give --taps"),
        (lambda: mirl(13), "depth 13 does not divide into 2 segments; choose 1 or"),
        (lambda: mirl(12, 3), "3 segments cannot be paired"),
        (lambda: mirl(12, taps=(4, 8)), "do not end at depth 12"),
        (lambda: mirl(12, taps=(8, 4, 6, 12)), "ascending"),
        (lambda: mirl(12, 4, taps=(6, 12)), "give one of the two"),
        (lambda: mirl(12, 0), "choose 1, 2, 4, 6, 12"),
    ],
)
def test_refusals_name_what_is_allowed(make, message):
    with pytest.raises(UserError, match=message):
        make()
